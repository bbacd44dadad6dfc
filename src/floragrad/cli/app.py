"""The typer application that the commands register with."""

import typer

from floragrad._version import __version__

app = typer.Typer(
    help="Train language models with an optimizer whose memory grows sublinearly with the model.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"floragrad {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _floragrad(
    context: typer.Context,
    _version: bool = typer.Option(False, "--version", callback=_say_version, is_eager=True, help="Say the version."),
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
