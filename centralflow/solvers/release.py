"""When in a long step the last oscillation dies."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

# The constraint may hardly answer to the forcing. Then X is gone soon in the step.
_MOST = 10.0


def release(
    without: Float[Array, "k k"],
    usually: Float[Array, "k k"],
    active: Int[Array, ""],
    forcing: PyTree[Array],
    mean: PyTree[Array],
    usual: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Of a step at whose end X is zero: the forcing's mean, over that of a line to zero
    at the end; and the share of the step from which on it is zero.

    `forcing` is that at the start of the step and `mean` that over the step before. In
    units of the latter the forcing begins at a, and a line to zero at the end has the
    mean `usual`. The constraint there is `usually` with that line, and `without` with
    no forcing; on the first `active` rows. In between, its least eigenvalue is taken as
    linear, and is zero with a mean u. The line from a with that mean ends at
    e = 2 u - a. If this is below zero, X follows it down to zero, at a / (a - e) of the
    step, and stays there: its mean is half a times that. But the usual one is always
    enough.
    """
    none, whole = _least(without, active), _least(usually, active)
    rise = whole - none
    helps = rise > 0
    needed = -none / jnp.where(helps, rise, 1)
    needed = jnp.where(helps, needed, jnp.where(none < 0, 1, -_MOST))
    u = usual * jnp.clip(needed, -_MOST, 1)
    a = jnp.maximum(_ratio(forcing, mean), jnp.finfo(usual.dtype).eps)
    e = 2 * u - a
    mean_of_X = jnp.minimum(jnp.where(e < 0, a**2 / (a - e) / 2, u), usual)
    return mean_of_X / usual, jnp.where(e < 0, 2 * mean_of_X / a, 1)


def _least(C: Float[Array, "k k"], active: Int[Array, ""]) -> Float[Array, ""]:
    rows = jnp.arange(C.shape[0]) < active
    others = jnp.diag(jnp.where(rows, 0, jnp.max(jnp.abs(C))))
    return jnp.linalg.eigvalsh(jnp.where(rows[:, None] & rows, C, others))[0]


def _ratio(x: PyTree[Array], y: PyTree[Array]) -> Float[Array, ""]:
    """How large x is along y, over y: the mean over the arrays, which have each its own
    unit, that are not zero."""
    pairs = list(zip(*map(jax.tree.leaves, (x, y)), strict=True))
    products = jnp.stack([jnp.sum(a * b) for a, b in pairs])
    squares = jnp.stack([jnp.sum(b * b) for _, b in pairs])
    there = squares > 0
    ratios = jnp.where(there, products / jnp.where(there, squares, 1), 0)
    return jnp.sum(ratios) / jnp.maximum(jnp.sum(there), 1)
