"""Step-size control that sees the constraint coming, and counts the work."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

# Lengths are chosen for errors below the tolerance; a step is accepted with one up to
# so many times that. (With 2.5 the oscillation of a run of gradient descent is off by
# 6 % instead of 5 %, for 4 % less work.)
_PERMITTED = 2.0
# In rounding, and for so many steps after that was seen, steps that are no longer than
# the resolution are accepted with an error of up to so many times the tolerance.
_PERMITTED_IN_ROUNDING, _REMEMBERED = 100.0, 30


class _State(eqx.Module):
    inner: Any
    end: Float[Array, ""]
    total: PyTree
    proposed: Float[Array, ""]  # the length of the next step
    # Of the first step of a finite error that was rejected since one was accepted;
    # zero if none was.
    length: Float[Array, ""]
    error: Float[Array, ""]
    in_rounding: Int[Array, ""]  # for so many steps


class ForesightController(diffrax.AbstractAdaptiveStepSizeController):
    """Wraps a PID controller that has a `dtmin`, for
    [`centralflow.solvers.ProjectedRKC`][].

    An error estimate looks back, and where a row of the constraint is about to become
    tight it says nothing: the next step would be rejected, several times. So a step is
    at most so long that no row, at the speed of the term's `approach`, exceeds the
    constraint by more than the tolerance allows.

    A step is accepted with an error of up to twice the tolerance, and the next is
    shorter: to do it again would cost as much as a step, to make one error of many half
    as large. Nor would the error fall, if the step inherits it, of a multiplier or of
    fast modes that the last step left a little wrong: the step might be made 50 times
    shorter, for an error that the last one was permitted to make. (The error of a jump
    within a step does not fall either: a small one of the learning rate may be accepted
    so, too.)

    Nor does an error fall that is rounding, of a function that is a staircase in its
    last digits, until steps are shorter than the treads. Where one has not fallen as
    the root of the length in steps down to less than the `resolution`, in units of
    time, these are accepted with an error of up to 100 times the tolerance for a while,
    and longer ones are not cut to less at once.

    The last step of an integration is cut to end there. Far shorter than those before
    it, it would not resolve the multiplier; so the last two are made equal. The step
    `proposed` to go on with is not cut.

    What a step cost is `work` of its error estimate: Diffrax returns to the old solver
    state when it rejects a step, but a controller sees each one. The total is in its
    state.
    """

    controller: diffrax.PIDController
    resolution: float | Float[Array, ""] = 0.0

    @property
    def atol(self):
        return self.controller.atol

    @property
    def rtol(self):
        return self.controller.rtol

    @property
    def norm(self):
        return self.controller.norm

    def wrap(self, direction):
        return ForesightController(self.controller.wrap(direction), self.resolution)

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        end = jnp.asarray(t1)
        t1, inner = self.controller.init(
            terms, t0, t1, y0, dt0, args, func, error_order
        )
        zero = jax.tree.map(jnp.zeros_like, y0.observables["work"])
        none = jnp.zeros_like(t1 - t0)
        return t1, _State(inner, end, zero, t1 - t0, none, none, jnp.int32(0))

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        keep, next_t0, next_t1, jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state.inner
        )
        # A step that cannot be made shorter: the next is the same in this precision.
        after = lambda t0, t1: jnp.maximum(t1, jnp.nextafter(t0, jnp.inf))
        next_t1 = after(next_t0, next_t1)
        s, dt, error = controller_state, t1 - t0, self.norm(y_error)
        short = t1 <= t0 + 1.01 * self.resolution  # but for rounding, of the time too
        stubborn = short & (2 * dt < s.length) & (error**2 * s.length > s.error**2 * dt)
        in_rounding = jnp.where(stubborn, _REMEMBERED, s.in_rounding)
        short &= in_rounding > 0
        factor = jnp.where(short, _PERMITTED_IN_ROUNDING, _PERMITTED)
        permitted = error < factor * self.atol
        least = (in_rounding > 0) & (permitted | ~short)
        least = jnp.where(least, next_t0 + self.resolution, next_t0)
        next_t1 = jnp.maximum(next_t1, least)
        in_spite = ~keep & (permitted | (next_t1 >= t1))
        shorter = jnp.where(short, next_t1, jnp.minimum(next_t1, t1)) - next_t0
        keep = keep | in_spite
        next_t0 = jnp.where(in_spite, t1, next_t0)
        next_t1 = jnp.where(in_spite, t1 + shorter, next_t1)
        left, speed = y_error.observables["approach"]
        allowed = 0.7 * jnp.sqrt(self.atol)
        longest = jnp.min(
            jnp.where(
                speed > 0, (left + allowed) / jnp.where(speed > 0, speed, 1), jnp.inf
            )
        )
        # (Not a number, or infinite, the step would never end.)
        longest = jnp.where(jnp.isnan(longest), 0, longest)
        longest = jnp.maximum(longest, self.controller.dtmin)
        next_t1 = jnp.where(keep, jnp.minimum(next_t1, next_t0 + longest), next_t1)
        next_t1 = after(next_t0, next_t1)
        proposed, before = next_t1 - next_t0, s.proposed
        cut = keep & (dt < 0.99 * before)
        proposed = jnp.where(cut, jnp.maximum(proposed, before), proposed)
        left = s.end - next_t0
        last_two = (next_t1 < s.end) & (left < 2 * (next_t1 - next_t0))
        next_t1 = jnp.where(last_two, next_t0 + left / 2, next_t1)
        seen = (s.length > 0) & jnp.isfinite(s.error)
        first = lambda before, now: jnp.where(seen, before, now)
        state = _State(
            inner,
            s.end,
            s.total + y_error.observables["work"],
            proposed,
            length=jnp.where(keep, 0, first(s.length, dt)),
            error=jnp.where(keep, 0, first(s.error, error)),
            in_rounding=jnp.maximum(in_rounding - keep.astype(jnp.int32), 0),
        )
        return keep, next_t0, next_t1, jump, state, result
