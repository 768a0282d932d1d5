"""How wrong a long step is, and how near the next eigenvalue is to the edge."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..precision import full_precision
from ..solvers import Step
from .expansion import Slope

# Of a violation found within so many optimizer steps, little is the step's own making.
_OWN = 0.25
# The share of its speed at which an eigenvalue that has just come to the edge goes on.
_HELD_BACK = 0.5


@full_precision
def errors(term: Any, step: Step, noise: Slope) -> dict[str, Float[Array, ""]]:
    """The errors of a long step of the central flow: all relative, and weighted such
    that each, kept at 1e-2, leaves an error of the order of 1e-2 in the loss, or less.

    - `path`: the defect of the Runge-Kutta step, over the length of the path, in the
        norm of P. Ten times that before the edge, while the loss falls ever faster, as
        it does when a plateau is left: how late it is will matter more than it does
        now.
    - `loss`: ten times what the defect means for the loss, over the loss, unless that
        is exactly zero. Where the loss falls exponentially, nothing draws back what is
        ahead or late, and the errors of all steps add up.
    - `correction`: what the correction means for the loss, over the mean loss. (In a
        flow that comes to rest at the edge, the loss itself falls twice as fast as what
        X adds to it, and is soon a small part.)
    - `jump`: the correction over the length of the path.
    - `violation`: what the correction had to do for the constraint.
    - `remainder`: what it left to do, and by how much the sharpness exceeds that of the
        critical eigenvectors, which have turned.
    - `oscillation`: how far what X adds to the mean loss is from linear in time, over
        the mean loss. Its values at the ends of steps are extrapolated, and are off by
        about that; one at the start by what was to be expected of the step before.
        Where X is most of the loss, five times as much is permitted: more than the
        eigenvectors' noise in X. (`jump` and this count less where it is noise alone.)
    - `between`: of modes that ring, how far the loss at the middle of the step is from
        the cubic through its ends.
    - `P`: how far the step sizes 1/P are from linear in time; a schedule of the
        learning rate may do anything.
    """
    e0, e, kappa = step.expansion0, step.expansion1, term.optimizer.critical_sharpness
    P = term.optimizer.preconditioner(step.y1.optimizer_state)
    norm = lambda v: jnp.sqrt(jnp.sum(P * v * v))
    tiny = jnp.finfo(step.dt.dtype).tiny
    distance = term.distance(step.y0, step.y1)
    size = lambda e: jnp.abs(e.slope.loss) + tiny
    loss = jnp.maximum(size(e0), size(e)) + noise.loss
    # Where the flow comes to rest, a distance d matters for its kappa d^2 / 2 of loss.
    # (That of a loss of exactly zero would be flushed to zero, and the errors be 0/0.)
    rest = 0.1 * jnp.sqrt(term.rtol * loss / kappa) + tiny
    gradient = (e0.slope.gradient + e.slope.gradient) / 2
    correction, defect = step.correction.weights, step.defect.weights
    # What rounding makes of the defect, of the weights and of the rates, says nothing.
    # (Several rates enter it, and the noise is that of one sample: 4 times.)
    rounding = jnp.finfo(defect.dtype).eps * norm(step.y1.weights)
    rounding += 4 * step.dt * norm(noise.gradient / P)
    defect *= jnp.maximum(1 - rounding / (norm(defect) + tiny), 0)
    of_loss = lambda e, rate: e.slope.gradient @ rate.weights
    fall = lambda e, rate: jnp.abs(of_loss(e, rate)) / size(e)
    faster = fall(e, step.rate1) > fall(e0, step.rate0)
    before_the_edge = (e0.held == 0) & (e.held == 0)

    rows = jnp.arange(e.sharpness.size) < e.critical
    before, predicted, after = (
        term.constraint(x) for x in (step.expansion0, step.predicted, step.expansion1)
    )
    # Rows that the correction moves below the margin are of no concern.
    first, last = jnp.diag(predicted), jnp.diag(step.linearized)
    far = jnp.maximum(jnp.minimum(first, last) - term.margin * kappa, 0)
    moved = jnp.where(rows, jnp.maximum(jnp.abs(last - first) - far, 0), 0)
    beyond = jnp.max(-jnp.diag(predicted)) - step.excess
    left = jnp.maximum(jnp.max(-jnp.diag(before)), 0)
    violation = jnp.maximum(jnp.max(moved), beyond) - left
    violation = step.dt / (step.dt + _OWN) * jnp.maximum(violation, 0)
    both = rows[:, None] & rows
    remainder = jnp.max(jnp.where(both, jnp.abs(after - step.linearized), 0))
    remainder = jnp.maximum(remainder, e.excess)
    # In steps of a few units a change of X is answered to exactly.
    long = step.dt / (step.dt + 5)
    jump = norm(correction) / (distance + rest) * long
    # An X that moves with less of a change of the constraint is eigenvectors' noise.
    eps = jnp.finfo(step.dt.dtype).eps
    noise_of = lambda share: (share * term.rtol + 4 * eps) * kappa
    beyond_noise = lambda change, share: change / (change + noise_of(share))
    change = jnp.max(moved)
    # What did change may be nothing, by chance. To the bulge the constraint answers
    # with what it would lose with X, times the share of X that the bulge is.
    of_X = step.y1.observables["oscillating"]["loss"]
    bulge = jnp.abs(step.bulge["loss"])
    answer = step.relief * bulge / jnp.where(of_X > 0, of_X, jnp.inf)
    answer = jnp.clip(answer, change, kappa)
    bulge = jnp.minimum(bulge / (loss + 5 * of_X), 1 / eps)
    between = jnp.zeros_like(jump)
    if term.rings:
        cubic = (e0.slope.loss + e.slope.loss) / 2
        cubic += step.dt / 8 * (of_loss(e0, step.rate0) - of_loss(e, step.rate1))
        between = jnp.abs(step.middle - cubic) / loss
    return dict(
        path=jnp.where(before_the_edge & faster, 0.5, 0.05)
        * norm(defect)
        / (distance + rest),
        loss=jnp.where(loss > 9 * tiny, 10 * jnp.abs(gradient @ defect) / loss, 0),
        correction=jnp.abs(gradient @ correction) / (loss + of_X),
        jump=0.1 * jump * beyond_noise(change, 0.1),
        violation=_root(violation / kappa) ** 2,
        remainder=remainder / kappa,
        oscillation=2 * bulge * long * beyond_noise(answer, 5e-4),
        between=between,
        P=0.1 * _variation_of_step_size(term.optimizer, step),
    )


def approach(term: Any, step: Step) -> Float[Array, "2 k"]:
    """How far the eigenvalues are below the edge, and the speeds at which they came
    nearer in the prediction, in units in which a violation is the root of its error.
    The mean speeds; but while nothing is held, where one has grown since the last step,
    that at the end of this one, if it went on growing. What has come to the edge will
    be held back, by an X of which as much is known."""
    kappa = term.optimizer.critical_sharpness
    e0, e = step.expansion0, step.expansion1
    earlier, before, predicted, after = (
        jnp.where(jnp.arange(e.sharpness.size) < e.known, e.sharpness, -jnp.inf)
        for e in (step.before, e0, step.predicted, e)
    )
    both = jnp.isfinite(before) & jnp.isfinite(predicted)
    speed = jnp.where(both, predicted - before, 0) / step.dt
    none_held = (step.before.held == 0) & (e0.held == 0) & (e.held == 0)
    all_three = none_held & both & jnp.isfinite(earlier)
    last = jnp.where(all_three, before - earlier, 0) * step.ratio / step.dt
    last = jnp.maximum(last, 0)
    gain = jnp.where(all_three, jnp.maximum(speed - last, 0), 0)
    speed = jnp.maximum(speed + gain * step.ratio / (1 + step.ratio), 0)
    begun = (e0.held == 0) & (jnp.arange(e.sharpness.size) < e.held)
    begun &= before < kappa
    speed = jnp.where(begun, _HELD_BACK * speed, speed)
    left = jnp.where(both, jnp.maximum(kappa + step.excess - after, 0), 0)
    return _root(jnp.stack([left, speed]) / kappa)


def _root(violation: Array) -> Array:
    # Correcting the sharpness by 2 % is an error of 1 %; what the linearization leaves
    # is of second order.
    return 5 * violation


def _variation_of_step_size(optimizer: Any, step: Step) -> Float[Array, ""]:
    """How far 1/P is from linear between the ends of a step, over its size there."""
    s0, s1 = step.y0.optimizer_state, step.y1.optimizer_state

    def at(share):
        state = jax.tree.map(lambda a, b: a + share * (b - a), s0, s1)
        return 1 / optimizer.preconditioner(state)

    first, last = at(0.0), at(1.0)
    size = jnp.maximum(jnp.abs(first), jnp.abs(last))

    def deviation(share):
        linear = first + share * (last - first)
        return jnp.sqrt(jnp.mean(((at(share) - linear) / size) ** 2))

    return jnp.max(jax.lax.map(deviation, jnp.linspace(0, 1, 17, dtype=step.dt.dtype)))
