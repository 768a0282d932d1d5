"""What every optimizer has: discrete update, preconditioner P, rate of the state."""

import abc
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..objective import is_traced

Vector: TypeAlias = Float[Array, " n"]
# The diagonal of a preconditioner; a scalar stands for a multiple of the identity.
Diagonal: TypeAlias = Float[Array, ""] | Float[Array, " n"]
Schedule: TypeAlias = Callable[[Float[Array, ""]], Float[Array, ""]]


class AbstractOptimizer(eqx.Module):
    """A preconditioned gradient method, in discrete and in continuous time.

    One step at weights `w` with gradient `g` is

        state <- update_state(state, g)
        w     <- w + velocity(w, state, g),      velocity = -P(state)^-1 g by default.

    Its central flow is, with E the average over the oscillations,

        dw/dt     = velocity(w, state, E[g])
        dstate/dt = state_rate(state, E[g], E[g * g]).

    The state of the flow at time t is the state *after* the gradient at time t has
    entered it, the one that makes the step from t to t + 1. It is a PyTree of
    floating-point arrays and counts its updates itself if it needs the count, so that
    weights and state are all there is to continue a run.

    To add an optimizer, subclass this and implement the abstract methods.
    """

    learning_rate: eqx.AbstractVar[Float[Array, ""] | Schedule]

    @property
    def critical_sharpness(self) -> float | Float[Array, ""]:
        """The eigenvalue of P^-1 H above which the method oscillates. On a quadratic
        the mode with eigenvalue s obeys w <- (1 - s) w: stable up to s = 2."""
        return 2.0

    @abc.abstractmethod
    def init(self, weights: Vector) -> PyTree[Array]:
        """The state before the first update."""

    @abc.abstractmethod
    def update_state(self, state: PyTree[Array], gradient: Vector) -> PyTree[Array]:
        """The state after one more gradient."""

    @abc.abstractmethod
    def state_rate(
        self, state: PyTree[Array], gradient: Vector, gradient_sq: Vector
    ) -> PyTree[Array]:
        """The time derivative of the state, per optimizer step, where the gradient has
        the mean E[g] = `gradient` and the second moments E[g * g] = `gradient_sq`."""

    @abc.abstractmethod
    def preconditioner(self, state: PyTree[Array]) -> Diagonal:
        """The diagonal of P(state), learning rate included, positive: the step is
        -P^-1 g."""

    def admissible(self, state: PyTree[Array]) -> PyTree[Array]:
        """The nearest state that there can be: within a long step of a flow, `state` is
        extrapolated, and a second moment may come out negative."""
        return state

    def stationary_state(
        self, state: PyTree[Array], gradient: Vector, gradient_sq: Vector
    ) -> PyTree[Array]:
        """The state to which `state` relaxes where the gradient keeps the mean
        `gradient` and the second moments `gradient_sq`: the zero of `state_rate`.

        This is Newton's step, exact for states that relax linearly, entry by entry, as
        moving averages do. What does not relax, such as a count, stays as it is.
        """
        rate = lambda state: self.state_rate(state, gradient, gradient_sq)
        ones = jax.tree.map(jnp.ones_like, state)
        value, slope = jax.jvp(rate, (state,), (ones,))
        relax = lambda s, r, d: jnp.where(d < 0, s - r / jnp.where(d < 0, d, 1), s)
        return jax.tree.map(relax, state, value, slope)

    def updates(self, state: PyTree[Array]) -> Float[Array, ""]:
        """How many gradients have entered the state: with a schedule, the step that it
        is at."""
        return jnp.zeros(())

    def step_rates(
        self,
        weights: Vector,
        state: PyTree[Array],
        gradient: Vector,
        gradient_sq: Vector,
        dt: Float[Array, ""],
    ) -> tuple[Vector, PyTree[Array]]:
        """The time derivatives of weights and state with which a step of length dt of a
        flow is made, from E[g] = `gradient` and E[g * g] = `gradient_sq` at its start.

        Those at the start; but a momentum relaxes, and the weights move with what it is
        at the end, as in the discrete method. (With that of the start the modes with
        complex rates would grow.) A state with a momentum has it as its field `m`.
        """
        del dt
        velocity = self.velocity(weights, state, gradient)
        return velocity, self.state_rate(state, gradient, gradient_sq)

    @property
    def memory(self) -> float | Float[Array, ""]:
        """For how long a gradient acts on the velocity, in steps: the time constant of
        the momentum, 0 without."""
        return 0.0

    @property
    def has_memory(self) -> bool:
        """Whether `memory` is not the constant zero."""
        return not (isinstance(self.memory, float) and self.memory == 0)

    def velocity(
        self, weights: Vector, state: PyTree[Array], gradient: Vector
    ) -> Vector:
        """The change of the weights in one step, and their time derivative along a
        flow, where `gradient` is the mean gradient E[g]."""
        del weights
        return -gradient / self.preconditioner(state)

    def update(
        self, weights: Vector, state: PyTree[Array], gradient: Vector
    ) -> tuple[Vector, PyTree[Array]]:
        """One step of the discrete optimizer."""
        state = self.update_state(state, gradient)
        return weights + self.velocity(weights, state, gradient), state


def rate_of_last_update(
    learning_rate: float | Float[Array, ""] | Schedule, updates: Float[Array, ""]
) -> Float[Array, ""]:
    """The learning rate with which update number `updates` was made."""
    # Update number 1 is step 0. Before any update the rate is that of step 0 too.
    if callable(learning_rate):
        # Not `maximum`, whose derivative is one half at the tie, where a flow starts.
        learning_rate = learning_rate(jnp.where(updates < 1, 0, updates - 1))
    # A warm-up may start at zero, where P is infinite.
    rate = jnp.asarray(learning_rate, updates.dtype)
    return jnp.where(rate == 0, jnp.finfo(rate.dtype).eps ** 2, rate)


def checked_learning_rate(learning_rate) -> Float[Array, ""] | Schedule:
    """`learning_rate` as an array or a schedule, once it makes sense."""
    if callable(learning_rate):
        return learning_rate
    value = checked_number(
        "learning_rate", learning_rate, "a number or a schedule `step -> rate`"
    )
    if not is_traced(value) and not 0 < float(value) < float("inf"):
        raise ValueError(
            f"`learning_rate` must be positive and finite, got {learning_rate}."
        )
    return value


def relaxation_rate(beta: Float[Array, ""]) -> Float[Array, ""]:
    """The rate -ln beta at which, along a flow, a momentum m with the update
    m <- beta m + ... forgets.

    A mode of the discrete method with eigenvalue s has z^2 - (1 + beta - (1 - beta) s)
    z + beta = 0, and the flow dw/dt = -m, dm/dt = c (s w - m) has lambda^2 + c lambda +
    c s = 0. With z = e^lambda the decays of the modes with complex roots, which is
    nearly all of them, agree if -c/2 = ln(beta)/2. What is left of an initial m agrees
    too. The delay of the velocity behind the gradient, 1/c, is that of the method,
    beta / (1 - beta) + 1/2, to second order in 1 - beta. (The rate
    (1 - beta) / beta, which makes m what it is after an update, is off by half a step
    in the delay, for the velocity of a step is its mean, not that at its start.)
    """
    return -jnp.log(beta)


def mean_of_decay(z: Float[Array, ""]) -> Float[Array, ""]:
    """(1 - e^-z) / z, the mean of e^-t over [0, z]."""
    small = z < 1e-3
    return jnp.where(small, 1 - z / 2, -jnp.expm1(-z) / jnp.where(small, 1, z))


def checked_decay(name: str, value: Any) -> Float[Array, ""]:
    """`value` as an array, once it is the decay of a moving average."""
    array = checked_number(name, value)
    if not is_traced(array) and not 0 < float(value) < 1:
        raise ValueError(f"`{name}` must be a number between 0 and 1, got {value}.")
    return array


def checked_eps(eps: Any) -> Float[Array, ""]:
    """`eps` as an array, once it is a number that is not negative."""
    array = checked_number("eps", eps)
    if not is_traced(array) and not 0 <= float(eps) < float("inf"):
        raise ValueError(f"`eps` must be a number that is not negative, got {eps}.")
    return array


def checked_flag(name: str, value: Any) -> bool:
    """`value`, once it is `True` or `False`."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def checked_number(
    name: str, value: Any, expected: str = "a number"
) -> Float[Array, ""]:
    """`value` as an array, once it is a real number."""
    message = f"`{name}` must be {expected}, got {value!r}."
    try:
        if isinstance(value, str | bytes | bool) or jnp.iscomplexobj(value):
            raise TypeError(message)
        number = jnp.asarray(value, jnp.result_type(float))
    except (TypeError, ValueError) as error:
        raise ValueError(message) from error
    if number.shape != ():
        raise ValueError(
            f"`{name}` must be a scalar, got an array of shape {number.shape}."
        )
    return number


def check_schedule(
    learning_rate: float | Float[Array, ""] | Schedule, first: Any, steps: int
) -> None:
    """Raise if a schedule is negative or not finite somewhere in the `steps` steps
    after the `first` ones."""
    if not callable(learning_rate):
        return
    times = first + jnp.arange(steps + 1, dtype=jnp.result_type(float))

    def rate(time):
        try:
            value = learning_rate(time)
        except Exception as error:  # any that a user's function can raise
            raise ValueError(
                "`learning_rate`: calling the schedule failed with: "
                f"{type(error).__name__}: {error}\nIt must be a function of the step "
                "that JAX can trace: `jnp.where` takes the place of `if`."
            ) from error
        return checked_number("learning_rate", value, "a schedule that returns numbers")

    rates = jax.jit(lambda times: jax.lax.map(rate, times))(times)
    if is_traced(rates):
        return
    bad = np.flatnonzero(~((np.asarray(rates) >= 0) & np.isfinite(np.asarray(rates))))
    if bad.size:
        raise ValueError(
            "`learning_rate` must be finite and not negative; the schedule returned "
            f"{float(rates[bad[0]])} at step {float(times[bad[0]]):g}."
        )
