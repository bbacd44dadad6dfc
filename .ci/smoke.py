"""Check an installed floragrad with PyTorch: it trains, its report is exact, and a resumed step is the same."""

import copy
import warnings

import torch

import floragrad

warnings.simplefilter("error")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
batches = torch.randn(3, 8, 64)


def train(model: torch.nn.Module, optimizer: floragrad.Flora, batch: torch.Tensor) -> float:
    """Run one step."""
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


optimizer = floragrad.Flora(floragrad.param_groups(model, lr=1e-2), rank=16)
losses = [train(model, optimizer, batches[0]) for _ in range(5)]
assert losses[-1] < losses[0], losses

report = optimizer.report()
held = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
assert report.state_bytes == held < report.adamw_bytes / 4, str(report)

resumed = copy.deepcopy(model)
other = floragrad.Flora(floragrad.param_groups(resumed, lr=1e-2), rank=16)
other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
train(model, optimizer, batches[1])
train(resumed, other, batches[1])
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))

optimizer.zero_grad()
with floragrad.GradientAccumulator(optimizer, steps=2) as accumulator:
    for batch in batches[1:]:
        accumulator.backward(model(batch).square().mean())
    assert accumulator.step()

print(f"floragrad {floragrad.__version__}, torch {torch.__version__}, updated by {report.rows[0].path}")
