"""The commands, together."""

from typing import Annotated

import typer

from ..files import package_version
from .demo import demo
from .errors import Group
from .run import run
from .show import compare, plot

app = typer.Typer(
    cls=Group,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (demo, run, plot, compare):
    # All of the sentence, which would else be cut to the width of the screen.
    app.command(short_help=command.__doc__.splitlines()[0])(command)


def main() -> None:
    """The entry point of the command `centralflow`."""
    app(prog_name="centralflow")


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"centralflow {package_version()}")
        raise typer.Exit
    return wanted


@app.callback()
def _centralflow(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Predict full-batch training at the edge of stability by its central flow."""
