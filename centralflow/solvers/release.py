"""When in a long step the last oscillation dies."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree


def release(
    end: Callable[[Float[Array, ""]], Float[Array, "k k"]],
    active: Int[Array, ""],
    forcing: PyTree[Array],
    mean: PyTree[Array],
    usual: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of a step at whose end X is zero: the forcing's mean, over that of a line to zero
    at the end; and the share of the step from which on it is zero.

    `forcing` is that at the start of the step and `mean` that over the step before.
    In units of the latter, the forcing begins at a; the line to zero has the `usual`
    mean; and a forcing of mean u would just hold the constraint up to the end, which is
    `end(share)` for a share of the line's, on the first `active` rows. The line from a
    with the mean u ends at e = 2 u - a. If that is below zero, X follows it down to
    zero, at a / (a - e) of the step, and stays there: its mean is half a times that.
    """
    none, whole = (_least(end(share), active) for share in (0.0, 1.0))
    rise = whole - none
    # The least eigenvalue is concave in the share: no less than on this line.
    needed = jnp.where(rise > 0, -none / jnp.where(rise > 0, rise, 1), none < 0)
    u = usual * jnp.minimum(needed, 1)
    precision = jnp.finfo(usual.dtype)
    a = _inner(forcing, mean) / (_inner(mean, mean) + precision.tiny)
    a = jnp.maximum(a, precision.eps)
    e = 2 * u - a
    mean_of_X = jnp.minimum(jnp.where(e < 0, a**2 / (a - e) / 2, u), usual)
    return mean_of_X / usual, jnp.where(e < 0, 2 * mean_of_X / a, 1)


def _least(C: Float[Array, "k k"], active: Int[Array, ""]) -> Float[Array, ""]:
    rows = jnp.arange(C.shape[0]) < active
    others = jnp.diag(jnp.where(rows, 0, jnp.max(jnp.abs(C))))
    return jnp.linalg.eigvalsh(jnp.where(rows[:, None] & rows, C, others))[0]


def _inner(x: PyTree[Array], y: PyTree[Array]) -> Float[Array, ""]:
    return sum(map(jnp.vdot, jax.tree.leaves(x), jax.tree.leaves(y)))
