"""Every method trains; the vocabulary is the same beside all of them where that was asked for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from floragrad import Flora
from floragrad.cli.errors import UserError
from floragrad.cli.methods import EMBEDDING_LR, METHODS
from floragrad.cli.peers import HIDDEN, PEERS
from floragrad.cli.train.config import RunConfig
from floragrad.cli.train.optimizers import CombinedOptimizer, Groups, add_adapters, optimizer_class, state_bytes
from tests.cli.train.support import assert_same_run, fast_config, interrupt, refused, run

pytestmark = pytest.mark.usefixtures("one_layer")

Made = tuple[torch.nn.Module, torch.optim.Optimizer]
TOKENS = torch.arange(24).view(2, 12)


def needs(method: str) -> None:
    """Skip a method whose package is not installed."""
    peer = METHODS[method].peer
    if peer and PEERS[peer].remedy:
        pytest.skip(f"{method} is not installed: {PEERS[peer].remedy}")


def make(method: str, **options: Any) -> Made:
    """A small model and the optimizer of a method."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))
    ranked = {"rank": 4} if METHODS[method].takes("rank") and "set" not in options else {}
    config = RunConfig.resolve(optimizer=method, **ranked, **options)
    if METHODS[method].adapters:
        add_adapters(model, 4, others=config.vocabulary == "shared")
    kind, arguments = optimizer_class(config, model)
    return model, kind(arguments.pop("params"), **arguments)


def train(made: Made, steps: int) -> None:
    model, optimizer = made
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def by_kind(optimizer: torch.optim.Optimizer) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        found.setdefault(group["kind"], []).append(group)
    return found


@pytest.mark.parametrize("vocabulary", ["own", "shared"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_goes_on_from_its_state(method: str, vocabulary: str, tmp_path: Path) -> None:
    needs(method)
    one, two = (make(method, vocabulary=vocabulary) for _ in range(2))
    before = weights(one[0])
    train(one, 2)
    assert any(not torch.equal(before[name], value) for name, value in one[0].state_dict().items())
    two[0].load_state_dict(one[0].state_dict())
    torch.save(one[1].state_dict(), tmp_path / "optimizer.pt")
    two[1].load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(one, 2)
    train(two, 2)
    for name, value in one[0].state_dict().items():
        assert torch.equal(two[0].state_dict()[name], value), name


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_vocabulary_is_trained_alike(method: str) -> None:
    """From the same gradients, by the same optimizer at the same rates: a step of one of them is a step of all."""
    needs(method)
    model, optimizer = make(method, vocabulary="shared", lr=3e-4)
    groups = by_kind(optimizer)
    expected = {"vocabulary": EMBEDDING_LR, "vector": METHODS["flora"].lr, "matrix": 3e-4}
    for kind, lr in expected.items():
        assert [float(group["lr"]) for group in groups[kind]] == pytest.approx([lr] * len(groups[kind]))
    other = LlamaForCausalLM(model.config)
    alone = Flora([{"params": other.model.embed_tokens.weight, "kind": "vocabulary"}], lr=EMBEDDING_LR)
    embedding = model.get_input_embeddings().weight
    other.model.embed_tokens.weight.data.copy_(embedding.data)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    other.model.embed_tokens.weight.grad = embedding.grad.clone()
    optimizer.step()
    alone.step()
    assert torch.equal(embedding, other.model.embed_tokens.weight)


def test_a_scheduler_acts_on_every_part() -> None:
    model, optimizer = make("muon", vocabulary="shared")
    assert isinstance(optimizer, CombinedOptimizer)
    assert [type(part).__name__ for part in optimizer.parts] == ["Muon", "Flora"]
    started = [group["lr"] for group in optimizer.param_groups]
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        train((model, optimizer), 1)
        scheduler.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [lr / 4 for lr in started]
    optimizer.load_state_dict(optimizer.state_dict())
    scheduler.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [lr / 8 for lr in started]
    every = {id(param) for param in model.parameters()}
    assert {id(param) for group in optimizer.param_groups for param in group["params"]} == every


def test_groups_that_a_part_makes_anew_keep_their_kind() -> None:
    """As Gefen does, whose package is not always there."""

    def each_alone(groups: Groups) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [param]} for group in groups for param in group["params"]])

    params = {kind: torch.nn.Parameter(torch.ones(2)) for kind in ("matrix", "vector")}
    optimizer = CombinedOptimizer([[{"params": [params[kind]], "kind": kind} for kind in params]], [each_alone])
    for _ in range(2):
        assert [group["kind"] for group in optimizer.param_groups] == list(params)
        optimizer.load_state_dict(optimizer.state_dict())


def test_a_state_of_other_parts_is_refused() -> None:
    _, optimizer = make("muon", vocabulary="shared")
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="shorter"):
        optimizer.load_state_dict({"parts": state["parts"][:1]})


@pytest.mark.parametrize(("method", "per_element"), [("adamw", 8), ("muon", 4), ("sinkgd", 0), ("scale", 0)])
def test_the_state_of_hidden_matrices_is_counted_alone(method: str, per_element: int) -> None:
    made = make(method, vocabulary="shared")
    train(made, 1)
    groups = [group for group in made[1].param_groups if group["kind"] in HIDDEN]
    params = [param for group in groups for param in group["params"]]
    counters = 4 * len(params) if method == "adamw" else 0
    assert state_bytes(made[1], HIDDEN) == per_element * sum(param.numel() for param in params) + counters
    assert state_bytes(made[1]) > state_bytes(made[1], HIDDEN)


def test_floras_variants_are_what_they_are_called() -> None:
    def momentum(method: str, **options: Any) -> tuple[Any, Any]:
        _, optimizer = make(method, vocabulary="shared", **options)
        (group,) = (group for group in optimizer.param_groups if group["kind"] == "matrix")
        row = next(row for row in optimizer.report().rows if row.name.endswith("up_proj.weight"))
        return group, row

    group, row = momentum("flora-none")
    assert (group["beta1"], row.momentum) == (None, "none")
    group, row = momentum("flora-full")
    assert (group["ratio"], group["state_dtype"], row.ratio) == (1, "float32", 1)
    group, row = momentum("flora-paper")
    assert (group["projection"], group["residual"], group["state_dtype"]) == ("gaussian", False, "float32")
    group, row = momentum("flora", set=("ratio=3", "state_dtype=int4", "residual=false", "kappa=never"))
    assert (group["ratio"], group["rank"], group["state_dtype"], group["residual"]) == (3, None, "int4", False)
    assert group["kappa"] > 10**9


def test_lora_trains_adapters_and_the_shared_vocabulary() -> None:
    own, _ = make("lora")
    shared, _ = make("lora", vocabulary="shared")
    assert all(".lora_" in name for name, param in own.named_parameters() if param.requires_grad)
    frozen = [name for name, param in shared.named_parameters() if not param.requires_grad]
    assert len(frozen) == 7
    assert all(name.endswith(".base_layer.weight") for name in frozen)


@pytest.mark.parametrize("vocabulary", ["own", "shared"])
@pytest.mark.parametrize("method", ["muon", "sinkgd", "lora"])
def test_a_kernel_is_trained_beside_the_matrices(method: str, vocabulary: str) -> None:
    """A vision transformer cuts its images with a convolution, which is no matrix of two dimensions."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_labels=5))
    config = RunConfig.resolve(optimizer=method, vocabulary=vocabulary, task="vision")
    if METHODS[method].adapters:
        add_adapters(model, 4, others=vocabulary == "shared")
    kind, arguments = optimizer_class(config, model)
    optimizer = kind(arguments.pop("params"), **arguments)
    kernel = model.vit.embeddings.patch_embeddings.projection.weight
    before = kernel.detach().clone()
    model(pixel_values=torch.ones(2, 3, 8, 8), labels=torch.tensor([1, 2])).loss.backward()
    optimizer.step()
    trains_adapters_only = (method, vocabulary) == ("lora", "own")
    assert torch.equal(before, kernel) == trains_adapters_only
    chosen = {param for group in optimizer.param_groups for param in group["params"]}
    assert chosen == {param for param in model.parameters() if param.requires_grad}


@pytest.mark.parametrize("options", [{"optimizer": "adamw", "vocabulary": "shared"}, {"optimizer": "lora"}])
def test_a_run_goes_on_bit_for_bit(options: dict[str, Any], texts: Path, tmp_path: Path) -> None:
    config = fast_config(texts, **options)
    stopped = interrupt(config, tmp_path / "stopped", 5)
    assert_same_run(stopped, run(config, tmp_path / "whole"))


def test_a_missing_package_is_one_line(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("floragrad.cli.peers.find_spec", lambda _: None)
    said = refused(capsys, "train", "--optimizer", "gefen", "--text", texts, "--out", tmp_path / "out")
    assert said == "--optimizer gefen is not installed: pip install 'floragrad[rivals]'"
    assert not (tmp_path / "out").exists()


SETTINGS = [
    (("ratios=2",), "--set ratios is no option of Flora (did you mean ratio?): choose one of rank, ratio, kappa, "),
    (("lr=2",), "--set lr is no option of Flora: choose one of rank, "),
    (("ratio",), "--set 'ratio' cannot be read: give NAME=VALUE, like ratio=2"),
    (("ratio=0",), "--set ratio=0: must be an integer >= 1"),
    (("state_dtype=int2",), "--set state_dtype='int2': must be one of 'float32', 'bfloat16', 'int8', 'int4'"),
    (("ratio=2,3",), "--set ratio=2,3 has several values: give one, or use floragrad compare"),
    (("ratio=2", "ratio=3"), "--set ratio is given twice: give it once"),
    (("ratio=2,2",), "--set ratio=2,2 names one twice: give each once"),
    (("residual=true", "projection=gaussian"), "--set: residual=True with projection='gaussian': "),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=str)
def test_wrong_settings_are_refused(settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.resolve(set=settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": ("rank=8",), "rank": 8}, "--set rank and --rank are both given: leave one out"),
        ({"set": ("ratio=2",), "rank": 8}, "--set: rank=8 and ratio=2: give one of them"),
        ({"set": ("ratio=2",), "optimizer": "flora-full"}, "--set ratio has no effect with --optimizer flora-full"),
        ({"set": ("ratio=2",), "optimizer": "adamw"}, "--set belongs to --optimizer flora, and this is adamw"),
        ({"set": ("ratio=2",), "backend": "jax"}, "--set sets options of PyTorch's Flora"),
        (
            {"set": ("embedding_momentum=full",), "vocabulary": "shared"},
            "--set embedding_momentum changes the vocabulary's optimizer: add --vocabulary own",
        ),
    ],
    ids=str,
)
def test_settings_that_contradict_other_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        RunConfig.resolve(**options)
    assert str(caught.value).startswith(message)


def test_a_configuration_with_settings_is_read_as_it_was_written() -> None:
    config = RunConfig.resolve(set=("ratio=2", "kappa=never", "eps=1e-20:1e-3"))
    assert RunConfig.from_json(config.to_json()) == config
    keywords = config.keywords("optimizer")
    assert (keywords["ratio"], keywords["eps"], config.rank) == (2, (1e-20, 1e-3), None)
    assert config.label == "flora ratio=2 kappa=never eps=1e-20:1e-3"
