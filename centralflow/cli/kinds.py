"""What the value of an option may be: how it is read, how the help shows it, and what
is said of any other value."""

import math
from collections.abc import Callable, Collection
from enum import StrEnum
from typing import Any

import typer

_Kind = dict[str, Any]  # for `typer.Option`
_LARGEST = 2**31 - 1  # of a seed, or a number of steps


def kind(metavar: str, allowed: str, read: Callable[[str], Any]) -> _Kind:
    """Of the values that `read` does not refuse by a `ValueError`."""

    def parser(given: Any) -> Any:
        text = str(given)  # a default is not text
        try:
            return read(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not {allowed}.") from None

    return dict(parser=parser, metavar=metavar)


def integer(least: int, most: int = _LARGEST) -> _Kind:
    metavar = f"INTEGER>={least}" if most == _LARGEST else f"{least}<=INTEGER<={most}"
    return kind(
        metavar,
        f"an integer from {least} to {most}",
        lambda text: _require(int(text), lambda x: least <= x <= most),
    )


def _number(metavar: str, allowed: str, inside: Callable[[float], bool]) -> _Kind:
    return kind(metavar, allowed, lambda text: _require(float(text), inside))


positive = _number("NUMBER>0", "a positive, finite number", lambda x: 0 < x < math.inf)
not_negative = _number(
    "NUMBER>=0", "a finite number of at least 0", lambda x: 0 <= x < math.inf
)
share = _number("0<=NUMBER<=1", "a number from 0 to 1", lambda x: 0 <= x <= 1)
decay = _number("0<NUMBER<1", "a number above 0 and below 1", lambda x: 0 < x < 1)
ratio = _number(
    "0<=NUMBER<1", "a number of at least 0 and below 1", lambda x: 0 <= x < 1
)


def one_of(names: type[StrEnum]) -> _Kind:
    known = [str(name) for name in names]
    return kind("|".join(known), f"one of {', '.join(known)}", names)


def some_of(known: Collection[str]) -> _Kind:
    """Comma-separated names, each once, in the order of `known`."""

    def read(text):
        names = text.split(",")
        _require(names, lambda x: len(set(x)) == len(x) and set(x) <= set(known))
        return ",".join(name for name in known if name in names)

    allowed = f"one or several of {', '.join(known)}, each once, separated by commas"
    return kind("NAMES", allowed, read)


def integers(least: int) -> _Kind:
    """Comma-separated integers, as text."""
    allowed = f"a list of integers of at least {least}, separated by commas"
    return kind("INTEGERS", allowed, lambda text: _list(text, least, _LARGEST))


def _classes(text: str) -> str:
    if "," not in text:
        return str(_require(int(text), lambda x: 2 <= x <= _LARGEST))
    labels = _list(text, 0, 9)
    _require(labels.split(","), lambda x: len(set(x)) == len(x))
    return labels


classes = kind(
    "INTEGER>=2|LABELS",
    "an integer of at least 2, or a list of different labels from 0 to 9, such as "
    "0,3,5",
    _classes,
)


def _list(text: str, least: int, most: int) -> str:
    numbers = [_require(int(x), lambda x: least <= x <= most) for x in text.split(",")]
    return ",".join(map(str, numbers))


def _require(value: Any, condition: Callable[[Any], bool]) -> Any:
    if not condition(value):
        raise ValueError
    return value
