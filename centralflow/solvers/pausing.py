"""An integration that can be paused, and gone on with as if it had not been."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Pause(eqx.Module):
    """When to pause: after so many steps, rejected ones too, counted from the start of
    the integration; and at the end of the first step that ends at `time` or later. But
    not right before the last step, which goes to the `end` of the integration. And in
    any case after `most` steps, be it a rejected one."""

    steps: Int[Array, ""]
    most: Int[Array, ""]
    time: Float[Array, ""]
    end: Float[Array, ""]


class PausingState(eqx.Module):
    inner: Any
    steps: Int[Array, ""]
    dt: Float[Array, ""]  # of the next step


class PausingController(diffrax.AbstractStepSizeController):
    """Wraps a step-size controller. The `args` of `diffeqsolve` are a `Pause`; the
    result is then `max_steps_reached`.

    With y, the states of solver and controller, and `dt` all is kept that the next step
    depends on.
    """

    controller: diffrax.AbstractStepSizeController

    def wrap(self, direction):
        return PausingController(self.controller.wrap(direction))

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        next_t1, inner = self.controller.init(
            terms, t0, t1, y0, dt0, args, func, error_order
        )
        return next_t1, PausingState(inner, jnp.int32(0), next_t1 - t0)

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        keep, next_t0, next_t1, jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state.inner
        )
        steps = controller_state.steps + 1
        # Diffrax cuts a step that would end within 100 units of rounding of the end.
        last = next_t1 >= args.end * (1 - 200 * jnp.finfo(next_t1.dtype).eps)
        pauses = keep & ~last & ((steps >= args.steps) | (next_t0 >= args.time))
        pauses = pauses | ((steps >= args.most) & (next_t0 < args.end))
        codes = diffrax.RESULTS
        paused = codes.where(pauses, codes.max_steps_reached, codes.successful)
        result = codes.where(result == codes.successful, paused, result)
        state = PausingState(inner, steps, next_t1 - next_t0)
        return keep, next_t0, next_t1, jump, state, result
