"""The optimizer class: the order of a step, and its state."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor

from floragrad._checks import DEFAULT_RANK, refuse_renamed, show_plain_rank
from floragrad._report import Report
from floragrad.policy import EmbeddingMomentum, Projection, SecondMomentDtype, StateDtype
from floragrad.torch import param_info, scheduling
from floragrad.torch.checkpoint import check_loadable, flora_state, restore_state, saved_groups_with_device
from floragrad.torch.context import ParamUpdate, State, StepContext
from floragrad.torch.convert import converted_state
from floragrad.torch.dynamo import caller_stacklevel, disable_dynamo
from floragrad.torch.group_sync import check_option_unchanged, check_options_unchanged, is_in_sync, sync_infos
from floragrad.torch.options import (
    ADDED_OPTIONS,
    RENAMED,
    check_relative_lr,
    drop_compile,
    relative_lr,
    resolve_group,
    warn_compile_deprecated,
)
from floragrad.torch.param_info import ParamInfo, TensorIdCache, ensure_state, group_infos, next_tensor_id
from floragrad.torch.report import group_warning, make_report
from floragrad.torch.stats import StatsCollector
from floragrad.torch.step import step
from floragrad.torch.validation import check_shape

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
Group = dict[str, Any]


class Flora(torch.optim.Optimizer):
    r"""Adafactor whose momentum is kept as a random projection, redrawn every ``kappa`` steps.

    For a matrix G (m x n), with P (k x n) drawn from a seed::

        row ← β₂ row + (1 − β₂) mean_n(G² + eps1)      col ← β₂ col + (1 − β₂) mean_m(G² + eps1)
        U = G · rsqrt(row / mean(row)) · rsqrt(col)    β₂ = 1 − t^decay_rate
        M ← β₁ transfer(M) + (1 − β₁) U Pᵀ             D = U + (M − U Pᵀ)(P Pᵀ)⁻¹ P
        W ← W − α·weight_decay·W − α·D / max(1, rms(D) / clip_threshold)

    M is m x k with k ≈ n·rank / min(m, n): the only large state. Compression is along the last dimension of
    the tensor's matrix view; vectors are kept whole, and embeddings and output heads keep no momentum unless asked to.
    :func:`floragrad.param_groups` finds those by the model's modules; without it, only matrices above 8,192 long and at
    least 8 times as long as wide are taken for them. :meth:`report` shows the plan of each tensor and its reason.

    Args:
        params: Tensors, (name, tensor) pairs, or groups of either; see :func:`floragrad.param_groups`. Any
            option below may be set per group. A group may also say which ``kind`` its tensors are (``"matrix"``,
            ``"convolution"``, ``"vocabulary"`` or ``"vector"``), where their shapes would be a guess.
        lr: Learning rate, a number or a tensor of one element, in AdamW's units (see ``scale_parameter``).
            None with ``relative_step``.
        rank: r of the paper; ρ = min(m, n) // r columns share one element of the momentum.
        kappa: Steps between two projections. ``"adaptive"`` wants a smaller one: 100.
        eps: Added to squared gradients; least parameter scale.
        clip_threshold: Bound on the root mean square of an update.
        decay_rate: Exponent of the second moment's decay.
        beta1: Decay of the momentum; None or 0 keeps none and allocates nothing. ``OneCycleLR`` and ``CyclicLR``
            cycle it, as ``momentum`` of the groups.
        weight_decay: Decoupled, times the step size.
        scale_parameter: Multiply ``lr`` by max(eps2, rms(W)), as Adafactor and flora-opt do by default.
        relative_step: Derive the step size from the step: min(1e-2, 1/√t). Schedulers run, and change nothing.
        warmup_init: With ``relative_step``: min(1e-6·t, 1/√t).
        factorize_second_moment: False keeps the second moment whole; the momentum stays compressed.
        second_moment_dtype: Storage of a whole second moment of matrices: ``"float32"``, or ``"int8"``, rounded
            stochastically. PyTorch's operations compute its steps; the kernels do not.
        seed: Of projections and of rounding. The same seed gives the same results.
        ratio: ρ itself, the same for every tensor; instead of ``rank``.
        projection: ``"sign"``, ``"adaptive"`` (learned weights, n floats more), ``"gaussian"`` (the paper's).
        residual: Momentum inside the sketched subspace and the fresh gradient outside it, as above; False is
            the paper's unbiased estimator. None: True but for ``"gaussian"``, which has no residual.
        embedding_momentum: Momentum of vocabulary-like tensors: ``"none"``, ``"full"``, ``"compressed"``.
        state_dtype: Storage of the momentum: ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``, the
            last three rounded stochastically, so that the average stays unbiased.
        stochastic_rounding: Round bfloat16 parameters stochastically; float16 ones round to nearest.
        compile: Deprecated; it changes nothing.
        maximize: Go up the gradient; weight decay still shrinks.

    Raises:
        ValueError: An option has a wrong value, options contradict each other, or a parameter is complex.
        TypeError: An option has the name that it has in flora-opt.

    NaN and infinite gradients propagate into parameters and state, as in ``torch.optim``; use a
    ``GradScaler`` or check the gradient norm where they can occur.

    Deviations from the paper: the factored second moment is Adafactor's but acts on the matrix view; sign
    projections replace Gaussian ones; the residual estimator replaces the unbiased one; momentum is stored
    in 8 bits. ``Flora(params, lr, rank, projection="gaussian", state_dtype="float32",
    embedding_momentum="compressed", scale_parameter=True)`` is the paper's.

    Example:
        >>> model = torch.nn.Linear(512, 512)
        >>> optimizer = Flora(model.parameters(), lr=1e-3, rank=64)
        >>> model(torch.ones(4, 512)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.report().compressed
        1

    Source: Hao, Cao, Mou, "Flora: Low-Rank Adapters Are Secretly Gradient Compressors", ICML 2024,
    algorithm 2; Shazeer, Stern, "Adafactor", ICML 2018, algorithm 4.
    """

    _warned_of_lr = False
    """True once the user was told that ``relative_step`` ignores a scheduler's learning rate."""
    _collector: StatsCollector | None = None
    """Measures updates for :meth:`stats`; None unless asked for."""

    @show_plain_rank
    @refuse_renamed(**RENAMED)
    def __init__(
        self,
        params: Params,
        lr: float | Tensor | None = None,
        rank: int | None = DEFAULT_RANK,
        kappa: int = 1000,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = 0.9,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        relative_step: bool = False,
        warmup_init: bool = False,
        factorize_second_moment: bool = True,
        seed: int = 0,
        *,
        ratio: int | None = None,
        projection: Projection = "sign",
        residual: bool | None = None,
        embedding_momentum: EmbeddingMomentum = "none",
        state_dtype: StateDtype | torch.dtype = "int8",
        second_moment_dtype: SecondMomentDtype = "float32",
        stochastic_rounding: bool = True,
        compile: bool | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "rank": rank,
            "kappa": kappa,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
            "factorize_second_moment": factorize_second_moment,
            "seed": seed,
            "ratio": ratio,
            "projection": projection,
            "residual": residual,
            "embedding_momentum": embedding_momentum,
            "state_dtype": state_dtype,
            "second_moment_dtype": second_moment_dtype,
            "stochastic_rounding": stochastic_rounding,
            "maximize": maximize,
        }
        if compile is not None:
            warn_compile_deprecated(stacklevel=3)
        if relative_step:
            check_relative_lr(lr)
        self._infos: dict[Tensor, ParamInfo] = {}
        self._ids = TensorIdCache()
        self._incoming: Mapping[Tensor, Mapping[str, Any]] | None = None
        super().__init__(params, defaults)
        self.defaults.update(scheduling.scheduler_defaults(defaults, self.param_groups))
        reasons = group_warning(zip(self.report().rows, (info.group for info in self._infos.values()), strict=True))
        if reasons:
            warnings.warn(reasons, UserWarning, stacklevel=3)

    @disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its state is allocated at once.

        Args:
            param_group: ``params`` and any options of the constructor.

        Raises:
            ValueError: As in the constructor; the optimizer is left as it was.
        """
        group = drop_compile(param_group, stacklevel=2)
        group["params"] = param_info.unique_params(group["params"])
        group = resolve_group(group, self.defaults)
        super().add_param_group(group)
        group.pop("momentum", None)  # set by schedulers
        try:
            self._infos.update(group_infos(group, next_tensor_id(self._infos)))
        except ValueError:
            self.param_groups.pop()
            raise
        for param in group["params"]:
            if param.requires_grad:
                self._ensure_state(param)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Args:
            closure: Computes the gradients anew and returns the loss.

        Returns:
            The result of ``closure``.

        Raises:
            RuntimeError: A gradient is sparse, a parameter unknown, or a tensor (parameter, gradient, state) is
                missing or not of the planned shape and dtype; nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._sync_groups()
        for group in self.param_groups:
            self._sync_schedulers(group)
        given = [(param, self._validated(param)) for param in self._infos if param.grad is not None]
        self._update({param: self._begin_step(param, *checked) for param, checked in given})
        return loss

    @disable_dynamo
    @torch.no_grad()
    def step_parameter(self, param: Tensor) -> None:
        """Update one parameter from its ``.grad``, for updates layer by layer; :meth:`step` calls it for all.

        Hooks on :meth:`step` are not run. The result does not depend on the order of parameters. Of a sharded
        parameter all its devices must call this, and they exchange its sums alone.

        Args:
            param: A parameter of this optimizer, with a dense gradient.

        Raises:
            ValueError: It has no gradient, or is in no group.
            RuntimeError: As :meth:`step`.
        """
        if param not in self._infos or all(group is not self._infos[param].group for group in self.param_groups):
            self._sync_groups()
        if param not in self._infos:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is in no group of this optimizer: add it first"
            )
        check_option_unchanged(self._infos[param])
        self._sync_schedulers(self._infos[param].group)
        if param.grad is None:
            raise ValueError(f"{self._infos[param].name} has no gradient")
        self._update({param: self._begin_step(param, *self._validated(param))})

    @disable_dynamo
    def report(self) -> Report:
        """Report each tensor's state, its bytes and the reason for its plan.

        ``print`` and notebooks show a table; ``to_dicts()`` and ``to_pandas()`` return its rows.

        Frozen tensors have no state until they are unfrozen.

        Example:
            >>> optimizer = Flora([torch.nn.Parameter(torch.zeros(512, 512))], lr=1e-3, rank=64)
            >>> report = optimizer.report()
            >>> report.rows[0].ratio, report.state_bytes < report.adamw_bytes / 20
            (8, True)
        """
        self._sync_groups()
        return make_report(self._infos, self.state)

    def collect_stats(self, every: int = 1) -> None:
        """Measure the updates of every n-th step from now on, for :meth:`stats`.

        A measured step takes about the time of one more step in PyTorch operations, and the memory of one tensor's
        update. Nothing is measured, and nothing kept, unless this is called. Parameters and state are the same with and
        without. Of sharded parameters all devices must call this.

        Args:
            every: n; 0 ends it.

        Raises:
            ValueError: It is negative.
        """
        self._collector = StatsCollector(every) if every else None

    def stats(self, *, by_group: bool = False) -> dict[str, float]:
        r"""Return metrics of the last measured update of every parameter, to be logged; see :meth:`collect_stats`.

        With the gradient G, the normalised gradient U, the direction D and the step size α of each tensor W, before
        the step::

            grad_norm      √Σ‖G‖²
            param_norm     √Σ‖W‖²
            update_norm    √Σ‖α' D‖²        α' = α / max(1, rms(D) / clip_threshold); without weight decay
            update_rms     √(Σ‖D‖² / Σ numel(D)), before α and clipping: ``clip_threshold`` bounds it for each tensor
            clipped        share of the tensors with rms(D) > clip_threshold
            sketch_energy  Σ‖U Pᵀ (P Pᵀ)⁻¹ P‖² / Σ‖U‖², the share of the updates that lies in the sketched subspaces;
                           1/ρ for random signs and gradients without structure

        ``sketch_energy`` is of tensors with a sketch of signs or learned weights, and left out where there is none.

        Args:
            by_group: Add the same for each group, as ``"group0/update_rms"``.

        Returns:
            Metrics by name; empty before the first measured step.

        Raises:
            RuntimeError: :meth:`collect_stats` was not called.

        Example:
            >>> model = torch.nn.Linear(256, 256)
            >>> optimizer = Flora(model.parameters(), lr=1e-3, rank=32)
            >>> optimizer.collect_stats(every=100)
            >>> model(torch.randn(8, 256)).square().mean().backward()
            >>> optimizer.step()
            >>> sorted(optimizer.stats())
            ['clipped', 'grad_norm', 'param_norm', 'sketch_energy', 'update_norm', 'update_rms']
        """
        if self._collector is None:
            raise RuntimeError("no updates are measured: call optimizer.collect_stats() before the step")
        return self._collector.summary(self.param_groups, by_group=by_group)

    def tensor_ids(self) -> dict[Tensor, int]:
        """Return the id of each parameter: the key of its random streams, saved with its state."""
        self._sync_groups()
        states = {param: self.state.get(param, {}) for param in self._infos}
        return {param: int(states[param].get("tensor_id", info.tensor_id)) for param, info in self._infos.items()}

    @disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim`` does; Gaussian groups record their kind of device as well."""
        self._sync_groups()
        saved = super().state_dict()
        return {**saved, "param_groups": saved_groups_with_device(saved["param_groups"], self.param_groups)}

    @disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, every tensor in the dtype of its plan.

        Args:
            state_dict: From :meth:`state_dict` of an optimizer with the same layout.

        Raises:
            ValueError: The state belongs to another optimizer, or to other ``rank``, ``kappa``, ``seed``,
                ``projection``, … than this one's, or a tensor cannot be cast back; nothing has been changed then.
            RuntimeError: A parameter was resized after the optimizer was made.
        """
        # Registered last, so that it sees the result of the caller's own hooks.
        last = self.register_load_state_dict_pre_hook(lambda _, given: self._check_incoming(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            self._incoming = None

    def convert_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return another Flora's state in this one's layout, for :meth:`load_state_dict`.

        For a run that goes on with another ``rank``, ``ratio``, ``state_dtype``, ``projection``, ``kappa``, ``seed``,
        … The momentum is decoded as it was written (orthogonally, but for ``residual=False``) and encoded anew, low-bit
        storage rounded stochastically with bits drawn from ``seed``, tensor and step; where nothing changed but the
        storage, the sketch is only stored anew. A factored second moment is the means of a whole one, a whole one the
        product of rows and columns. Where no momentum was saved, or a Gaussian one cannot be decoded, it starts anew.

        Args:
            state_dict: From :meth:`state_dict` of a Flora over the same parameters; left as it is.

        Returns:
            A state that :meth:`load_state_dict` takes, with the saved learning rates and other live options.

        Raises:
            ValueError: It was not written by Flora, or over other numbers of parameters.

        Warns:
            UserWarning: Once, naming the tensors whose momentum starts anew, and why.

        Example:
            >>> model = torch.nn.Linear(512, 512)
            >>> old = Flora(model.parameters(), lr=1e-3, rank=64, state_dtype="float32")
            >>> new = Flora(model.parameters(), lr=1e-3, rank=128, state_dtype="int8")
            >>> new.load_state_dict(new.convert_state(old.state_dict()))
        """
        self._sync_groups()
        with torch.no_grad():
            return converted_state(state_dict, self.param_groups, self._infos)

    def __getstate__(self) -> dict[str, Any]:
        self._sync_groups()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._infos, self._ids = {}, TensorIdCache()
        for options in (self.defaults, *self.param_groups):
            options.pop("compile", None)  # of versions that compiled the step
            for name, value in ADDED_OPTIONS.items():
                options.setdefault(name, value)
        for group in self.param_groups:
            if group["relative_step"] and group["lr"] is None:  # of versions that kept schedulers out
                group["lr"] = relative_lr(group, 1)
            self._infos.update(group_infos(group, len(self._infos)))
        incoming = self.__dict__.setdefault("_incoming", None) or {}
        for param, saved in incoming.items():
            # Replaces the base class's casts to the parameter's dtype; entries of wrappers keep them.
            self.state[param].update(
                param_info.distribute_state(
                    param, self._infos[param], restore_state(saved, param.device, self._infos[param].plan)
                )
            )
        self._infos = param_info.with_saved_ids(self._infos, self.state)
        for param in self._infos:
            if param.requires_grad or param in incoming:
                self._ensure_state(param)

    def _check_incoming(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that would be misread; remember it, for the base class casts its tensors."""
        self._sync_groups()
        for param, info in self._infos.items():
            check_shape(info.name, param.shape, info.plan.shape)
        plans = {param: info.plan for param, info in self._infos.items()}
        self._incoming = check_loadable(state_dict, self.param_groups, plans)

    def _ensure_state(self, param: Tensor) -> State:
        return ensure_state(param, self._infos[param], self.state[param])

    def _sync_groups(self) -> None:
        """Follow changes of the groups: new, removed and replaced parameters."""
        if is_in_sync(self._infos, self.param_groups):
            check_options_unchanged(self._infos)
            return
        self._infos = sync_infos(self.state, self._infos, self.param_groups, self.defaults)
        self._ids.forget()

    def _validated(self, param: Tensor) -> tuple[Tensor, Tensor, State]:
        """Return the local parameter, gradient and state, checked against the plan; nothing is changed."""
        return param_info.validate_update(param, self._infos[param], self._ensure_state(param))

    def _begin_step(self, param: Tensor, local: Tensor, grad: Tensor, state: State) -> ParamUpdate:
        """Count a step of a parameter, and return its update."""
        info = self._infos[param]
        step = int(state["step"].item()) + 1
        state["step"].fill_(step)  # takes a third of the time of an addition
        ctx = StepContext(info.plan, info.group, self._ids.of(param, state), step, param.device, info.part)
        return ParamUpdate(local, grad, flora_state(state), ctx)

    def _update(self, updates: Mapping[Tensor, ParamUpdate]) -> None:
        """Run a step that has begun."""
        if self._collector is not None:
            self._collector.collect(updates)
        step(list(updates.values()))
        for param, update in updates.items():
            param_info.write_back(param, update.param, update.ctx.plan)

    def _sync_schedulers(self, group: Group) -> None:
        """Read a group's values from schedulers."""
        scheduling.adopt_momentum(group)
        if not self._warned_of_lr and scheduling.ignores_scheduler_lr(group):
            self._warned_of_lr = True
            scheduling.warn_ignored_lr(group, caller_stacklevel())

    def _get_lr(self, group: Group, state: Mapping[str, Any]) -> float:
        """Return the step size of a group's first parameter; transformers' ``AdafactorSchedule`` calls this."""
        self._warned_of_lr = True  # the scheduler's learning rate is this one
        param = group["params"][0].detach()
        rms = float(param.float().square().mean().sqrt()) if group["scale_parameter"] else 1.0
        return scheduling.step_size(group, max(int(state["step"]), 1), rms)
