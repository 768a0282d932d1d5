"""What goes wrong, in one line on stderr: 2 for wrong arguments, 130 for Ctrl-C, 1 for
the rest."""

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ..trajectory import NumericalFailure, RunInterrupted

# What messages for users of Python say, and what those of the command can do.
_WORDS = {
    "Make a few steps with `warm = train(...)` and predict from `warm.model` and "
    "`warm.optimizer_state`": "Take another --warm-start",
    "`in_shape`": "the images",
    "in_shape=": "images of ",
    "`CentralFlow`": "the central flow",
}
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
def blame(name: str, options: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Turn what the library says of its arguments into an error of the option that the
    message is about: the first of `options` in it, else the option `name`."""
    values = options or {}
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        quoted = re.findall(r"`(\w+)(?:\[\d+\])?`", str(error))
        name = next((q for q in quoted if q in values), name)
        message = _as_typed(str(error), values)
        if str(values.get(name, "")) not in message:
            message = f"{values[name]}: {message}"
        raise wrong(name, message) from error


def _as_typed(message: str, options: Mapping[str, Any]) -> str:
    """The library's message, with its names as users of the command know them."""

    def typed(match):
        name = match[1] or match[2]
        if name not in options:
            return match[0]
        return flag(name) + (" " if match[2] else "")

    message = re.sub(r"`(\w+)(?:\[\d+\])?`|\b(\w+)(?:\[\d+\])?=", typed, message)
    return _in_words(message)


def _in_words(message: str) -> str:
    for ours, theirs in _WORDS.items():
        message = message.replace(ours, theirs)
    return re.sub(r"`(\w+)`", r"\1", message)


@contextmanager
def _short_warnings() -> Iterator[None]:
    def show(message, *args, **kwargs):
        text = _in_words(" ".join(str(message).split()))
        typer.echo(f"warning: {text}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.simplefilter("error", RunInterrupted)
        yield
