"""Grids and tiles of the kernels: functions of a tensor's shape alone, and so are the results.

The reasoning is in ``docs/performance.md``.
"""

from dataclasses import dataclass
from math import ceil
from typing import Final

from floragrad.policy import QUANTIZATION_BLOCK
from floragrad.torch.backends.triton.spec import Spec

TILE: Final = 4096
"""Elements of a tile: 32 for each thread of four warps, so that most of them stay in registers."""
FEW_SLICES: Final = 4
"""Up to so many slices a tile is half as large: there the momentum takes as many registers as the gradient."""
MOST_PARTIALS: Final = 1024
"""Partial sums of ‖D‖², about: every program of the last pass adds them up."""
MOST_CHUNKS: Final = 128
"""Chunks of rows that columns' sums are taken over first, about: each takes a row of the workspace."""
LEAST_CHUNK: Final = 64
"""Rows of a chunk at least: its sums in float32 are 3% of the bytes of as many rows in bfloat16."""
WIDEST: Final = 512
"""Columns of a tile where it has one slice, and of the first pass."""
BLOCK: Final = 256
"""Rows or columns of a program between the passes."""
VECTOR_BLOCK: Final = 4096
"""Elements of a program where nothing is summed."""


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number``."""
    return 1 << max(number - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiles:
    """Tiles of (rows, slices, buckets) of a pass over a matrix and its sketch, and the programs that run them.

    Attributes:
        slices: Slices of a tile, a power of two: ceil(n/k) or more.
        buckets: Columns of the momentum that a program works on.
        rows: Rows of a tile.
        bucket_blocks: Programs along the momentum's columns.
        row_programs: Programs along a matrix's rows, each of which takes tiles one after the other.
        warps: Of a program.
    """

    slices: int
    buckets: int
    rows: int
    bucket_blocks: int
    row_programs: int
    warps: int

    @classmethod
    def of(cls, batch: int, rows: int, columns: int, width: int) -> "Tiles":
        """Return the tiles of ``batch`` matrices of rows x columns with sketches of ``width`` columns."""
        slices = power_of_2(ceil(columns / width))
        widest = QUANTIZATION_BLOCK if slices > 1 else max(WIDEST, TILE // power_of_2(rows))
        buckets = max(2, min(widest, power_of_2(width)))
        tile = TILE if slices > FEW_SLICES else TILE // 2
        tile_rows = max(1, min(tile // (slices * buckets), power_of_2(rows)))
        bucket_blocks = ceil(width / buckets)
        return cls(
            slices=slices,
            buckets=buckets,
            rows=tile_rows,
            bucket_blocks=bucket_blocks,
            row_programs=min(ceil(rows / tile_rows), max(1, MOST_PARTIALS // (batch * bucket_blocks))),
            warps=min(16, max(4, slices * buckets // 1024)),
        )

    @property
    def programs(self) -> int:
        """Programs on a matrix."""
        return self.row_programs * self.bucket_blocks


@dataclass(frozen=True)
class Geometry:
    """Tiles and grids of a step.

    Attributes:
        tiles: Of the passes that know the direction.
        power_programs: Programs along a matrix's rows in a power iteration.
        sum_rows: Rows of a tile of the first pass.
        sum_columns: Columns of it.
        column_tiles: Of the first pass.
        chunk_rows: Rows that columns' sums are taken over first.
        chunks: Such chunks of a matrix.
        pieces: Pieces of a matrix's rows that are averaged by one program.
    """

    tiles: Tiles
    power_programs: int
    sum_rows: int
    sum_columns: int
    column_tiles: int
    chunk_rows: int
    chunks: int
    pieces: int

    @classmethod
    def of(cls, spec: Spec) -> "Geometry":
        """Return the geometry of a batch's tensors."""
        batch, rows, columns = spec.batch, spec.rows, spec.columns
        tiles = Tiles.of(batch, rows, columns, spec.width)
        sum_columns = min(max(WIDEST, TILE // power_of_2(rows)), power_of_2(columns))
        sum_rows = max(1, min(TILE // sum_columns, power_of_2(rows)))
        chunk_rows = sum_rows * ceil(max(LEAST_CHUNK, rows / max(1, MOST_CHUNKS // batch)) / sum_rows)
        return cls(
            tiles=tiles,
            power_programs=min(ceil(rows / tiles.rows), max(1, MOST_CHUNKS // (2 * batch))),
            sum_rows=sum_rows,
            sum_columns=sum_columns,
            column_tiles=ceil(columns / sum_columns),
            chunk_rows=chunk_rows,
            chunks=ceil(rows / chunk_rows),
            pieces=1 if spec.is_split else ceil(rows / BLOCK),
        )

    def measured(self, spec: Spec) -> int:
        """Programs of the first pass on a tensor, each of which sums up some of W²."""
        if spec.factored:
            return spec.batch * self.chunks * self.column_tiles
        return min(MOST_PARTIALS, ceil(spec.batch * spec.rows * spec.columns / VECTOR_BLOCK))
