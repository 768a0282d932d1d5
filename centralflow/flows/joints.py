"""What oscillations add, where one long step joins the next.

At the end of a step it is extrapolated, from the means over this step and the one
before. Where it goes on smoothly, the mean over the next step tells what it was: what
is linear in time between the middles of two steps has the means m0 and m1 over them,
and is

    (m0 dt1 + m1 dt0) / (dt0 + dt1)

where they join. There the next step begins; and of the step before, what was reported
is led there, as soon as it is known, without a change of the mean.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def no_joint(of_X: PyTree[Array], dtype: Any) -> dict[str, PyTree[Array]]:
    """Of a time: `start` and `end` of its step, by how much the step begins higher than
    the one before had ended, `rise`, and how much of such a rise at its own end is to
    be added at this time, `share`. Here, nothing."""
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
    share = jnp.where(joint["start"][after] == joint["end"], joint["share"], 0)

    def added(rise: Float[Array, "T *c"]) -> Float[Array, "T *c"]:
        return share.reshape(-1, *[1] * (rise.ndim - 1)) * rise[after]

    rise = jax.tree.map(added, joint["rise"])
    # One share for all of a row, which are of one covariance: no variance is negative.
    down = jnp.maximum(-rise["oscillation"], 0)
    least = rows["oscillation"] / jnp.where(down > 0, down, 1)
    permitted = jnp.min(jnp.where(down > 0, jnp.minimum(least, 1), 1), axis=1)
    for name, change in rise.items():
        rows[name] = jax.tree.map(
            lambda x, d: x + permitted.reshape(-1, *[1] * (d.ndim - 1)) * d,
            rows[name],
            change,
        )
    for name in ("oscillation", "gradient_sq"):  # but for rounding
        rows[name] = jnp.maximum(rows[name], 0)
    rows["oscillation"] = -jnp.sort(-rows["oscillation"], axis=1)
    return rows
