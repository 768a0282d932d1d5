"""RMSProp, with one second moment for each parameter or one for all."""

import abc
import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..objective import is_traced
from .base import (
    AbstractOptimizer,
    Diagonal,
    Schedule,
    Vector,
    checked_decay,
    checked_eps,
    checked_flag,
    checked_learning_rate,
    rate_of_last_update,
)


class SecondMoment(eqx.Module):
    """The state of RMSProp: how many gradients have entered nu; nu, `[n]` or a scalar;
    and the age of nu: beta2^age is the weight that it still gives to its initial zero.
    The age is the number of updates, but runs faster than time along a flow."""

    updates: Float[Array, ""]
    nu: Diagonal
    age: Float[Array, ""]


class _AbstractRMSProp(AbstractOptimizer):
    learning_rate: eqx.AbstractVar[Float[Array, ""] | Schedule]
    beta2: eqx.AbstractVar[Float[Array, ""]]
    one_minus_beta2: eqx.AbstractVar[Float[Array, ""]]  # exact, for beta2 near 1
    eps: eqx.AbstractVar[Float[Array, ""]]
    bias_correction: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def moment(self, gradient_sq: Vector) -> Diagonal:
        """The g-dependent term of nu, from g * g or its mean; linear."""

    def init(self, weights: Vector) -> SecondMoment:
        zero = jnp.zeros((), weights.dtype)
        return SecondMoment(zero, jnp.zeros_like(self.moment(weights)), zero)

    def update_state(self, state: SecondMoment, gradient: Vector) -> SecondMoment:
        beta2, new = self._weights(gradient)
        nu = beta2 * state.nu + new * self.moment(gradient * gradient)
        return SecondMoment(state.updates + 1, nu, state.age + 1)

    def state_rate(
        self, state: SecondMoment, gradient: Vector, gradient_sq: Vector
    ) -> SecondMoment:
        # With nu after the update at integer times, backward Euler of this equation is
        # the update itself: nu' - nu = (1 - beta2)/beta2 (g * g - nu'). The factor
        # 1/beta2 is that of time, and the age takes it too. (The weight itself, an
        # exponential, would not be integrated exactly by every solver.)
        beta2, new = self._weights(gradient_sq)
        nu = new / beta2 * (self.moment(gradient_sq) - state.nu)
        return SecondMoment(jnp.ones_like(state.updates), nu, 1 / beta2)

    def stationary_state(
        self, state: SecondMoment, gradient: Vector, gradient_sq: Vector
    ) -> SecondMoment:
        forgotten = jnp.full_like(state.age, jnp.inf)  # the initial zero
        return SecondMoment(state.updates, self.moment(gradient_sq), forgotten)

    def updates(self, state: SecondMoment) -> Float[Array, ""]:
        return state.updates

    def preconditioner(self, state: SecondMoment) -> Diagonal:
        nu = state.nu
        if self.bias_correction:
            _, new = self._weights(nu)
            # Before any update nu is zero, whatever it is divided by.
            age = jnp.where(state.age > 0, state.age, 1)
            nu = nu / -jnp.expm1(age * jnp.log1p(-new))
        rate = rate_of_last_update(self.learning_rate, state.updates)
        return (jnp.sqrt(nu) + self.eps.astype(nu.dtype)) / rate

    def admissible(self, state: SecondMoment) -> SecondMoment:
        return dataclasses.replace(state, nu=jnp.maximum(state.nu, 0))

    def _weights(self, like: Array) -> tuple[Array, Array]:
        """beta2 and 1 - beta2, in the precision of `like`."""
        return self.beta2.astype(like.dtype), self.one_minus_beta2.astype(like.dtype)


class RMSProp(_AbstractRMSProp):
    """RMSProp: nu <- beta2 nu + (1 - beta2) g * g, then w <- w - eta g / (sqrt(nu) +
    eps). P = diag(sqrt(nu) + eps) / eta.

    **Arguments:**

    - `learning_rate`: eta, a positive number or a schedule `step -> eta`.
    - `beta2`: the decay of the second moment, in (0, 1).
    - `eps`: added to the root of the second moment, outside of it; not negative.
    - `bias_correction`: divide nu by 1 - beta2^t after t updates.
    """

    learning_rate: Float[Array, ""] | Schedule
    beta2: Float[Array, ""]
    one_minus_beta2: Float[Array, ""]
    eps: Float[Array, ""]
    bias_correction: bool = eqx.field(static=True)

    def __init__(self, learning_rate, beta2, eps=0.0, bias_correction=False):
        self.learning_rate = checked_learning_rate(learning_rate)
        self.beta2, self.one_minus_beta2 = checked_beta2(beta2)
        self.eps = checked_eps(eps)
        self.bias_correction = checked_flag("bias_correction", bias_correction)

    def moment(self, gradient_sq: Vector) -> Diagonal:
        return gradient_sq


class ScalarRMSProp(_AbstractRMSProp):
    """RMSProp with one second moment for all parameters: nu <- beta2 nu + (1 - beta2)
    |g|^2, then w <- w - eta g / (sqrt(nu) + eps). P = (sqrt(nu) + eps) / eta.

    **Arguments:**

    - `learning_rate`: eta, a positive number or a schedule `step -> eta`.
    - `beta2`: the decay of the second moment, in (0, 1).
    - `eps`: added to the root of the second moment, outside of it; not negative.
    - `bias_correction`: divide nu by 1 - beta2^t after t updates.
    """

    learning_rate: Float[Array, ""] | Schedule
    beta2: Float[Array, ""]
    one_minus_beta2: Float[Array, ""]
    eps: Float[Array, ""]
    bias_correction: bool = eqx.field(static=True)

    def __init__(self, learning_rate, beta2, eps=0.0, bias_correction=False):
        self.learning_rate = checked_learning_rate(learning_rate)
        self.beta2, self.one_minus_beta2 = checked_beta2(beta2)
        self.eps = checked_eps(eps)
        self.bias_correction = checked_flag("bias_correction", bias_correction)

    def moment(self, gradient_sq: Vector) -> Diagonal:
        return jnp.sum(gradient_sq)


def checked_beta2(beta2: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """beta2 and 1 - beta2, once that makes sense."""
    array = checked_decay("beta2", beta2)
    if is_traced(array):
        return array, 1 - array
    # Of the Python float: float32 rounds a beta2 near 1 by much, next to 1 - beta2.
    return array, jnp.asarray(1 - float(beta2), array.dtype)
