"""What the integrations load, and what they say where their library is missing."""

import floragrad.torch.integrations as integrations
from floragrad.torch.accumulation import GradientAccumulator
from tests.test_imports import run

LIBRARIES = {"accelerate", "transformers", "lightning"}


def test_torch_alone_loads_none_of_them() -> None:
    code = """
    import sys
    import floragrad.torch.integrations
    print(" ".join({name.partition(".")[0] for name in sys.modules}))
    """
    assert not set(run(code).split()) & LIBRARIES


def test_a_missing_library_is_named_with_its_extra() -> None:
    code = """
    from importlib import import_module

    for name in ("accelerate", "transformers", "lightning"):
        try:
            import_module(f"floragrad.torch.integrations.{name}")
        except ImportError as error:
            print(error)
    """
    assert run(code, blocked=tuple(LIBRARIES)).splitlines() == [
        f"{name} is not installed, and this part of floragrad needs it: pip install 'floragrad[{name}]'"
        for name in ("accelerate", "transformers", "lightning")
    ]


def test_the_options_are_the_accumulators() -> None:
    options = integrations.AccumulationOptions.__annotations__
    defaults = GradientAccumulator.__init__.__kwdefaults__
    # A loop with a norm to log never updates before the norm is known, and has a scaler and processes of its own.
    assert set(options) == set(defaults) - {"clip", "scaler", "process_group"}
