"""What rod flow and edge flow share: a centre, and two ends that the optimizer jumps
between."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from .base import FlowState


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

    def move(
        self, weights: Array, state: PyTree[Array]
    ) -> tuple[Float[Array, " N"], Float[Array, " n"]]:
        """V(z), flat, and the diagonal of P with which the step is made."""
        new = self.optimizer.update(weights, state, self.objective.grad(weights))
        P = self.optimizer.preconditioner(new[1])
        V = jax.tree.map(jnp.subtract, new, (weights, state))
        return ravel_pytree(V)[0], jnp.broadcast_to(P, weights.shape)

    def start(self, y: FlowState) -> FlowState:
        """The centre and the oscillation, from the first two steps of the optimizer.

        (V(z0) - V(z1)) / 4 leads from z0 to where what alternates cancels, as in the
        second-order midpoints, and is zero on a straight path. In each entry the centre
        is between z0 and z1: the second moments of an adaptive optimizer change by
        orders of magnitude in the first steps, which has nothing to do with an
        oscillation and could make them negative.
        """
        z, unravel = ravel_pytree((y.weights, y.optimizer_state))
        V0, _ = self.move(*unravel(z))
        V1, _ = self.move(*unravel(z + V0))
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


class AtEnds(eqx.Module):
    """The means and the half difference of V at the ends z + r v and z - r v, for a
    direction v."""

    F: Float[Array, " N"]  # (V+ + V-) / 2
    q: Float[Array, " N"]  # (V- - V+) / (2 r)
    m: Float[Array, ""]  # the part of q along v: q is about m v
    bend: Float[Array, " N"]  # (DV+ + DV-) F / 2, or zeros
    noise: Float[Array, ""]  # the growth of log r from rounding errors


def rounding(
    weights: Float[Array, " n"], direction: Float[Array, " n"]
) -> Float[Array, ""]:
    """The size of the rounding errors of one step along a direction, over its length.

    Those of rounding to nearest are at most eps/2 of each weight, and about eps/4 in
    the root mean square.
    """
    info = jnp.finfo(weights.dtype)
    errors = (
        info.eps / 4 * jnp.linalg.norm(weights * direction) / jnp.linalg.norm(direction)
    )
    return errors + info.tiny**0.5


def at_ends(ends: Ends, y: FlowState, *, bend: bool) -> AtEnds:
    z, unravel = ravel_pytree((y.weights, y.optimizer_state))
    v, n = y.oscillation.direction, y.weights.size
    length, noise = jnp.linalg.norm(v[:n]), rounding(y.weights, v[:n])
    size = jnp.exp(y.oscillation.log_size)
    # Differences over shorter distances are rounding errors. The oscillation has no
    # effect on the centre there.
    far = jnp.finfo(z.dtype).eps ** 0.5 * jnp.linalg.norm(y.weights)
    r = jnp.maximum(size, far / length)
    move = lambda z: ends.move(*unravel(z))
    if bend:
        up, push_up, P_up = jax.linearize(move, z + r * v, has_aux=True)
        down, push_down, P_down = jax.linearize(move, z - r * v, has_aux=True)
    else:
        (up, P_up), (down, P_down) = move(z + r * v), move(z - r * v)
    F, q, P = (up + down) / 2, (down - up) / (2 * r), (P_up + P_down)[:n] / 2
    # P^-1 H, which q is about v times, is symmetric in the inner product of P.
    along = lambda x: v[:n] @ (P * x[:n]) / (v[:n] @ (P * v[:n]))
    return AtEnds(
        F=F,
        q=q,
        m=along(q),
        # A parameter whose gradient is always zero has a second moment of zero, where
        # the root has no derivative.
        bend=jnp.where(F == 0, 0, push_up(F) + push_down(F)) / 2 if bend else 0 * F,
        noise=(noise / (size * length)) ** 2 / 2,
    )


def rates(y: FlowState, centre: Array, direction: Array, log_size: Array) -> FlowState:
    """The time derivative of y from those of its parts."""
    _, unravel = ravel_pytree((y.weights, y.optimizer_state))
    return FlowState(*unravel(centre), {}, Oscillation(direction, log_size))


def check_oscillation(y: FlowState, previous: Any) -> None:
    if previous is not None and y.oscillation is None:
        raise ValueError("`solver_state` is that of another flow.")
