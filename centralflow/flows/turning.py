"""What an oscillation is that turns in a long step, from its mean force.

The constraint determines the mean force of a step. Forces are taken as linear in it,
and D, which turns with the eigenvectors and the weights, by 10 to 30 degrees: a line
between two of them passes within the arc, and an X that is linear too would be too
large, by 4 to 8 % in steps of a cross-entropy. With X and D linear in time, of ends X0,
X1 and D0, D1, the mean of D[X] is

    D0[m/2 - c/12] + D1[m/2 + c/12],     m = (X0 + X1) / 2,     c = X1 - X0,

the chord of an arc, which is longer than its chord is from the centre by 1 + a^2 / 12
for an angle a between D0[m] and D1[m]. Where that is F, and the mean force f, the mean
of X is m times f . F1 / F . F1, with F1 the force at the end, which is the direction
that the constraint there answers to.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..precision import full_precision
from .base import FlowState
from .expansion import Expansion, Forcing

# If less of the mean is in the span of the end, or the number is further from one, the
# oscillation is another one.
_COMMON, _FARTHEST = 0.5, 0.2

_matmul = full_precision(jnp.matmul)


def turned(
    T: Float[Array, "k k"], X: Float[Array, "k k"]
) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """T X T', with the trace of X: X in another frame, of what is common to both; and
    how much that is of the trace."""
    Y = _matmul(_matmul(T, X), T.T)
    trace, whole = jnp.trace(Y), jnp.trace(X)
    share = jnp.where(whole != 0, trace / jnp.where(whole != 0, whole, 1), 0)
    return Y / jnp.where(share != 0, share, 1), share


def mean_multiplier(
    term: Any,
    y: FlowState,
    before: Expansion,
    e: Expansion,
    X: Float[Array, "k k"],
    mean: Float[Array, "k k"],
    rho: Float[Array, ""],
    forcing: Forcing,
    mean_forcing: Forcing,
) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """The mean of X over a step if X is linear: what ends with X and had the `mean` in
    the step before, which was as long as dt (1/rho - 1). And the number it is to be
    multiplied by for the mean force. `before` and `e` are the expansions at the start
    of the step and at its end, `mean` is in the frame of the former, `forcing` that of
    X and `mean_forcing` that over the step."""
    P = term.optimizer.preconditioner(y.optimizer_state)
    k = X.shape[0]
    rows = lambda e: jnp.where(
        (jnp.arange(k) < e.critical)[:, None], e.eigenvectors[:k], 0
    )
    T = _matmul(rows(e) * P, rows(before).T)
    known = (rho > 0) & (jnp.trace(mean) > 0)
    mean, common = turned(T, mean)
    known &= common > _COMMON
    linear = jnp.where(known, (X + rho * mean) / (1 + rho), X)
    if before.forces.shape[0] == 0 or e.forces.shape[0] == 0:
        return linear, jnp.ones_like(rho)

    def unit(force):  # squares of forces may be too small
        size = jnp.max(jnp.abs(force))
        v = force / jnp.where(size > 0, size, 1)
        length = jnp.sqrt(jnp.sum(v * v / P))
        return v / jnp.where(length > 0, length, 1)

    inner = lambda a, b: jnp.sum(a * b / P)
    of = lambda e, X: term.forcing(y, e, X).gradient
    change = 2 * rho * (linear - mean)
    first = of(before, turned(T.T, linear / 2 - change / 12)[0])
    last = of(e, linear / 2 + change / 12)
    angle = jnp.arccos(jnp.clip(inner(unit(first), unit(last)), -1, 1))
    at_end = unit(forcing.gradient)
    along = inner(at_end, (first + last) * (1 + angle**2 / 12))
    number = inner(at_end, mean_forcing.gradient) / jnp.where(along > 0, along, 1)
    known &= (along > 0) & (jnp.abs(number - 1) < _FARTHEST)
    return linear, jnp.where(known, number, 1)


def staying(
    X: Float[Array, "k k"], mean: Float[Array, "k k"], rank: Int[Array, ""]
) -> Float[Array, ""]:
    """The mean over a step of the oscillations along the eigenvectors of X, of that
    rank, over X, at its end."""
    _, Q = jnp.linalg.eigh(X)
    k = X.shape[0]
    Q = jnp.where(jnp.arange(k) >= k - rank, Q, 0)
    trace = jnp.trace(X)
    share = jnp.sum(Q * _matmul(mean, Q)) / jnp.where(trace > 0, trace, 1)
    return jnp.where(trace > 0, share, 0)
