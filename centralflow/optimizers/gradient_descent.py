"""Gradient descent."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import (
    AbstractOptimizer,
    Diagonal,
    Schedule,
    Vector,
    checked_learning_rate,
    rate_of_last_update,
)


class GradientDescent(AbstractOptimizer):
    """Gradient descent, w <- w - eta g. P = 1/eta.

    **Arguments:**

    - `learning_rate`: eta, a positive number, or a schedule `step -> eta` with steps
        counted from 0, such as those of Optax. Along a flow the schedule is called at
        real-valued times.
    """

    learning_rate: Float[Array, ""] | Schedule

    def __init__(self, learning_rate: float | Float[Array, ""] | Schedule):
        self.learning_rate = checked_learning_rate(learning_rate)

    def init(self, weights: Vector) -> Float[Array, ""]:
        return jnp.zeros((), weights.dtype)  # the number of updates

    def update_state(
        self, state: Float[Array, ""], gradient: Vector
    ) -> Float[Array, ""]:
        return state + 1

    def state_rate(
        self, state: Float[Array, ""], gradient: Vector, gradient_sq: Vector
    ) -> Float[Array, ""]:
        return jnp.ones_like(state)

    def updates(self, state: Float[Array, ""]) -> Float[Array, ""]:
        return state

    def preconditioner(self, state: Float[Array, ""]) -> Diagonal:
        return 1 / rate_of_last_update(self.learning_rate, state)
