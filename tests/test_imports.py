"""What importing the package loads, and what it says when a framework is missing."""

import subprocess
import sys
import textwrap

import pytest

import floragrad

FRAMEWORKS = ("torch", "jax", "transformers", "accelerate", "datasets", "tokenizers")
# Refuses to find the modules named, as if they were not installed.
BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

sys.meta_path.insert(0, Blocked())
"""


def run(code: str, *, blocked: tuple[str, ...] = ()) -> str:
    """The standard output of a fresh interpreter, which must end well."""
    program = BLOCK.format(blocked=blocked) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded_by(statement: str) -> set[str]:
    code = f"""
    {statement}
    print(" ".join({{name.partition(".")[0] for name in sys.modules}}))
    """
    return set(run(code).split())


@pytest.mark.parametrize(
    "statement",
    [
        "import floragrad",
        "import floragrad; dir(floragrad); floragrad.__version__; floragrad.__all__",
        "import floragrad.policy",
    ],
)
def test_importing_loads_no_framework(statement: str) -> None:
    assert not loaded_by(statement) & {*FRAMEWORKS, "numpy"}


def test_the_reference_loads_numpy_alone() -> None:
    loaded = loaded_by("import floragrad.reference")
    assert "numpy" in loaded
    assert not loaded & set(FRAMEWORKS)


def test_the_optimizer_loads_torch_alone_and_public_names_are_what_they_say() -> None:
    """In one interpreter, for torch takes seconds to import."""
    code = """
    import sys
    import floragrad
    from floragrad import Flora, param_groups
    print(" ".join({name.partition(".")[0] for name in sys.modules}))

    import floragrad.torch
    assert floragrad.Flora is floragrad.torch.Flora is Flora
    assert floragrad.param_groups is floragrad.torch.param_groups is param_groups
    for name in floragrad.__all__:
        assert getattr(floragrad, name) is not None, name
    assert set(floragrad.__all__) <= set(dir(floragrad))
    try:
        floragrad.NoSuchName
    except AttributeError as error:
        print(error)
    """
    loaded, error = run(code).splitlines()
    assert "torch" in loaded.split()
    assert not set(loaded.split()) & (set(FRAMEWORKS) - {"torch"})
    assert error == "module 'floragrad' has no attribute 'NoSuchName'"


@pytest.mark.parametrize("name", ["Flora", "param_groups"])
def test_without_torch_the_error_names_the_extra(name: str) -> None:
    code = f"""
    import floragrad
    for attempt in range(2):
        try:
            floragrad.{name}
        except ImportError as error:
            assert error.name == "torch"
            assert isinstance(error.__cause__, ModuleNotFoundError)
            print(error)
    """
    message = "torch is not installed, and this part of floragrad needs it: pip install 'floragrad[torch]'"
    assert run(code, blocked=("torch",)).splitlines() == [message, message]


def test_policy_and_reference_work_without_any_framework() -> None:
    code = """
    import numpy as np
    from floragrad import policy, reference
    print(policy.plan_tensor((64, 64), rank=16).ratio)
    state = reference.State()
    reference.step(np.ones((1, 2, 3)), np.ones((1, 2, 3)), state, reference.Options())
    print(state.step)
    """
    assert run(code, blocked=FRAMEWORKS).split() == ["4", "1"]


@pytest.mark.parametrize("module", ["torch._C", "numpy"])
def test_an_import_error_from_inside_is_not_swallowed(module: str) -> None:
    """A torch that is installed but broken must say what is broken, not that it is missing."""
    code = f"""
    import builtins
    real = builtins.__import__

    def broken(name, *args, **kwargs):
        if name == {module!r} or name.startswith({module!r} + "."):
            raise ImportError("libsomething.so is broken", name={module!r})
        return real(name, *args, **kwargs)

    builtins.__import__ = broken
    import floragrad
    try:
        floragrad.Flora
    except ImportError as error:
        print(error)
    """
    assert run(code) == "libsomething.so is broken"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("import missing_dependency", "ModuleNotFoundError: No module named 'missing_dependency'"),
        ("from outer import nothing", "ImportError: cannot import name 'nothing' from 'outer' (unknown location)"),
        ("raise ImportError('no symbol')", "ImportError: no symbol"),
    ],
)
def test_require_answers_for_the_module_asked_for_alone(body: str, expected: str) -> None:
    """Whatever fails inside a module that is there is raised as it is, even under the module's own name."""
    code = f"""
    import sys
    from importlib.machinery import ModuleSpec
    from floragrad._extras import require

    class Loader:
        def create_module(self, spec):
            return None
        def exec_module(self, module):
            {body}

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return ModuleSpec(name, Loader()) if name == "outer" else None

    sys.meta_path.append(Finder)
    try:
        require("outer", "torch")
    except ImportError as error:
        print(f"{{type(error).__name__}}: {{error}}")
    """
    assert run(code) == expected


def test_require_names_the_extra() -> None:
    code = """
    from floragrad._extras import require

    try:
        require("no_such_package.part", "torch")
    except ImportError as error:
        print(error.name, error)
    """
    assert run(code) == (
        "no_such_package no_such_package.part is not installed, and this part of floragrad needs it: "
        "pip install 'floragrad[torch]'"
    )


def test_the_version_needs_no_extra() -> None:
    code = """
    import floragrad.cli
    raise SystemExit(floragrad.cli.main(["--version"]))
    """
    missing = ("typer", "rich", "numpy", "torch", "jax")
    assert run(code, blocked=missing) == f"floragrad {floragrad.__version__}"
