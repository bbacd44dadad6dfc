"""Ways to run a window, crossed with ways to end it; each has an exact counterpart in plain PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from floragrad import Flora, GradientAccumulator

STEPS = 4
WIDTH = 32
MAX_NORM = 0.05


class Net(nn.Module):
    """An embedding, a convolution, matrices, norms; what a scenario needs is switched on."""

    def __init__(
        self, *, tied: bool = False, checkpointing: bool | None = None, gated: bool = False, times: int = 1
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 80), nn.Linear(80, WIDTH, bias=False)
        self.side = nn.Linear(WIDTH, WIDTH) if gated else None
        self.head = nn.Linear(WIDTH, 200, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.checkpointing = checkpointing
        self.times = times

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        for _ in range(self.times):
            if self.checkpointing is None:
                hidden = self.block(hidden)
            else:
                hidden = checkpoint(self.block, hidden, use_reentrant=self.checkpointing)
        if self.side is not None and bool(tokens[0, 0] % 2):
            hidden = hidden + self.side(hidden)
        logits = self.head(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())

    def block(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(torch.relu(self.up(self.norm(hidden))))


def one_loss(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    return [model(tokens)]


def two_losses(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    return [model(tokens[:1]) * 0.3, model(tokens[1:]) * 0.7]


def autocast_loss(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return [model(tokens)]


@dataclass(frozen=True)
class Scenario:
    """How the micro-batches of some windows are run.

    Attributes:
        name: The test's id.
        build: Makes the model.
        losses: Of one micro-batch, one for each backward pass.
        lengths: Micro-batches of each window; a short one is flushed.
        weights: Of each micro-batch of a window; None for the mean.
        in_backward: Whether tensors can be updated inside the last backward pass.
        names_vocabulary: Whether the groups say that embedding and head are vocabulary: too few rows to be told by.
    """

    name: str
    build: Callable[[], nn.Module] = Net
    losses: Callable[[nn.Module, Tensor], list[Tensor]] = one_loss
    lengths: tuple[int, ...] = (STEPS, STEPS, STEPS)
    weights: tuple[float, ...] | None = None
    in_backward: bool = True
    names_vocabulary: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def params(self, model: nn.Module) -> list[Any]:
        """What an optimizer is made of."""
        if not self.names_vocabulary:
            return list(model.parameters())
        vocabulary = [model.embed.weight, model.head.weight]
        hidden = [param for param in model.parameters() if all(param is not each for each in vocabulary)]
        return [{"params": hidden}, {"params": vocabulary, "kind": "vocabulary"}]

    def windows(self) -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(1)
        return [[torch.randint(0, 200, (2, 7), generator=generator) for _ in range(length)] for length in self.lengths]


SCENARIOS = [
    Scenario("plain"),
    Scenario("tied-weights", build=partial(Net, tied=True)),
    Scenario("several-backwards", losses=two_losses, in_backward=False),
    Scenario("some-without-gradient", build=partial(Net, gated=True)),
    Scenario("short-window", lengths=(STEPS, 1, STEPS, 3)),
    Scenario("token-weights", weights=(0.1, 0.4, 0.2, 0.3)),
    Scenario("checkpointing", build=partial(Net, checkpointing=False)),
    Scenario("reentrant-checkpointing", build=partial(Net, checkpointing=True)),
    Scenario("shared-by-checkpoints", build=partial(Net, checkpointing=False, times=2)),
    Scenario("shared-by-reentrant-checkpoints", build=partial(Net, checkpointing=True, times=2), in_backward=False),
    Scenario("autocast", losses=autocast_loss),
]

Optimizers = torch.optim.Optimizer | list[torch.optim.Optimizer]


def flora(params: Any) -> Flora:
    return Flora(params, lr=1e-2, ratio=4, state_dtype="float32", weight_decay=0.1)


def adamw(params: Any) -> torch.optim.AdamW:
    # A larger eps: gradients that cancel to nothing but rounding errors would be scaled up to steps.
    return torch.optim.AdamW(params, lr=1e-2, eps=1e-3)


def one_each(params: Any) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD([param], lr=0.5, momentum=0.9) for param in params]


@dataclass(frozen=True)
class Ending:
    """How a window ends.

    Attributes:
        name: The test's id.
        optimizers: Made of the parameters.
        options: Of the accumulator.
        clips: Whether the norm can be clipped.
    """

    name: str
    optimizers: Callable[[Any], Optimizers]
    options: dict[str, Any] = field(default_factory=dict)
    clips: bool = True

    def __str__(self) -> str:
        return self.name


ENDINGS = [
    Ending("release", flora),
    Ending("release-in-backward", flora, {"clip": False}, clips=False),
    Ending("release-one-each", one_each),
    Ending("release-one-each-in-backward", one_each, {"clip": False}, clips=False),
    Ending("materialise", adamw),
    Ending("materialise-flora", flora, {"release": False}),
]


def accumulated(scenario: Scenario, ending: Ending, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The parameters after all windows, and each window's norm."""
    model, norms = scenario.model(), []
    optimizers = ending.optimizers(scenario.params(model))
    with GradientAccumulator(optimizers, STEPS, **{**ending.options, **options}) as accumulator:
        for window in scenario.windows():
            for index, tokens in enumerate(window):
                weight = scenario.weights[index] if scenario.weights else None
                with accumulator.micro_batch(weight=weight):
                    for loss in scenario.losses(model, tokens):
                        accumulator.backward(loss)
            assert accumulator.flush()
            if ending.clips:
                norms.append(accumulator.clip_grad_norm_(MAX_NORM))
            assert accumulator.step()
            assert all(param.grad is None for param in model.parameters())
    return flat(model), norms


def exact(scenario: Scenario, ending: Ending) -> tuple[Tensor, list[Tensor]]:
    """The same with gradients summed in ``.grad``, as PyTorch does it."""
    model, norms = scenario.model(), []
    made = ending.optimizers(scenario.params(model))
    optimizers = made if isinstance(made, list) else [made]
    for window in scenario.windows():
        for index, tokens in enumerate(window):
            weight = scenario.weights[index] if scenario.weights else 1 / len(window)
            for loss in scenario.losses(model, tokens):
                (loss * weight).backward()
        if ending.clips:
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return flat(model), norms


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten().float() for param in model.parameters()])
