"""Adam and NAdam: RMSProp with momentum."""

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
    checked_eps,
    checked_flag,
    checked_learning_rate,
    mean_of_decay,
    relaxation_rate,
)
from .rmsprop import RMSProp, SecondMoment, checked_beta2


class Moments(eqx.Module):
    """The state of Adam: the moving average m of the gradients, `[n]`, and that of
    their squares."""

    m: Vector
    second: SecondMoment


class _AbstractAdam(AbstractOptimizer):
    learning_rate: eqx.AbstractVar[Float[Array, ""] | Schedule]
    beta1: eqx.AbstractVar[Float[Array, ""]]
    beta2: eqx.AbstractVar[Float[Array, ""]]
    one_minus_beta2: eqx.AbstractVar[Float[Array, ""]]
    eps: eqx.AbstractVar[Float[Array, ""]]
    bias_correction: eqx.AbstractVar[bool]

    @property
    def rmsprop(self) -> RMSProp:
        """The method without momentum."""
        method = RMSProp(self.learning_rate, self.beta2, self.eps, self.bias_correction)
        exact = lambda method: method.one_minus_beta2
        return eqx.tree_at(exact, method, self.one_minus_beta2)

    def init(self, weights: Vector) -> Moments:
        return Moments(jnp.zeros_like(weights), self.rmsprop.init(weights))

    def update_state(self, state: Moments, gradient: Vector) -> Moments:
        beta = self.beta1.astype(gradient.dtype)
        m = beta * state.m + (1 - beta) * gradient
        return Moments(m, self.rmsprop.update_state(state.second, gradient))

    def state_rate(
        self, state: Moments, gradient: Vector, gradient_sq: Vector
    ) -> Moments:
        m = relaxation_rate(self.beta1.astype(gradient.dtype)) * (gradient - state.m)
        second = self.rmsprop.state_rate(state.second, gradient, gradient_sq)
        return Moments(m, second)

    def stationary_state(
        self, state: Moments, gradient: Vector, gradient_sq: Vector
    ) -> Moments:
        second = self.rmsprop.stationary_state(state.second, gradient, gradient_sq)
        return Moments(gradient, second)

    def step_rates(
        self,
        weights: Vector,
        state: Moments,
        gradient: Vector,
        gradient_sq: Vector,
        dt: Float[Array, ""],
    ) -> tuple[Vector, Moments]:
        rate = self.state_rate(state, gradient, gradient_sq)
        m = rate.m * mean_of_decay(dt / self.memory).astype(gradient.dtype)
        at_end = dataclasses.replace(state, m=state.m + dt * m)
        velocity = self.velocity(weights, at_end, gradient)
        return velocity, dataclasses.replace(rate, m=m)

    @property
    def memory(self) -> Float[Array, ""]:
        return 1 / relaxation_rate(self.beta1)

    def updates(self, state: Moments) -> Float[Array, ""]:
        return state.second.updates

    def preconditioner(self, state: Moments) -> Diagonal:
        P = self.rmsprop.preconditioner(state.second)
        if self.bias_correction:
            # m is divided by 1 - beta1^t, and the step by P: that factor is P's here,
            # so that the step is always -P^-1 m.
            P = P * self._correction(self._counted(state))
        return P

    def _counted(self, state: Moments) -> Float[Array, ""]:
        """The updates since m was zero: at least one, and infinitely many if that is
        forgotten."""
        second = state.second
        return jnp.where(jnp.isinf(second.age), jnp.inf, jnp.maximum(second.updates, 1))

    def _correction(self, updates: Float[Array, ""]) -> Float[Array, ""]:
        return -jnp.expm1(updates * jnp.log(self.beta1.astype(updates.dtype)))

    @abc.abstractmethod
    def velocity(self, weights: Vector, state: Moments, gradient: Vector) -> Vector:
        """Of the moments and, perhaps, the gradient."""


class Adam(_AbstractAdam):
    """Adam: m <- beta1 m + (1 - beta1) g, nu <- beta2 nu + (1 - beta2) g * g, then
    w <- w - eta m / (sqrt(nu) + eps), with m and nu corrected for their zero start.
    P = diag(sqrt(nu) + eps) (1 - beta1^t) / eta, the last factor if m is corrected.

    **Arguments:**

    - `learning_rate`: eta, a positive number or a schedule `step -> eta`.
    - `beta1`, `beta2`: the decays of m and nu, in (0, 1).
    - `eps`: added to the root of the second moment, outside of it; not negative.
    - `bias_correction`: divide m by 1 - beta1^t and nu by 1 - beta2^t after t updates.

    ??? cite "Reference"

        D. P. Kingma, J. Ba, *Adam: a method for stochastic optimization*, ICLR 2015.
        The critical sharpness: J. Cohen et al., *Adaptive gradient methods at the edge
        of stability*, arXiv 2207.14484.
    """

    learning_rate: Float[Array, ""] | Schedule
    beta1: Float[Array, ""]
    beta2: Float[Array, ""]
    one_minus_beta2: Float[Array, ""]
    eps: Float[Array, ""]
    bias_correction: bool = eqx.field(static=True)

    def __init__(
        self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, bias_correction=True
    ):
        self.learning_rate = checked_learning_rate(learning_rate)
        self.beta1 = checked_decay("beta1", beta1)
        self.beta2, self.one_minus_beta2 = checked_beta2(beta2)
        self.eps = checked_eps(eps)
        self.bias_correction = checked_flag("bias_correction", bias_correction)

    @property
    def critical_sharpness(self) -> Float[Array, ""]:
        """2 (1 + beta1) / (1 - beta1), that of the averaged heavy ball."""
        return 2 * (1 + self.beta1) / (1 - self.beta1)

    def velocity(self, weights: Vector, state: Moments, gradient: Vector) -> Vector:
        return -state.m / self.preconditioner(state)


class NAdam(_AbstractAdam):
    """Adam with Nesterov's momentum: the step is -eta (beta1 m + (1 - beta1) g) /
    (sqrt(nu) + eps). With bias correction m in it is divided by 1 - beta1^(t + 1), g by
    1 - beta1^t and nu by 1 - beta2^t, as in Optax.

    **Arguments:**

    - `learning_rate`: eta, a positive number or a schedule `step -> eta`.
    - `beta1`, `beta2`: the decays of m and nu, in (0, 1).
    - `eps`: added to the root of the second moment, outside of it; not negative.
    - `bias_correction`: as above, after t updates.

    ??? cite "Reference"

        T. Dozat, *Incorporating Nesterov momentum into Adam*, ICLR workshop 2016.
    """

    learning_rate: Float[Array, ""] | Schedule
    beta1: Float[Array, ""]
    beta2: Float[Array, ""]
    one_minus_beta2: Float[Array, ""]
    eps: Float[Array, ""]
    bias_correction: bool = eqx.field(static=True)

    def __init__(
        self, learning_rate, beta1=0.9, beta2=0.999, eps=1e-8, bias_correction=True
    ):
        self.learning_rate = checked_learning_rate(learning_rate)
        self.beta1 = checked_decay("beta1", beta1)
        self.beta2, self.one_minus_beta2 = checked_beta2(beta2)
        self.eps = checked_eps(eps)
        self.bias_correction = checked_flag("bias_correction", bias_correction)

    @property
    def critical_sharpness(self) -> Float[Array, ""]:
        """2 (1 + beta1) / ((1 - beta1) (1 + 2 beta1)), that of Nesterov's method with
        an averaged m."""
        return 2 * (1 + self.beta1) / (1 - self.beta1) / (1 + 2 * self.beta1)

    def velocity(self, weights: Vector, state: Moments, gradient: Vector) -> Vector:
        beta, m = self.beta1.astype(gradient.dtype), state.m
        if self.bias_correction:
            t = self._counted(state)
            m = m * (self._correction(t) / self._correction(t + 1))
        return -(beta * m + (1 - beta) * gradient) / self.preconditioner(state)
