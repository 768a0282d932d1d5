"""Full precision for the package's own matrix products."""

import functools
from collections.abc import Callable

import jax


def full_precision(fn: Callable) -> Callable:
    """`fn` with its float32 matrix products in float32. On GPUs the default is TF32,
    with an epsilon of 1e-3. Not for functions that call the user's loss, whose
    precision is the user's to choose."""

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return fn(*args, **kwargs)

    return wrapped
