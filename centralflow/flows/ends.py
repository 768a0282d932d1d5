"""What rod flow and edge flow share: a centre, and two ends that the optimizer jumps
between."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from .base import AbstractFlow, FlowState
from .stable import StableFlow, adaptive


class Oscillation(eqx.Module):
    """The half rod a = exp(log_size) direction, from the centre to one of the ends, in
    the phase space of weights and optimizer state, flattened.

    It is kept in two parts because it shrinks by many orders of magnitude while the
    optimizer is stable, and grows again from there: an error that is small next to the
    weights would start the next oscillation early.
    """

    direction: Float[Array, " N"]
    log_size: Float[Array, ""]


class Ends(eqx.Module):
    """One step of the optimizer as a map z -> z + V(z) of z = (weights, state), at the
    ends of the rod.

    The state in z is that *before* the gradient at the weights has entered it. With
    the state after it, V would need two gradients.
    """

    objective: FlatObjective
    optimizer: AbstractOptimizer
    metrics: dict[str, Callable]
    coordinates: Int[Array, " C"]

    def move(self, weights: Array, state: PyTree[Array]) -> Float[Array, " N"]:
        """V(z), flat."""
        new = self.optimizer.update(weights, state, self.objective.grad(weights))
        return ravel_pytree(jax.tree.map(jnp.subtract, new, (weights, state)))[0]

    def start(self, y: FlowState) -> FlowState:
        """The centre and the oscillation, from the first two steps of the optimizer.

        (V(z0) - V(z1)) / 4 leads from z0 to where what alternates cancels, as in the
        second-order midpoints, and is zero on a straight path. In each entry the centre
        is between z0 and z1: the second moments of an adaptive optimizer change by
        orders of magnitude in the first steps, which has nothing to do with an
        oscillation and could make them negative.
        """
        z, unravel = ravel_pytree((y.weights, y.optimizer_state))
        V0 = self.move(*unravel(z))
        V1 = self.move(*unravel(z + V0))
        shift = jnp.clip((V0 - V1) / 4, jnp.minimum(V0, 0), jnp.maximum(V0, 0))
        n = y.weights.size
        # Where nothing alternates, any direction will do.
        weights = jnp.where(jnp.arange(z.size) < n, 1.0, 0.0).astype(z.dtype)
        still = jnp.linalg.norm(shift[:n]) == 0
        direction = jnp.where(still, jnp.where(jnp.any(V0[:n]), V0, 1) * weights, shift)
        size = jnp.linalg.norm(direction[:n])
        first = jnp.where(still, rounding(y.weights, direction[:n]), size)
        centre = unravel(z + shift)
        return FlowState(*centre, {}, Oscillation(-direction / size, jnp.log(first)))

    def observe(self, y: FlowState) -> dict[str, PyTree[Array]]:
        z, unravel = ravel_pytree((y.weights, y.optimizer_state))
        a = jnp.exp(y.oscillation.log_size) * y.oscillation.direction
        half = a[: y.weights.size]

        def at(z):
            w, state = unravel(z)
            loss, gradient = self.objective.value_and_grad(w)
            P = self.optimizer.preconditioner(
                self.optimizer.update_state(state, gradient)
            )
            return dict(
                loss=loss,
                grad_norm_sq=gradient @ gradient,
                gradient_sq=gradient[self.coordinates] ** 2,
                P=jnp.broadcast_to(P, w.shape),
                step_sizes=jnp.broadcast_to(1 / P, w.shape)[self.coordinates],
                metrics=self.objective.evaluate(self.metrics, w),
            )

        centre = at(z)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, at(z + a), at(z - a))
        return dict(
            loss=centre["loss"],
            mean_loss=mean["loss"],
            grad_norm_sq=centre["grad_norm_sq"],
            mean_grad_norm_sq=mean["grad_norm_sq"],
            oscillation=(half @ (centre["P"] * half))[None],
            gradient_sq=mean["gradient_sq"],
            step_sizes=mean["step_sizes"],
            trace_covariance=half @ half,
            metrics=mean["metrics"],
        )


class Rod(eqx.Module):
    """The optimizer's step at both ends of a rod z + r v, z - r v."""

    ends: Ends
    z: Float[Array, " N"]
    r: Float[Array, ""]
    noise: Float[Array, ""]  # what rounding errors add to d log(size) / dt
    unravel: Callable[[Array], Any] = eqx.field(static=True)

    def __init__(self, ends: Ends, y: FlowState):
        self.ends, w = ends, y.weights
        self.z, self.unravel = ravel_pytree((w, y.optimizer_state))
        v, size = y.oscillation.direction[: w.size], jnp.exp(y.oscillation.log_size)
        # Of modes that rotate the weights' part goes through zero.
        length = jnp.maximum(jnp.linalg.norm(v), 0.1)
        # A difference over a shorter distance is one of rounding errors. An oscillation
        # that small has no effect on the centre.
        far = jnp.finfo(w.dtype).eps ** 0.5 * jnp.linalg.norm(w)
        self.r = jnp.maximum(size, far / length)
        self.noise = (rounding(w, v) / (size * length)) ** 2 / 2

    def steps(self, v: Float[Array, " N"]) -> tuple[Array, Array]:
        """V+ and V-."""
        return tuple(self._move(self.z + sign * self.r * v) for sign in (1, -1))

    def linearized(self, v: Float[Array, " N"]) -> tuple[Array, Array, Callable]:
        """V+ and V-, and the function (DV+ + DV-) / 2."""
        up, push_up = jax.linearize(self._move, self.z + self.r * v)
        down, push_down = jax.linearize(self._move, self.z - self.r * v)
        return up, down, lambda x: (push_up(x) + push_down(x)) / 2

    def across(self, up: Array, down: Array) -> Float[Array, " N"]:
        """q = (V- - V+) / (2 r), which is -DV v if V is linear."""
        return (down - up) / (2 * self.r)

    def rates(self, y: FlowState, centre: Array, growth: Array) -> FlowState:
        """dy/dt from dz/dt and da/dt over the size of a: the direction keeps its
        length."""
        v = y.oscillation.direction
        along = (v @ growth) / (v @ v)
        oscillation = Oscillation(growth - along * v, along + self.noise)
        return FlowState(*self.unravel(centre), {}, oscillation)

    def _move(self, z: Float[Array, " N"]) -> Float[Array, " N"]:
        return self.ends.move(*self.unravel(z))


def rounding(
    weights: Float[Array, " n"], direction: Float[Array, " n"]
) -> Float[Array, ""]:
    """The size of the rounding errors of one step along a direction.

    Those of rounding to nearest are at most eps/2 of each weight, and about eps/4 in
    the root mean square.
    """
    info = jnp.finfo(weights.dtype)
    size = jnp.linalg.norm(weights * direction) + info.tiny**0.5
    length = jnp.linalg.norm(direction) + info.tiny**0.5
    return info.eps / 4 * size / length + info.tiny**0.5


# Explicit and adaptive, as the stable flow is.
_STABLE = StableFlow()


class AbstractEndsFlow(AbstractFlow):
    """A flow of a centre and two ends, whose vector field has them as `ends`."""

    @property
    def delay(self) -> int:
        return 0

    def tolerance(self, rtol: float | None) -> float:
        return _STABLE.tolerance(rtol)

    def solver(self) -> diffrax.AbstractSolver:
        return _STABLE.solver()

    def stepsize(
        self, rtol: Float[Array, ""] | None
    ) -> tuple[diffrax.AbstractStepSizeController, Any]:
        # The ends may be much nearer to the centre than the tolerance.
        return adaptive(rtol, 1e-3 * rtol), 0.5

    def start(self, term: Any, y: FlowState, previous: Any) -> tuple[FlowState, Any]:
        if previous is not None and y.oscillation is None:
            raise ValueError("`solver_state` is that of another flow.")
        return (term.vector_field.ends.start(y) if previous is None else y), None

    def observe(self, term: Any, t: Any, y: FlowState) -> dict[str, PyTree[Array]]:
        return term.vector_field.ends.observe(y)
