"""Long steps of a stiff differential equation with a complementarity constraint."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..failures import Failure, choose, first_of, when
from ..results import RESULTS
from .caution import next_caution
from .course import Piece, course
from .moreau import multiplier, settle, unheld_for
from .prediction import prediction, slowed_rate
from .release import release
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
    # Means over the last step, since X began, of the rows that are still tight: of the
    # forcing, X, and the observables of X.
    mean_forcing: PyTree[Array]
    mean_X: Float[Array, "k k"]
    mean_of_X: PyTree[Array]
    number: Float[Array, ""]  # by which the latter were multiplied
    forcing: PyTree[Array]  # at the end of the last step
    piece: Piece  # of these, what goes on into the next step
    stiff: Any
    dt: Float[Array, ""]  # of the last step; zero if there was none
    memory: Float[Array, ""]  # the time of which the means are; zero if of no use
    smooth: Bool[Array, ""]  # whether the same rows were tight in all of the last step
    excess: Float[Array, ""]
    # How far X kept the constraint up in the last step; infinite if not known.
    relief: Float[Array, ""]
    # By how much the last correction moved the constraint, in the rows of `expansion`.
    moved: Float[Array, "k k"]
    caution: Float[Array, ""]  # with which a response is estimated
    unheld: Float[Array, ""]  # for how long X has not held the constraint
    failure: Failure


class ProjectedRKC(diffrax.AbstractSolver):
    """Predict with the oscillations as they were, look, and correct.

    A step of a length dt that may be long next to the time of the fastest modes is

    1. a Runge-Kutta-Chebyshev step of y' = f(y, F), F the forcing at its start, with
       the fastest modes slowed down as far as they stay in equilibrium;
    2. the expansion at its end: the constraint C, which of its rows may be tight, Phi;
    3. the multiplier X at the end. The forcing F(t) is taken as linear, with the end
       Phi[X] and the slope between the means of this step and the last; or, where the
       first row has just become tight, as constant, from then on. With R the response
       of the end to a change of the forcing,

            0 <= X  perpendicular to  C + C' R[F(t) - F] >= 0,

        a semidefinite complementarity problem. Phi may be that of an earlier step, as
        far as it is made exact for the X that comes out;

    4. the corrected end y + R[F(t) - F], the constraint there, and the forcing.

    Both y and X are of second order. (Linear from its *end* in the last step, the
    forcing would be that of the trapezoidal rule: of second order too, but the part
    that acts on slow modes would change its sign from step to step, undamped.) What the
    linearization leaves of the constraint is of second order in the *correction*, not
    in the step, and which rows become tight need not be foreseen: the prediction shows
    it.

    How long the steps can be is decided by R. A mode of rate lambda answers to a
    constant change with dt phi_1(-dt lambda), phi_1(z) = (e^z - 1)/z. Were that taken
    to be dt for all modes, then each change of X would throw the stiff ones off by a
    factor dt lambda, and X would lag behind what the constraint asks for; were it that
    of the mean rate, X would overshoot from step to step.

    The observables of y have `smooth` and `oscillating` parts. The latter, of X, are
    parabolas in a step, with the mean that the mean forcing tells of; or, where another
    row becomes tight, jump; if it is the first, y goes as predicted up to then. If
    nothing is held at the end of the step, the forcing ends before it (`release`).
    `error`, `approach` and `work` of a step travel in its error estimate, where a
    step-size controller sees them, of rejected steps too.

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
        relief = jnp.asarray(jnp.inf) if previous is None else previous.relief
        e = first = term.expand_ahead(y0, known, known, jnp.zeros(()), relief)
        C = term.constraint(e)
        X = jnp.zeros_like(C)
        e, _ = term.complete(y0, e, X, 1, jnp.bool_(True))
        if previous is None:
            zero = lambda x: jnp.zeros(x.shape, x.dtype)
            like = jax.eval_shape(lambda: term.forcing(y0, first, X))
            mean = forcing = jax.tree.map(zero, like)  # X is
            excess = jnp.maximum(jnp.max(-jnp.diag(C)), 0)
        else:
            mean, forcing = previous.mean_forcing, previous.forcing
            excess = previous.excess
        y0 = term.record(y0, e, X)
        stiff = term.no_stiff_modes(y0) if previous is None else previous.stiff
        dt = jnp.zeros_like(excess)
        failure = term.failure(y0, e)
        y0 = choose(failure.failed, term.without_oscillations(y0), y0)
        unknown = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), _of_X(y0))
        return y0, _State(
            e,
            term.remembered(e),
            y0,
            mean,
            X,
            unknown,
            jnp.ones_like(dt),
            forcing,
            Piece(unknown, dt),
            stiff,
            dt=dt,
            memory=dt,
            smooth=jnp.bool_(False),
            excess=excess,
            relief=relief.astype(dt.dtype),
            moved=X,
            caution=dt if previous is None else previous.caution,
            unheld=dt if previous is None else previous.unheld,
            failure=failure,
        )

    def init(self, terms, t0, t1, y0, args) -> _State:
        return self.start(terms.term, y0, None)[1]

    @eqx.filter_jit  # Diffrax traces a step four times: this, once
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del args, made_jump
        term, dt, s = terms.term, t1 - t0, solver_state
        tree_map = jax.tree.map
        scaled = lambda share, tree: tree_map(lambda x: share * x, tree)
        add = lambda a, b: tree_map(jnp.add, a, b)
        subtract = lambda a, b: tree_map(jnp.subtract, a, b)

        def rate_of(y, slope, forcing):
            return slowed_rate(term, y, slope, forcing, s.stiff, dt)

        first_guess = prediction(term, y0, s.expansion, s.forcing, s.stiff, dt)
        predicted, stages = first_guess.y, first_guess.stages

        # 2. What is there.
        ratio = jnp.where(s.dt > 0, dt / jnp.where(s.dt > 0, s.dt, 1), 0)
        relief = jnp.where(s.dt > 0, ratio, 1) * s.relief
        e = term.expand_ahead(predicted, s.expansion, s.before, ratio, relief)
        respond, stiff, e = term.responder(predicted, e, dt)
        C = term.constraint(e)
        # Where the first row becomes tight within the step, X acts from then on, and
        # all of the violation is the step's own.
        begins = term.begins(s.expansion)
        crossing = term.crossing(s.before, s.expansion, e, ratio)
        acting = jnp.ones_like(dt)
        if not term.rings:
            expected = term.expected(s.before, s.expansion, e, ratio)
            acting = jnp.where(begins & expected, 1 - crossing, acting)
            respond = respond.of_the_last(acting).with_caution(s.caution)
        excess = s.excess * jnp.exp(-dt / _RELAXATION_AT_START)
        beyond = jnp.maximum(jnp.max(-jnp.diag(C)) - excess, 0)
        beyond = jnp.where(acting < 1, 0, beyond)
        slack = excess + beyond * jnp.exp(-dt / _RELAXATION)
        slack = slack * jnp.eye(C.shape[0], dtype=C.dtype)

        # 3. The multiplier.
        # A linear function of mean m1 over dt, and m0 over the dt0 before, ends at
        # m1 + (m1 - m0) dt / (dt + dt0).
        rho = jnp.where(s.memory > 0, dt / (dt + s.memory), 0)
        usable = lambda before: (rho > 0) & jnp.isfinite(before)
        mean = lambda last, before: tree_map(
            lambda a, b: jnp.where(usable(b), (a + rho * b) / (1 + rho), a),
            last,
            before,
        )
        start = lambda mean, end: tree_map(lambda m, a: 2 * m - a, mean, end)

        def problem(e):
            def changes(X, share):
                forcing = term.forcing(predicted, e, X)
                average = scaled(share, mean(forcing, s.mean_forcing))
                rise = subtract(forcing, start(average, forcing))
                return subtract(average, s.forcing), rise

            correction = lambda X, share=1.0: respond(*changes(X, share))
            rate_of_C = lambda rate: term.constraint_rate(predicted, e, rate)
            end = lambda X, share=1.0: C + rate_of_C(correction(X, share))

            def ahead(X, share=1.0):
                if not term.rings:
                    return end(X, share) + slack
                # A momentum carries on: what stopped at the edge would leave it again.
                rate = add(first_guess.rate1, respond.rate(*changes(X, share)))
                drift = term.drift(predicted, e, rate)
                return end(X, share) + term.memory * rate_of_C(drift) + slack

            return correction, end, ahead

        active = term.active(e)

        # With Phi as it is known; and again, where it was not exact for what comes out.
        def solve(carry):
            e, _, _ = carry
            found = multiplier(problem(e)[2], active, C)
            e, again = term.exact_along(predicted, e, found[0].X)
            return e, found, again

        nothing = jax.eval_shape(lambda: multiplier(problem(e)[2], active, C))
        nothing = tree_map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)
        e, (solution, left), _ = jax.lax.while_loop(
            lambda carry: carry[2], solve, (e, nothing, jnp.bool_(True))
        )
        correction, end, ahead = problem(e)
        X = solution.X
        share, until = jax.lax.cond(
            (rho > 0) & jnp.all(X == 0),
            lambda: release(
                ahead(X, 0.0),
                ahead(X),
                active,
                s.forcing,
                s.mean_forcing,
                rho / (1 + rho),
            ),
            lambda: (jnp.ones_like(rho), jnp.ones_like(rho)),
        )

        # 4. The correction.
        change = correction(X, share)
        linearized = end(X, share)
        kept = jnp.diag(linearized - end(0 * X, share))
        rows = jnp.arange(kept.size) < active
        relief = jnp.max(jnp.where(rows, kept, 0))
        # (Of a single row the response is known.)
        rows = (active > 1) & rows[:, None] & rows
        moved, caution = jnp.where(rows, linearized - C, 0), s.caution
        if not term.rings:
            last = term.in_rows_of(predicted, s.expansion, e, s.moved)
            caution = next_caution(jnp.where(rows, last, 0), moved, caution)
        X = acting * X  # the mean over all of the step
        y1 = add(predicted, change)
        e1, at_end = term.complete(y1, e, X, stages, solution.converged)
        # The correction turns rows of Phi. With those of the prediction, the forcing
        # would go up and down with the corrections from step to step. (It did act in
        # this step. But its mean, too, is better taken with what they turned to.)
        forcing = term.forcing(y1, at_end, X)
        mean_forcing = scaled(share, mean(forcing, s.mean_forcing))
        y1 = term.record(y1, at_end, X)

        # The observables of X in the course of the step.
        as_many = e1.held == s.expansion.held
        mean_X, number = term.mean_multiplier(
            predicted, s.expansion, e, X, s.mean_X, rho, forcing, mean_forcing
        )
        goes_on = (rho > 0) & (s.expansion.held > 0) & (e1.held > 0)
        number = jnp.where(as_many, number, s.number)
        number = jnp.where(goes_on, number, 1)
        mean_X *= share * number
        earlier, end = _of_X(y0), scaled(number, _of_X(y1))
        mean_of_X = scaled(share * number, mean(_of_X(y1), s.mean_of_X))
        onset = term.onset(crossing, s.expansion, e1, earlier, mean_of_X)
        onset = jnp.where((s.dt > 0) | begins, onset, 0)
        of_X = course(
            earlier,
            end,
            mean_of_X,
            s.mean_of_X,
            s.piece,
            dt,
            onset,
            until,
            unknown=(s.dt == 0) | begins,
            linear=rho > 0,
            smooth=as_many,
        )
        y1 = eqx.tree_at(_of_X, y1, of_X.last)

        # The embedded error estimate of the Runge-Kutta step, with the new forcing.
        first = start(mean_forcing, forcing)
        rate0 = rate_of(y0, s.expansion.slope, first)
        rate1 = rate_of(y1, e1.slope, forcing)
        defect = tree_map(
            lambda a, b, r0, r1: 0.8 * (a - b) + 0.4 * dt * (r0 + r1),
            y0, y1, rate0, rate1,
        )  # fmt: skip
        if term.rings:  # the modes were resolved
            defect = tree_map(jnp.zeros_like, defect)
        else:
            defect, e1 = term.damped(y1, e1, defect, dt)
        step = Step(
            dt,
            y0,
            y1,
            rate0,
            rate1,
            s.expansion,
            e,
            e1,
            linearized,
            defect,
            change,
            relief,
            excess,
            first_guess.middle,
            s.before,
            ratio,
            # of which the step before is to blame for a share
            tree_map(lambda x: 2 * ratio / (1 + ratio) * x, of_X.extrapolated),
        )
        error, e1 = term.relative_error(step)
        y1 = eqx.tree_at(lambda y: y.observables["work"], y1, e1.work)
        unheld, unsolved = unheld_for(left, s.unheld, dt)
        failure = first_of(
            term.failure(predicted, e),
            term.failure(y1, e1),
            unsolved,
            when(~first_guess.possible, RESULTS.dt_min_reached, jnp.inf),
            when(~(error < 1), RESULTS.dt_min_reached, error),
        )
        failure = first_of(s.failure.at(t0), failure.at(t1))
        error = jnp.where(failure.failed, jnp.inf, error)

        y_error = eqx.tree_at(
            lambda y: [y.observables[k] for k in ("error", "approach", "work")],
            tree_map(jnp.zeros_like, y1),
            [error, term.approach(step), y1.observables["work"]],
        )
        # Where X begins within the step, y goes as predicted up to then.
        turns = begins & (onset > 0)
        info = dict(
            y0=eqx.tree_at(_of_X, y0, of_X.first),
            y1=y1,
            rate0=choose(turns, first_guess.rate0, rate0),
            rate1=rate1,
            slope0=s.expansion.slope,
            slope1=e1.slope,
            turn=tree_map(lambda x: jnp.where(turns, x, 0), change),
            before=s.y_before,
            ratio=s.dt / dt,
            held=as_many & ~begins,
            smooth=s.smooth,
            earlier=earlier,
            onset=onset,
            until=until,
            bulge=of_X.bulge,
            rise=of_X.rise,
            constant=of_X.constant,
        )
        # Where nothing was held before, the forcing too is constant from the onset on.
        smooth = as_many & (onset == 0)
        onset = jnp.where(begins, onset, 0)
        means = scaled(1 / (1 - onset), (mean_forcing, mean_X, mean_of_X, forcing))
        # Where rows have ceased to be tight, what the others had goes on.
        stays = term.staying(s.expansion, e1, X, mean_X)
        stays = jnp.where(rho > 0, stays, 0)
        others = (scaled(stays, forcing), stays * X, scaled(stays, end), forcing)
        means = choose(stays > 0, others, means)
        piece = choose(stays > 0, Piece(means[2], dt), of_X.piece)
        settled = term.settled(s.expansion, e1, onset) | (stays > 0)
        state = _State(
            e1,
            term.remembered(s.expansion),
            y0,
            *means[:3],
            number,
            means[3],
            piece,
            stiff,
            dt,
            jnp.where(settled, dt * (1 - onset), 0),
            smooth,
            excess,
            relief,
            moved,
            caution,
            unheld,
            failure,
        )
        info["y1"], y1, state, result = settle(failure, y1, state, y0, s)
        return y1, y_error, info, state, result

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def _of_X(y: PyTree) -> Any:
    return y.observables["oscillating"]
