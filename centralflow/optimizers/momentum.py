"""Heavy ball and Nesterov's method: gradient descent with momentum."""

import abc
import dataclasses

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from .base import (
    AbstractOptimizer,
    Diagonal,
    Schedule,
    Vector,
    checked_decay,
    checked_flag,
    checked_learning_rate,
    mean_of_decay,
    rate_of_last_update,
    relaxation_rate,
)


class Momentum(eqx.Module):
    """The state of a method with momentum: how many gradients have entered, and m."""

    updates: Float[Array, ""]
    m: Vector


class _AbstractMomentum(AbstractOptimizer):
    learning_rate: eqx.AbstractVar[Float[Array, ""] | Schedule]
    beta: eqx.AbstractVar[Float[Array, ""]]
    averaged: eqx.AbstractVar[bool]

    def init(self, weights: Vector) -> Momentum:
        return Momentum(jnp.zeros((), weights.dtype), jnp.zeros_like(weights))

    def update_state(self, state: Momentum, gradient: Vector) -> Momentum:
        beta = self.beta.astype(gradient.dtype)
        return Momentum(state.updates + 1, beta * state.m + self._gain * gradient)

    def state_rate(
        self, state: Momentum, gradient: Vector, gradient_sq: Vector
    ) -> Momentum:
        rate = relaxation_rate(self.beta.astype(gradient.dtype))
        m = rate * (self._limit(gradient) - state.m)
        return Momentum(jnp.ones_like(state.updates), m)

    def step_rates(
        self,
        weights: Vector,
        state: Momentum,
        gradient: Vector,
        gradient_sq: Vector,
        dt: Float[Array, ""],
    ) -> tuple[Vector, Momentum]:
        rate = self.state_rate(state, gradient, gradient_sq)
        m = rate.m * mean_of_decay(dt / self.memory).astype(gradient.dtype)
        at_end = dataclasses.replace(state, m=state.m + dt * m)
        velocity = self.velocity(weights, at_end, gradient)
        return velocity, dataclasses.replace(rate, m=m)

    @property
    def memory(self) -> Float[Array, ""]:
        return 1 / relaxation_rate(self.beta)

    def updates(self, state: Momentum) -> Float[Array, ""]:
        return state.updates

    def preconditioner(self, state: Momentum) -> Diagonal:
        return 1 / rate_of_last_update(self.learning_rate, state.updates)

    @property
    def _gain(self) -> Float[Array, ""] | float:
        """The weight with which a gradient enters m."""
        return 1 - self.beta if self.averaged else 1.0

    def _limit(self, gradient: Vector) -> Vector:
        """The m of a gradient that stays as it is."""
        return self._gain / (1 - self.beta.astype(gradient.dtype)) * gradient

    @abc.abstractmethod
    def velocity(self, weights: Vector, state: Momentum, gradient: Vector) -> Vector:
        """Of m and, perhaps, the gradient."""


class HeavyBall(_AbstractMomentum):
    """Gradient descent with Polyak's momentum: m <- beta m + g, then w <- w - eta m.
    P = 1/eta.

    **Arguments:**

    - `learning_rate`: eta, a positive number or a schedule `step -> eta`.
    - `beta`: the decay of the momentum, in (0, 1).
    - `averaged`: m <- beta m + (1 - beta) g instead, a moving average of the gradients:
        the method with the learning rate (1 - beta) eta.

    ??? cite "Reference"

        B. T. Polyak, *Some methods of speeding up the convergence of iteration
        methods*, USSR Computational Mathematics and Mathematical Physics 4 (1964).
    """

    learning_rate: Float[Array, ""] | Schedule
    beta: Float[Array, ""]
    averaged: bool = eqx.field(static=True)

    def __init__(self, learning_rate, beta, *, averaged=False):
        self.learning_rate = checked_learning_rate(learning_rate)
        self.beta = checked_decay("beta", beta)
        self.averaged = checked_flag("averaged", averaged)

    @property
    def critical_sharpness(self) -> Float[Array, ""]:
        """2 (1 + beta), and over 1 - beta if averaged. On a quadratic the mode with
        eigenvalue s obeys, with the gain a = 1 or 1 - beta, z^2 - (1 + beta - a s) z +
        beta = 0 for its factor z per step. The roots' product is beta < 1, so they
        leave the unit circle on the real axis: at z = -1, where 2 (1 + beta) = a s."""
        return 2 * (1 + self.beta) / self._gain

    def velocity(self, weights: Vector, state: Momentum, gradient: Vector) -> Vector:
        return -state.m / self.preconditioner(state)


class Nesterov(_AbstractMomentum):
    """Gradient descent with Nesterov's momentum: m <- beta m + g, then
    w <- w - eta (beta m + g). P = 1/eta.

    **Arguments:**

    - `learning_rate`: eta, a positive number or a schedule `step -> eta`.
    - `beta`: the decay of the momentum, in (0, 1).
    - `averaged`: m <- beta m + (1 - beta) g, then w <- w - eta (beta m + (1 - beta) g)
        instead: the method with the learning rate (1 - beta) eta.

    ??? cite "Reference"

        Y. Nesterov, *A method for solving the convex programming problem with
        convergence rate O(1/k^2)*, Doklady Akademii Nauk SSSR 269 (1983), in the form
        of I. Sutskever, J. Martens, G. Dahl, G. Hinton, *On the importance of
        initialization and momentum in deep learning* (2013).
    """

    learning_rate: Float[Array, ""] | Schedule
    beta: Float[Array, ""]
    averaged: bool = eqx.field(static=True)

    def __init__(self, learning_rate, beta, *, averaged=False):
        self.learning_rate = checked_learning_rate(learning_rate)
        self.beta = checked_decay("beta", beta)
        self.averaged = checked_flag("averaged", averaged)

    @property
    def critical_sharpness(self) -> Float[Array, ""]:
        """2 (1 + beta) / (1 + 2 beta), and over 1 - beta if averaged. The mode with
        eigenvalue s has z^2 - (1 + beta) (1 - a s) z + beta (1 - a s) = 0 with the gain
        a = 1 or 1 - beta: z = -1 where a s = 2 (1 + beta) / (1 + 2 beta). The product
        of the roots is beta (1 - a s) > -1 up to there, and complex roots are inside
        the unit circle."""
        return 2 * (1 + self.beta) / (1 + 2 * self.beta) / self._gain

    def velocity(self, weights: Vector, state: Momentum, gradient: Vector) -> Vector:
        step = self.beta.astype(gradient.dtype) * state.m + self._gain * gradient
        return -step / self.preconditioner(state)
