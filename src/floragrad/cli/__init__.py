"""The ``floragrad`` command: parse, call, and turn expected errors into one line."""

import sys
from collections.abc import Sequence
from importlib import import_module

from floragrad._extras import require
from floragrad._version import __version__

COMMANDS = ("train", "compare", "plan")
FAILURE = 1
USAGE_ERROR = 2
INTERRUPTED = 130
NOTHING_SAVED = "stopped before there was anything to save"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code.

    0: done. 1: the training diverged, or nothing fits the device of ``plan --fits``. 2: the request cannot be met,
    said in one line. 130: stopped by Ctrl-C (143: by SIGTERM); a run that can be continued is saved.

    Args:
        arguments: Words after ``floragrad``; None reads ``sys.argv``.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        # Answered without what the commands need.
        print(f"floragrad {__version__}")
        return 0
    try:
        try:
            require("typer", "train")
        except ImportError as error:
            return _fail(str(error), USAGE_ERROR)
        return _run(given)
    except KeyboardInterrupt:
        # While the libraries are imported, there is no run yet.
        return _fail(NOTHING_SAVED, INTERRUPTED)


def _run(arguments: list[str]) -> int:
    import typer

    from floragrad.cli.app import app
    from floragrad.cli.errors import DivergenceError, LostError, StoppedError, StorageError, UserError

    for name in COMMANDS:  # each registers itself
        import_module(f"floragrad.cli.{name}.command")

    try:
        result = app(arguments, prog_name="floragrad", standalone_mode=False)
    except StorageError as error:
        return _say(str(error), USAGE_ERROR)
    except UserError as error:
        return _fail(str(error), USAGE_ERROR)
    except DivergenceError as error:
        return _fail(str(error), FAILURE)
    except StoppedError as error:
        return _fail(str(error), error.exit_code)
    except LostError as error:
        return _say(str(error), FAILURE)
    except (typer.Abort, KeyboardInterrupt) as error:
        if isinstance(error.__cause__, EOFError):  # typer takes a file that ends early for the user's Ctrl-D
            raise error.__cause__ from None
        return _fail(NOTHING_SAVED, INTERRUPTED)
    except _option_error() as error:
        return _fail(f"{error.format_message()}: see floragrad --help", USAGE_ERROR)  # type: ignore[attr-defined]
    # Newer versions of typer turn Ctrl-C into an exit code of their own.
    if result == INTERRUPTED:
        return _fail(NOTHING_SAVED, INTERRUPTED)
    return result if isinstance(result, int) else 0


def _option_error() -> type[Exception]:
    """Return the base of all errors in options: click's, which newer versions of typer carry in themselves."""
    import typer

    return next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")


def _fail(message: str, exit_code: int) -> int:
    """Print a message that all processes know, once."""
    from floragrad.cli.machine import is_spokesman

    return _say(message, exit_code) if is_spokesman() else exit_code


def _say(message: str, exit_code: int) -> int:
    print("floragrad:", " ".join(message.split()), file=sys.stderr)
    return exit_code
