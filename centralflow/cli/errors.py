"""What goes wrong, in one line on stderr: 2 for wrong arguments, 130 for Ctrl-C, 1 for
the rest."""

import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ..trajectory import NumericalFailure, RunInterrupted

# Click's `UsageError`, wherever this version of Typer has it from.
_UsageError = typer.BadParameter.__base__


class RunFailed(RuntimeError):
    """A process did not reach the end of the run."""


class Group(TyperGroup):
    """A group of commands that reports errors and warnings in one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        try:
            with _short_warnings():
                sys.exit(super().main(*args, standalone_mode=False, **kwargs))
        except _UsageError as error:
            message, code = error.format_message(), 2
        except (ImportError, NumericalFailure, OSError, RunFailed) as error:
            message, code = str(error), 1
        except (typer.Abort, RunInterrupted):
            message, code = "interrupted.", 130  # as of all that Ctrl-C ends
        typer.echo("error: " + " ".join(message.split()), err=True)
        sys.exit(code)


def wrong(name: str, message: str) -> typer.BadParameter:
    """The error that the option (or argument) of this name has a wrong value."""
    hint = name if name.isupper() else flag(name)
    return typer.BadParameter(message, param_hint=f"'{hint}'")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextmanager
def blame(name: str, options: Collection[str] = ()) -> Iterator[None]:
    """Turn what the library says of its arguments into an error of the option that the
    message is about: the first of `options` in it, else the option `name`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
        quoted = re.findall(r"`(\w+)(?:\[\d+\])?`", message)
        name = next((q for q in quoted if q in options), name)
        raise wrong(name, message) from error


@contextmanager
def _short_warnings() -> Iterator[None]:
    def show(message, *args, **kwargs):
        typer.echo("warning: " + " ".join(str(message).split()), err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("error", RunInterrupted)
        yield
