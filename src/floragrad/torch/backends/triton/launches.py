"""The launches of a step, each a function of a batch."""

from typing import Any, NamedTuple

from torch import Tensor

from floragrad.torch.backends.triton import geometry as shapes
from floragrad.torch.backends.triton.geometry import Geometry
from floragrad.torch.backends.triton.kernels.apply import apply
from floragrad.torch.backends.triton.kernels.direction import direction
from floragrad.torch.backends.triton.kernels.power import begin_learning, end_iteration, power_products
from floragrad.torch.backends.triton.kernels.scales import factors, scales
from floragrad.torch.backends.triton.kernels.statistics import square_sums, variance
from floragrad.torch.backends.triton.launch import Launch
from floragrad.torch.backends.triton.spec import DTYPES, MOMENTA, STATE_DTYPES, Spec, StepScalars


class Batch(NamedTuple):
    """Batch of tensors of one shape and one set of options.

    Attributes:
        spec: Compile-time description that they share.
        scalars: Runtime scalars of this step.
        geometry: Tiles and grids.
        tensors: Number of tensors.
        table: Addresses of each: int64, (tensors, fields).
        workspace: Float32.
    """

    spec: Spec
    scalars: StepScalars
    geometry: Geometry
    tensors: int
    table: Tensor
    workspace: Tensor

    @property
    def where(self) -> dict[str, Tensor]:
        """Tensor arguments of every kernel."""
        return {"table": self.table, "workspace": self.workspace}

    @property
    def averages(self) -> dict[str, float]:
        """Scalar arguments of the second moment."""
        scalars = self.scalars
        return {"beta2": scalars.beta2, "fresh2": 1 - scalars.beta2, "eps": scalars.eps}

    @property
    def tile_scalars(self) -> dict[str, int | float]:
        """Scalar arguments of the kernels on tiles."""
        spec, geometry, beta1 = self.spec, self.geometry, self.scalars.beta1
        return {
            "rows": spec.rows,
            "columns": spec.columns,
            "width": spec.width,
            "all_rows": spec.all_rows,
            "pieces": geometry.pieces,
            "floor": (1 - self.scalars.beta2) * self.scalars.eps,
            "beta1": beta1,
            "fresh": 1 - beta1,
        }

    @property
    def tile_constants(self) -> dict[str, Any]:
        """Compile-time constants of the kernels on tiles."""
        spec, geometry = self.spec, self.geometry
        return {
            "GRAD": DTYPES[spec.grad_dtype],
            "STATE": STATE_DTYPES[spec.state_dtype],
            "FACTORED": spec.factored,
            "ALIGNED": spec.aligned,
            "ROWS": geometry.tiles.rows,
            "SLICES": geometry.tiles.slices,
            "BUCKETS": geometry.tiles.buckets,
        }

    @property
    def estimator(self) -> dict[str, Any]:
        """Further compile-time constants of the kernels that compute the direction."""
        spec = self.spec
        return {
            "MOMENTUM": MOMENTA[spec.momentum],
            "ADAPTIVE": spec.adaptive and spec.is_sketch,
            "RESIDUAL": spec.residual,
            "RESAMPLES": spec.resamples,
        }


def statistics(batch: Batch) -> Launch:
    """Sum up G² along rows and columns, or update the whole second moment."""
    spec, geometry = batch.spec, batch.geometry
    constants = {
        "GRAD": DTYPES[spec.grad_dtype],
        "PARAM": DTYPES[spec.param_dtype],
        "MEASURES": spec.scales,
        "ALIGNED": spec.aligned,
    }
    if not spec.factored:
        count = spec.batch * spec.rows * spec.columns
        block = min(shapes.VECTOR_BLOCK, shapes.power_of_2(count))
        grid = (geometry.measured(spec), batch.tensors, 1)
        arguments: dict[str, Tensor | int | float] = {**batch.where, "count": count, **batch.averages}
        return Launch(variance, grid, arguments, constants | {"BLOCK": block})
    return Launch(
        square_sums,
        (geometry.chunks * geometry.column_tiles, spec.batch, batch.tensors),
        {
            **batch.where,
            "rows": spec.rows,
            "columns": spec.columns,
            "chunks": geometry.chunks,
            "chunk_rows": geometry.chunk_rows,
        },
        constants | {"ROWS": geometry.sum_rows, "COLUMNS": geometry.sum_columns},
    )


def between(batch: Batch) -> Launch | None:
    """Average rows and columns, and draw; of shards only sum the columns. None without any of these."""
    spec, geometry = batch.spec, batch.geometry
    if not (spec.factored or spec.draws):
        return None
    blocks = -(-spec.columns // shapes.BLOCK)
    averaging = spec.batch * (blocks + geometry.pieces) if spec.factored else 0
    drawing = blocks + -(-spec.batch * spec.rows // shapes.BLOCK) if spec.draws else 0
    return Launch(
        scales,
        (averaging + drawing, batch.tensors, 1),
        {
            **batch.where,
            "batch": spec.batch,
            "rows": spec.rows,
            "columns": spec.columns,
            "width": spec.width,
            "all_rows": spec.all_rows,
            "chunks": geometry.chunks,
            "column_tiles": geometry.column_tiles,
            "pieces": geometry.pieces,
            **batch.averages,
        },
        {
            "FACTORED": spec.factored,
            "SUMS_ONLY": spec.is_split,
            "SIGNED": spec.is_signed,
            "ROUNDS_STATE": spec.rounds_state,
            "ROUNDS_PARAM": spec.rounds,
            "SIGNS": spec.draws_signs,
            "OLD_SIGNS": spec.draws_signs and spec.resamples,
            "ALIGNED": spec.aligned,
            "BLOCK": shapes.BLOCK,
        },
    )


def shard_factors(batch: Batch) -> Launch:
    """Average columns and write their factors, of sums over all shards."""
    spec = batch.spec
    return Launch(
        factors,
        (-(-spec.columns // shapes.BLOCK), spec.batch, batch.tensors),
        {**batch.where, "columns": spec.columns, "all_rows": spec.all_rows, **batch.averages},
        {"SIGNED": spec.is_signed, "ALIGNED": spec.aligned, "BLOCK": shapes.BLOCK},
    )


def directions(batch: Batch) -> Launch:
    """Sum up ‖D‖²."""
    return Launch(
        direction,
        _tile_grid(batch),
        {**batch.where, **batch.tile_scalars, "row_programs": batch.geometry.tiles.row_programs},
        batch.tile_constants | batch.estimator,
        batch.geometry.tiles.warps,
    )


def application(batch: Batch) -> Launch:
    """Update the momentum and the parameter."""
    spec, geometry, scalars = batch.spec, batch.geometry, batch.scalars
    return Launch(
        apply,
        _tile_grid(batch),
        {
            **batch.where,
            **batch.tile_scalars,
            "row_programs": geometry.tiles.row_programs,
            "partials": 1 if spec.is_split else spec.batch * geometry.tiles.programs,
            "param_partials": 1 if spec.is_split else geometry.measured(spec),
            "lr": scalars.lr,
            "sign": scalars.sign,
            "decay": scalars.decay,
            "least": scalars.least,
            "clip_threshold": scalars.clip_threshold,
            "numel": float(spec.numel),
        },
        batch.tile_constants
        | batch.estimator
        | {
            "PARAM": DTYPES[spec.param_dtype],
            "ROUNDS": spec.rounds,
            "READS_LR": isinstance(scalars.lr, Tensor),
            "SCALES": spec.scales,
            "ADDED_UP": spec.is_split,
        },
        geometry.tiles.warps,
    )


def learning_start(batch: Batch) -> Launch:
    """Keep the old weights of an adaptive projection, and start to learn from them."""
    return Launch(
        begin_learning, _bucket_grid(batch), {**batch.where, **_row(batch)}, _bucket_constants(batch), _warps(batch)
    )


def power_iteration(batch: Batch) -> Launch:
    """Run the first half of a power iteration: products of some rows each."""
    spec, geometry = batch.spec, batch.geometry
    return Launch(
        power_products,
        (geometry.power_programs * geometry.tiles.bucket_blocks, spec.batch, batch.tensors),
        {**batch.where, **batch.tile_scalars, "row_programs": geometry.power_programs},
        batch.tile_constants,
        geometry.tiles.warps,
    )


def learning_end(batch: Batch, *, is_last: bool) -> Launch:
    """Run the second half of a power iteration: weights of norm 1 in each bucket."""
    split = batch.spec.is_split
    return Launch(
        end_iteration,
        _bucket_grid(batch),
        {**batch.where, **_row(batch), "chunks": 1 if split else batch.geometry.power_programs},
        _bucket_constants(batch) | {"ADDED_UP": split, "IS_LAST": is_last},
        _warps(batch),
    )


def _tile_grid(batch: Batch) -> tuple[int, int, int]:
    return batch.geometry.tiles.programs, batch.spec.batch, batch.tensors


def _bucket_grid(batch: Batch) -> tuple[int, int, int]:
    return batch.geometry.tiles.bucket_blocks, batch.spec.batch, batch.tensors


def _row(batch: Batch) -> dict[str, int]:
    return {"columns": batch.spec.columns, "width": batch.spec.width}


def _bucket_constants(batch: Batch) -> dict[str, Any]:
    geometry = batch.geometry
    return {"ALIGNED": batch.spec.aligned, "SLICES": geometry.tiles.slices, "BUCKETS": geometry.tiles.buckets}


def _warps(batch: Batch) -> int:
    return min(16, max(1, batch.geometry.tiles.slices * batch.geometry.tiles.buckets // 256))
