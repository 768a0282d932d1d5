"""The end of a long step with the oscillations as they were."""

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from .rkc import polynomial, rkc2
from .term import AbstractStiffComplementarityTerm


class Prediction(eqx.Module):
    """The end y of a step; the rates at its start and, of modes that ring, at its end;
    the number of stages, and whether there can be as many as it takes; and what is
    known of the middle of the step."""

    y: PyTree[Array]
    rate0: PyTree[Array]
    rate1: PyTree[Array]
    stages: Int[Array, ""]
    possible: Bool[Array, ""]
    middle: Any


def slowed_rate(
    term: AbstractStiffComplementarityTerm,
    y: PyTree[Array],
    slope: Any,
    forcing: PyTree[Array],
    stiff: Any,
    dt: Float[Array, ""],
) -> PyTree[Array]:
    """The rate at y, with the fastest modes slowed as a step of dt permits."""
    return term.slowed(y, term.rate(y, slope, forcing, 0 * dt), stiff, dt)


def prediction(
    term: AbstractStiffComplementarityTerm,
    y0: PyTree[Array],
    expansion: Any,
    forcing: PyTree[Array],
    stiff: Any,
    dt: Float[Array, ""],
) -> Prediction:
    """By a Runge-Kutta-Chebyshev step; or as the term itself does, if its modes ring.
    From the expansion at y0 and what is known of the fastest modes."""
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    subtract = lambda a, b: jax.tree.map(jnp.subtract, a, b)
    rate_of = lambda y, slope: slowed_rate(term, y, slope, forcing, stiff, dt)
    rate0 = rate_of(y0, expansion.slope)
    if term.rings:
        y, rate1, stages, middle = term.ring(y0, expansion.slope, forcing, dt)
        return Prediction(y, rate0, rate1, stages, jnp.bool_(True), middle)

    reach = term.reach(y0, rate0, expansion, stiff, dt)
    R, longest = polynomial(reach)
    # Dozens of scalars would cost each stage more than they are worth.
    bare, bare_rate = (replace(x, observables={}) for x in (y0, rate0))
    relaxed = lambda t: term.relaxed(bare, bare_rate, t)

    def rate(at):
        t, y = at
        change, known = relaxed(t)
        y = term.admissible(add(y, change))
        return jnp.ones_like(t), subtract(rate_of(y, term.slope(y)), known)

    zero = jnp.zeros_like(dt)
    at_start = jnp.ones_like(dt), subtract(bare_rate, relaxed(zero)[1])
    change = rkc2(rate, (zero, bare), at_start, dt, R)[1]
    y = term.admissible(add(add(bare, change), relaxed(dt)[0]))
    y = replace(y, observables=y0.observables)
    return Prediction(y, rate0, None, R.stages, reach <= longest, None)
