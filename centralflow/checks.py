"""Checks of arguments that many functions share: each an error that names the argument,
and says what it must be."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require_integer(name: str, value: Any, least: int = 1) -> None:
    """Raises `ValueError` unless `value` is an integer of at least `least`."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not integer or value < least:
        what = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"`{name}` must be {what}, got {value!r}.")


def require_positive(
    name: str, value: Any, below: float | int, *, or_zero: bool = False
) -> None:
    """Raises `ValueError` unless `value` is a number in (0, `below`), or zero if it may
    be."""
    try:
        inside = bool(0 < value < below) or (or_zero and bool(value == 0))
    except (TypeError, ValueError):  # neither text nor several numbers have an order
        inside = False
    if not inside or isinstance(value, bool):
        least = "at least" if or_zero else "above"
        raise ValueError(
            f"`{name}` must be a number {least} 0 and below {below:g}, got {value!r}."
        )


def require_key(key: Any) -> None:
    """Raises `ValueError` unless `key` is one key of JAX."""
    typed = isinstance(key, jax.Array) and (
        (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0)
        or (key.dtype == jnp.uint32 and key.ndim == 1)
    )
    if not typed:
        raise ValueError(
            f"`key` must be one key such as `jax.random.key(0)`, got {key!r}."
        )


def as_path(path: Any) -> Path:
    """`path` as a `Path`, once it is one."""
    try:
        return Path(path)
    except TypeError as error:
        raise ValueError(f"`path` must be a path, got {path!r}.") from error
