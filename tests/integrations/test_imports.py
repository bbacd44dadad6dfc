"""What the integrations load, and what they say where their library is missing."""

import floragrad.torch.integrations as integrations
from floragrad.torch.accumulation import GradientAccumulator
from tests.test_imports import run

LIBRARIES = ("accelerate", "transformers", "lightning")


def test_torch_alone_loads_none_of_them_and_names_the_extra_of_what_is_missing() -> None:
    """In one interpreter, for torch takes seconds to import."""
    code = f"""
    import sys
    from importlib import import_module
    import floragrad.torch.integrations
    print(" ".join({{name.partition(".")[0] for name in sys.modules}}))

    for name in {LIBRARIES!r}:
        sys.modules[name] = None
        try:
            import_module(f"floragrad.{{name}}")
        except ImportError as error:
            print(error)
    """
    loaded, *errors = run(code).splitlines()
    assert "torch" in loaded.split()
    assert not set(loaded.split()) & set(LIBRARIES)
    assert errors == [
        f"{name} is not installed, and this part of floragrad needs it: pip install 'floragrad[{name}]'"
        for name in LIBRARIES
    ]


def test_the_options_are_the_accumulators() -> None:
    options = integrations.AccumulationOptions.__annotations__
    defaults = GradientAccumulator.__init__.__kwdefaults__
    # A loop with a norm to log never updates before the norm is known; model, scaler and processes are its own.
    assert set(options) == set(defaults) - {"clip", "scaler", "process_group", "defer_reduction"}
