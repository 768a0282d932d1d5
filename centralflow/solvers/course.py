"""What the multiplier X adds to observables, in the course of a step.

The constraint determines the mean over a step better than the end, which is
extrapolated from the means over this step and the one before. Where X goes on smoothly,
the mean over the next step tells what the end was: what is linear in time between the
middles of two steps, of means m0 and m1, is

    (m0 dt1 + m1 dt0) / (dt0 + dt1)

where they join. There the next step begins; and `flows/joints.py` leads there what is
reported of the step before.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..failures import choose


class Piece(eqx.Module):
    """Of a step, the part since X jumped: its mean and length."""

    mean: PyTree[Array]
    length: Float[Array, ""]

    def joint(self, after: "Piece") -> PyTree[Array]:
        """Where this piece joins the next."""
        share = self.length / (self.length + after.length)
        return jax.tree.map(lambda a, b: a + share * (b - a), self.mean, after.mean)


class Course(eqx.Module):
    """Up to the share `onset` of a step X is as it was; where a row becomes tight then,
    it is `constant` after that, for nothing better is known. Where X is zero at the end
    it falls from the `first` value to that at the share `until`. Elsewhere it is a
    parabola from the `first` to the `last` value, whose mean exceeds theirs by the
    `bulge`. Where it joins the step before, it begins by `rise` higher than that had
    ended; were it to begin there, the bulge would be the `extrapolated` one. `piece`
    goes on into the next step."""

    first: PyTree[Array]
    last: PyTree[Array]
    rise: PyTree[Array]
    bulge: PyTree[Array]
    extrapolated: PyTree[Array]
    constant: Bool[Array, ""]
    piece: Piece


def course(
    earlier: PyTree[Array],
    end: PyTree[Array],
    mean: PyTree[Array],
    before: PyTree[Array],
    piece: Piece,
    dt: Float[Array, ""],
    onset: Float[Array, ""],
    until: Float[Array, ""],
    unknown: Bool[Array, ""],
    linear: Bool[Array, ""],
    smooth: Bool[Array, ""],
) -> Course:
    """From X at the end of the step before, `earlier`, and extrapolated to the `end` of
    this one; its `mean` over this step and that `before`, and the `piece` of the
    latter; and whether X at the start is `unknown`, was taken as `linear` in time, and
    is `smooth`, the same rows being tight."""
    subtract = lambda a, b: jax.tree.map(jnp.subtract, a, b)
    after = lambda mean, before: (mean - onset * before) / (1 - onset)
    last = choose(onset > 0, jax.tree.map(after, mean, earlier), end)
    constant = unknown | (onset > 0)
    start = choose(constant, last, earlier)
    curved = linear & (onset == 0) & (until == 1)
    extrapolated = jax.tree.map(
        lambda a, b, m, m0: jnp.where(curved & jnp.isfinite(m0), m - (a + b) / 2, 0),
        start, last, mean, before,
    )  # fmt: skip

    new = choose(onset > 0, Piece(last, (1 - onset) * dt), Piece(mean, dt))
    first = choose(curved & smooth, piece.joint(new), start)
    rise = subtract(first, start)
    bulge = jax.tree.map(lambda b, r: b - r / 2, extrapolated, rise)
    return Course(first, last, rise, bulge, extrapolated, constant, new)
