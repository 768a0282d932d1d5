"""Long steps of a stiff differential equation with a complementarity constraint."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from .moreau import multiplier
from .rkc import polynomial, rkc2
from .term import AbstractStiffComplementarityTerm, Step

# In units of time, those of the fastest modes. A violation of the constraint that is
# not of the step's own making, but left over or of a row that was not seen before,
# cannot be led back at once: it would take an X that grows as dt falls. And at the
# start of a run it may be large, and is led back slowly.
_RELAXATION = 0.25
_RELAXATION_AT_START = 5.0


class _State(eqx.Module):
    expansion: Any
    before: Any  # the expansion one step earlier
    y_before: Any  # and the state
    forcing: PyTree[Array]
    dt: Float[Array, ""]  # of the last step; zero if there was none
    excess: Float[Array, ""]
    oscillating: PyTree[Array]  # the observables of X, as means over the last step


class ProjectedRKC(diffrax.AbstractSolver):
    """Predict with the oscillations as they were, look, and correct.

    A step of a length dt that may be long next to the time of the fastest modes is

    1. a Runge-Kutta-Chebyshev step of y' = f(y, F), F the forcing of the step before;
    2. the expansion at its end: the constraint C, which of its rows may be tight, Phi;
    3. the multiplier X: with R the response of the end to a change of the forcing,

            0 <= X  perpendicular to  C + C' R[Phi[X] - F] >= 0,

        a semidefinite complementarity problem;

    4. the corrected end y + R[Phi[X] - F], the constraint there, and Phi[X] for the
        next step.

    X is the mean of the multiplier over the step, so of second order at its middle; the
    end of the step is of second order too. What the linearization leaves of the
    constraint is of second order in the *correction*, not in the step, and which rows
    become tight need not be foreseen: the prediction shows it.

    How long the steps can be is decided by R. A mode of rate lambda answers with
    dt phi_1(-dt lambda), phi_1(z) = (e^z - 1)/z, or rather with what the Runge-Kutta
    step makes of it. Were it taken to be dt for all modes, then each change of X would
    throw the stiff ones off by a factor dt lambda, and X would lag behind what the
    constraint asks for; were it that of the mean rate, X would overshoot from step to
    step.

    The observables of y have `smooth` and `oscillating` parts. The latter, of X, are
    means over steps; within one they are taken as linear, with the slope between the
    middles of the last two, or, where the first row becomes tight, as a jump. `error`,
    `approach` and `work` of a step travel in its error estimate, where a step-size
    controller sees them, of rejected steps too.

    A step whose end is not finite, or not right in any digit, has an infinite error. If
    it is accepted for being the shortest that a controller permits, the integration
    ends where it began.
    """

    interpolation_cls: Callable = eqx.field(static=True)
    term_structure: ClassVar = AbstractStiffComplementarityTerm
    state_type: ClassVar = _State

    def order(self, terms):
        return 2

    def error_order(self, terms):
        # Relative to the length of the step, y's is 2, and that of the square of a
        # violation of the constraint is 4.
        return 3

    def start(self, term, y0, previous: _State | None) -> tuple[Any, _State]:
        """y0 with its observables, and the solver state there; `previous` is that at
        the end of an earlier part, or None."""
        known = None if previous is None else previous.expansion
        e = first = term.expand_ahead(y0, known, known, jnp.zeros(()))
        C = term.constraint(e)
        X = jnp.zeros_like(C)
        e = term.complete(y0, e, X, 1, jnp.bool_(True))
        if previous is None:
            forcing = term.forcing(y0, first, X)
            excess = jnp.maximum(jnp.max(-jnp.diag(C)), 0)
        else:
            forcing, excess = previous.forcing, previous.excess
        y0 = term.record(y0, e, X)
        oscillating = y0.observables["oscillating"]
        dt = jnp.zeros_like(excess)
        return y0, _State(e, e, y0, forcing, dt, excess, oscillating)

    def init(self, terms, t0, t1, y0, args) -> _State:
        return self.start(terms.term, y0, None)[1]

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del args, made_jump
        term, dt, s = terms.term, t1 - t0, solver_state
        tree_map = jax.tree.map
        add = lambda a, b: tree_map(jnp.add, a, b)
        subtract = lambda a, b: tree_map(jnp.subtract, a, b)

        # 1. The prediction.
        rate0 = term.rate(y0, s.expansion.slope, s.forcing)
        reach = term.reach(y0, rate0, s.expansion, dt)
        R, longest = polynomial(reach)
        rate = lambda y: term.rate(y, term.slope(y), s.forcing)
        predicted = add(y0, rkc2(rate, y0, rate0, dt, R))

        # 2. What is there.
        ratio = jnp.where(s.dt > 0, dt / jnp.where(s.dt > 0, s.dt, 1), 0)
        e = term.expand_ahead(predicted, s.expansion, s.before, ratio)
        respond, e = term.responder(predicted, e, dt, R)
        C = term.constraint(e)
        excess = s.excess * jnp.exp(-dt / _RELAXATION_AT_START)
        beyond = jnp.maximum(jnp.max(-jnp.diag(C)) - excess, 0)
        slack = excess + beyond * jnp.exp(-dt / _RELAXATION)
        slack = slack * jnp.eye(C.shape[0], dtype=C.dtype)

        # 3. The multiplier.
        def correction(X):
            forcing = term.forcing(predicted, e, X)
            return respond(subtract(forcing, s.forcing))

        end = lambda X: C + term.constraint_rate(predicted, e, correction(X))
        solution = multiplier(lambda X: end(X) + slack, term.active(e), C)
        X = solution.X

        # 4. The correction.
        change, forcing = correction(X), term.forcing(predicted, e, X)
        y1 = add(predicted, change)
        e1 = term.complete(y1, e, X, R.stages, solution.converged)
        y1 = term.record(y1, e1, X)

        # The embedded error estimate of the Runge-Kutta step, with the new forcing.
        rate0 = term.rate(y0, s.expansion.slope, forcing)
        rate1 = term.rate(y1, e1.slope, forcing)
        defect = tree_map(
            lambda a, b, r0, r1: 0.8 * (a - b) + 0.4 * dt * (r0 + r1),
            y0, y1, rate0, rate1,
        )  # fmt: skip
        defect, e1 = term.damped(y1, e1, defect, dt)
        y1 = eqx.tree_at(lambda y: y.observables["work"], y1, e1.work)
        step = Step(
            dt,
            y0,
            y1,
            rate0,
            rate1,
            s.expansion,
            e,
            e1,
            end(X),
            defect,
            change,
            excess,
        )
        error = term.relative_error(step)
        good = term.is_finite(y1, e1) & (error < 1) & (reach <= longest)
        error = jnp.where(good, error, jnp.inf)

        # The observables of X, linear in the step and of one sign; or zero up to the
        # onset and constant thereafter.
        onset = term.onset(s.expansion, e)
        mean = tree_map(lambda x: x / (1 - onset), y1.observables["oscillating"])
        share = jnp.where((s.dt > 0) & (onset == 0), dt / (dt + s.dt), 0)
        half = lambda new, old: jnp.clip(
            share * (new - old), -jnp.abs(new), jnp.abs(new)
        )
        halves = tree_map(half, mean, s.oscillating)
        oscillating = lambda y, value: eqx.tree_at(
            lambda y: y.observables["oscillating"], y, value
        )
        start = oscillating(y0, subtract(mean, halves))
        y1 = oscillating(y1, add(mean, halves))
        y_error = eqx.tree_at(
            lambda y: [y.observables[k] for k in ("error", "approach", "work")],
            tree_map(jnp.zeros_like, y1),
            [error, term.approach(step), y1.observables["work"]],
        )
        info = dict(
            y0=start,
            y1=y1,
            rate0=rate0,
            rate1=rate1,
            before=s.y_before,
            ratio=s.dt / dt,
            onset=onset,
        )
        state = _State(e1, s.expansion, y0, forcing, dt, excess, mean)

        keep = lambda new, old: jnp.where(good, new, old)
        y1, state = tree_map(keep, (y1, state), (y0, s))
        result = diffrax.RESULTS.where(
            good, diffrax.RESULTS.successful, diffrax.RESULTS.nonfinite
        )
        return y1, y_error, info, state, result

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)
