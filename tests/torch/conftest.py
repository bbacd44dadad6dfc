"""The code that a test of the update runs on."""

import os
from collections.abc import Iterator

import pytest

from floragrad.torch.backends import cpu as native
from floragrad.torch.backends.cpu import library

# Of `make sanitize`: the kernels of another folder are found before the installed ones.
if folder := os.environ.get("FLORAGRAD_TEST_KERNELS"):
    native.__path__.insert(0, folder)

BUILDS = ("avx512", "avx2", "baseline")


@pytest.fixture(params=["eager", *BUILDS])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The eager code, and the native kernels of each instruction set."""
    use(request.param, monkeypatch)
    yield request.param
    library._found.cache_clear()


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The native kernels of each instruction set."""
    use(request.param, monkeypatch)
    yield request.param
    library._found.cache_clear()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No native kernels: what a test replaces, or compares in every bit, is the Python code."""
    use("eager", monkeypatch)
    yield
    library._found.cache_clear()


def use(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    library._found.cache_clear()
    monkeypatch.setenv(library.SWITCH, "eager" if code == "eager" else "auto")
    if code == "eager":
        return
    runnable = library.instruction_sets()
    if code not in runnable:
        pytest.skip(f"this processor has not {code}")
    monkeypatch.setattr(library, "instruction_sets", lambda: (code,))
    found = library.library()
    assert found is not None, library.absence()
    assert found.name == code
