"""A check of arguments that several data sets share."""

import numpy as np


def require_integer(name: str, value: object, least: int = 1) -> None:
    """Raises `ValueError` unless `value` is an integer of at least `least`."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}, got {value!r}."
        )
