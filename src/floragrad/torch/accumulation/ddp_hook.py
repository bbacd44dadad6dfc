"""Communication hook of DistributedDataParallel that averages compressed gradients."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.futures import Future
from torch.utils.weak import WeakTensorKeyDictionary

from floragrad._checks import accumulator_contradictions, check_contradictions, is_count
from floragrad.policy import AccumulatorPlan, Projection, StateDtype, plan_accumulator
from floragrad.torch.accumulation.all_reduce import all_reduce_rounded
from floragrad.torch.accumulation.sketch import GradientSketch
from floragrad.torch.distributed.collectives import Ranks
from floragrad.torch.options import as_integers, check_option, state_dtype_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

if distributed.is_available():
    # The wrapper looks at the annotation of its hook: it must be the class itself.
    from torch.distributed import GradBucket  # type: ignore[attr-defined]
elif not TYPE_CHECKING:
    GradBucket = Any


class FloraHookState:
    """Options and state of :func:`flora_hook`.

    Args:
        process_group: The processes that average; None is the default group.
        ratio: ρ, the columns of a matrix that are sent as one element.
        rank: The rank instead: ρ = min(m, n) // rank.
        state_dtype: Format that sketches are sent in: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        projection: ``"sign"``, or ``"gaussian"`` without error feedback.
        error_feedback: Add the compression error of earlier steps to every gradient; a float32 copy of each compressed
            gradient is kept for it.
        seed: Of projections and rounding, the same on all ranks.
        start_step: First steps, whose gradients are averaged uncompressed.

    Raises:
        ValueError: An option has a wrong value, or options contradict each other.

    Attributes:
        step: Steps so far.
    """

    def __init__(
        self,
        process_group: "ProcessGroup | None" = None,
        *,
        ratio: int | None = None,
        rank: int | None = None,
        state_dtype: StateDtype | torch.dtype = "float32",
        projection: Projection = "sign",
        error_feedback: bool = False,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        self.process_group = process_group
        self.step = 0
        self._settings: dict[str, Any] = {
            "ratio": (8 if rank is None else 1) if ratio is None else ratio,
            "rank": rank,
            "state_dtype": state_dtype_name(state_dtype),
            "projection": projection,
            "seed": seed,
        }
        for name, value in self._settings.items():
            check_option(name, value)
        check_contradictions(accumulator_contradictions(self._settings))
        if error_feedback and projection == "gaussian":
            raise ValueError(
                "error_feedback=True with projection='gaussian': error feedback decodes orthogonally, and Gaussian "
                "rows are not orthogonal; use projection='sign', or error_feedback=False"
            )
        if start_step != 0 and not is_count(start_step):
            raise ValueError(f"start_step={start_step!r}: must be an integer >= 0, the steps that are averaged whole")
        self._settings |= {**as_integers(self._settings, "ratio", "rank", "seed"), "error_feedback": error_feedback}
        self.start_step = start_step
        self._tensors: Any = WeakTensorKeyDictionary()
        self._saved: dict[int, dict[str, Tensor]] = {}

    @property
    def error_feedback(self) -> bool:
        """True if compression errors are added to later gradients."""
        return bool(self._settings["error_feedback"])

    def of(self, param: Tensor, ranks: Ranks) -> "_HookedParam":
        """Return the state of a parameter, made on its first use, in the same order on all ranks."""
        found = self._tensors.get(param)
        if found is None:
            found = self._tensors[param] = _HookedParam(param, self._settings, len(self._tensors), ranks.rank)
            found.load(self._saved.pop(found.tensor_id, {}))
        assert isinstance(found, _HookedParam)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the step and this rank's compression errors; every rank saves its own."""
        tensors = {each.tensor_id: each.state_dict() for each in self._tensors.values()}
        return {"settings": dict(self._settings), "step": self.step, "tensors": {**self._saved, **tensors}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a stopped run, before the first step of this one.

        Args:
            state_dict: From :meth:`state_dict` of the same rank, over the same model in the same wrapper.

        Raises:
            ValueError: It was saved with other settings; nothing has been changed then.
            RuntimeError: This state has been used already.
        """
        if len(self._tensors):
            raise RuntimeError("load_state_dict after the first step: load into a new FloraHookState")
        if state_dict["settings"] != self._settings:
            raise ValueError(
                f"the saved state was made with {state_dict['settings']}, this one with {self._settings}: "
                "construct it with the same options"
            )
        self.step = state_dict["step"]
        self._saved = dict(state_dict["tensors"])


class _HookedParam:
    """Sketch and compression error of one parameter's gradient.

    Attributes:
        tensor_id: Its position among the parameters, in the order of their first use.
        sketch: Of its gradient; None where the gradient is sent uncompressed.
        error: Compression error, float32; None without error feedback.
    """

    def __init__(self, param: Tensor, settings: dict[str, Any], tensor_id: int, rank: int) -> None:
        self.tensor_id = tensor_id
        names = ("ratio", "rank", "state_dtype")
        self.plan: AccumulatorPlan = plan_accumulator(param.shape, **{name: settings[name] for name in names})
        whole = self.plan.ratio == 1 and self.plan.state_dtype == "float32"
        self.sketch: GradientSketch | None = None
        self.error: Tensor | None = None
        if not whole:
            self.sketch = GradientSketch(
                self.plan, settings["projection"], settings["seed"], tensor_id, param.device, rank
            )
            if settings["error_feedback"]:
                self.error = torch.zeros(param.shape, dtype=torch.float32, device=param.device)

    def encode(self, grad: Tensor, step: int) -> Tensor | None:
        """Fold a gradient and the compression error into the sketch.

        Returns:
            The float32 tensor to sum over the ranks; None for a low-bit sketch.
        """
        if self.sketch is None:
            return grad.flatten().float()
        self.sketch.folds = 0
        if self.error is None:
            self.sketch.add(grad, 1.0, step, measure_noise=False)
        else:
            self.error += grad
            self.sketch.add(self.error, 1.0, step, measure_noise=False)
            self.sketch.subtract_from(self.error, step)
            # The scaler handles an overflow; it must not stay in the error.
            self.error.nan_to_num_(0.0, 0.0, 0.0)
        return self.sketch.buffers["data"].view(-1) if self.plan.state_dtype == "float32" else None

    def decode(self, grad: Tensor, summed: Tensor | None, step: int, ranks: int) -> None:
        """Write the mean over the ranks to ``grad``; ``summed`` is the sum of the results of :meth:`encode`."""
        if self.sketch is None:
            assert summed is not None
            grad.copy_(summed.view(grad.shape)).div_(ranks)
            return
        if summed is not None:
            self.sketch.buffers["data"].view(-1).copy_(summed)
        mean = grad if grad.is_contiguous() else grad.contiguous()
        self.sketch.decode_into(mean, step, 0.0, 1.0 / ranks, orthogonal=self.error is not None)
        if mean is not grad:
            grad.copy_(mean)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the compression error and the sizes of columns."""
        kept = {} if self.error is None else {"error": self.error}
        sizes = None if self.sketch is None else self.sketch.buffers.get("col_var")
        return kept if sizes is None else {**kept, "col_var": sizes}

    def load(self, saved: dict[str, Tensor]) -> None:
        """Load a saved state, if there is one.

        Raises:
            ValueError: It is of another tensor.
        """
        current = self.state_dict()
        if not saved or not current:
            return
        if {key: value.shape for key, value in current.items()} != {key: value.shape for key, value in saved.items()}:
            raise ValueError(
                f"the saved state of tensor {self.tensor_id} is not of shape {tuple(self.plan.shape)}: load the state "
                "that was saved with this model and wrapper"
            )
        for key, value in current.items():
            value.copy_(saved[key])


def flora_hook(state: FloraHookState, bucket: GradBucket) -> Future[Tensor]:
    """Average the sketches of a bucket's gradients: a communication hook of DistributedDataParallel.

    Every matrix is encoded with a projection that is drawn anew for every step, alike on all ranks; the sums of all
    sketches and vectors of a bucket are taken in one all-reduce of float32, and decoded into the bucket. Sketches in
    fewer bits are exchanged as :class:`floragrad.GradientAccumulator` exchanges them. Vocabulary-like tensors keep
    every column, vectors go as they are.

    With error feedback::

        X = G + e       C = round(X Pᵀ)       e ← X − C (P Pᵀ)⁻¹ P       Ĝ = mean(C) (P Pᵀ)⁻¹ P

    so that nothing is lost for good: the sum of all Ĝ and the mean of the ranks' e is the sum of all gradients. The
    decoder is the orthogonal projection, which takes 1/ρ of ‖X‖² away in the mean, so that e stays bounded. The
    unbiased decoder C P would leave ‖e‖² = (ρ − 1)‖X‖², which grows from step to step. It decodes without error
    feedback, where Ĝ is the gradient in the mean, with a variance of (ρ − 1)‖G‖². (In few bits the sum over the ranks
    is rounded once more, unbiased, and that rounding is not fed back.)

    Args:
        state: One for the wrapper.
        bucket: From the wrapper.

    Returns:
        The bucket's buffer with the mean over the ranks.

    Example:
        >>> torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64))
        >>> model.register_comm_hook(FloraHookState(ratio=8), flora_hook)
        >>> model(torch.ones(2, 64)).square().mean().backward()
        >>> model.module.weight.grad.shape
        torch.Size([64, 64])
        >>> torch.distributed.destroy_process_group()

    Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024, for the projection;
    Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019.
    """
    step, buffer = state.step, bucket.buffer()
    state.step += bucket.is_last()
    ranks = Ranks.from_group(state.process_group)
    if ranks is None:
        return _plain_mean(buffer, ranks)
    # Ids are assigned in uncompressed steps too: the wrapper reorders its buckets after the first step, and a resumed
    # run must have the same ids.
    tensors, grads = [state.of(param, ranks) for param in bucket.parameters()], bucket.gradients()
    if step < state.start_step:
        return _plain_mean(buffer, ranks)
    sent = [each.encode(grad, step) for each, grad in zip(tensors, grads, strict=True)]
    all_reduce_rounded([each.sketch for each in tensors if each.sketch is not None], step, ranks)
    lengths = [0 if part is None else part.numel() for part in sent]
    flat = torch.cat([part for part in sent if part is not None] or [buffer.new_empty(0, dtype=torch.float32)])

    def decode(done: Future[list[Tensor]]) -> Tensor:
        parts = torch.split(done.value()[0], lengths)
        for each, grad, encoded, summed in zip(tensors, grads, sent, parts, strict=True):
            each.decode(grad, None if encoded is None else summed, step, ranks.size)
        return buffer

    work = distributed.all_reduce(flat, group=ranks.group, async_op=True)
    assert work is not None
    decoded: Future[Tensor] = work.get_future().then(decode)
    return decoded


def _plain_mean(buffer: Tensor, ranks: Ranks | None) -> Future[Tensor]:
    """Average a bucket without compression."""
    if ranks is None:
        done: Future[Tensor] = Future()
        done.set_result(buffer)
        return done
    work = distributed.all_reduce(buffer.div_(ranks.size), group=ranks.group, async_op=True)
    assert work is not None
    mean: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return mean
