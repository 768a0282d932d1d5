"""What oscillations add, where one long step joins the next.

A step knows better than the one before where that ended, and begins there
(`solvers/course.py`). When all is done, what was reported of the step before is led
there too, without a change of its mean: as far as a time in the next step was reported,
to know it from.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def no_joint(of_X: PyTree[Array], dtype: Any) -> dict[str, PyTree[Array]]:
    """Of a time: `start` and `end` of its step; by how much the step begins higher than
    the one before had ended, `rise`, if it joins that; and how much of such a rise at
    its own end is to be added at this time, `share`. Between steps, nothing."""
    zero = jnp.zeros((), dtype)
    rise = jax.tree.map(jnp.zeros_like, of_X)
    return dict(start=zero, end=zero, rise=rise, share=zero)


def share_of_rise(x: Float[Array, ""], constant: Any) -> Float[Array, ""]:
    """A function of the share x of a step, of mean zero and 1 at the end: a parabola
    from zero; or where the step was constant, for nothing better was known, a line."""
    return jnp.where(constant, 2 * x - 1, x * (3 * x - 2))


def joined(rows: dict[str, PyTree[Array]]) -> dict[str, PyTree[Array]]:
    """The series with each step led to where the next begins, as far as rows tell."""
    rows = dict(rows)
    joint = rows.pop("joint", None)
    if joint is None:
        return rows
    after = jnp.searchsorted(rows["t"], joint["end"], side="right")
    after = jnp.minimum(after, rows["t"].size - 1)
    # A step that failed, or a row that was not reached, tells nothing.
    known = (joint["start"][after] == joint["end"]) & jnp.isfinite(rows["t"][after])
    known &= jnp.isfinite(rows["mean_loss"][after])
    share = jnp.where(known, joint["share"], 0)
    per_row = lambda x, like: x.reshape(-1, *[1] * (like.ndim - 1))

    # One share for all of a row, which are of one covariance: no variance is negative.
    # One that is zero but for rounding, next to the largest, has no say in it.
    variances = rows["oscillation"]
    rise = jnp.where(known[:, None], joint["rise"]["oscillation"][after], 0)
    down = jnp.maximum(-share[:, None] * rise, 0)
    rounding = jnp.sqrt(jnp.finfo(down.dtype).eps)
    too_much = (down > variances) & (
        down > rounding * jnp.max(variances, axis=1, keepdims=True)
    )
    permitted = jnp.where(too_much, variances / jnp.where(too_much, down, 1), 1)
    share = share * jnp.min(permitted, axis=1)

    def led(x: Float[Array, "T *c"], rise: Float[Array, "T *c"]) -> Array:
        change = per_row(share, x) * rise[after]
        there = per_row(share != 0, x) & jnp.isfinite(change)
        return x + jnp.where(there, change, 0)

    for name, rise in joint["rise"].items():
        rows[name] = jax.tree.map(led, rows[name], rise)
    for name in ("oscillation", "gradient_sq"):
        rows[name] = jnp.maximum(rows[name], 0)
    rows["oscillation"] = -jnp.sort(-rows["oscillation"], axis=1)
    return rows
