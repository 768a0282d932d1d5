"""Methods with momentum: long steps of modes that ring."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..krylov import Krylov
from ..optimizers import AbstractOptimizer
from ..precision import full_precision
from .base import FlowState
from .expansion import Forcing
from .response import phi_1, state_decay

# The flow dw/dt = -P^-1 m, dm/dt = c (g - m) has, for a mode with eigenvalue s of
# P^-1 H, the rates lambda^2 + c lambda + c s = 0: all but the slowest ring, with
# sqrt(c s), and decay with c/2 only. No explicit method takes steps much longer than
# 1/sqrt(c s), which at the edge is 1/2 for any beta near 1. A step of the central flow
# is therefore made of steps of this length, each with one gradient, at forcings that
# do not change. (Steps of length 1 are those of the optimizer, at the limit of their
# stability; at 1/2 the limit is four times as far.)
_LENGTH = 0.5
_matmul = full_precision(jnp.matmul)


def leapfrog(
    term: Any, y0: FlowState, slope: Any, forcing: Forcing, dt: Float[Array, ""]
) -> tuple[FlowState, FlowState, Int[Array, ""], Float[Array, ""]]:
    """y after dt; the last rate; the number of gradients; and the loss at the middle.

    The weights go half a step, m a whole one, the weights another half. Second order.
    """
    count = jnp.maximum(2 * jnp.ceil(dt / (2 * _LENGTH)), 2).astype(jnp.int32)
    h = dt / count
    drift = lambda y, velocity, share: FlowState(
        y.weights + share * h * velocity, y.optimizer_state, y.observables
    )
    add = lambda y, rate: jax.tree.map(lambda a, b: a + h * b, y, rate)

    def step(i, carry):
        y, _, middle = carry
        slope = term.slope(y)
        rate = term.rate(y, slope, forcing, h)
        # Here y is half a step ahead.
        early, late = i == count // 2 - 1, i == count // 2
        middle = middle + jnp.where(early | late, slope.loss / 2, 0)
        return add(y, rate), rate, middle

    first = term.rate(y0, slope, forcing, 0 * h)
    carry = (drift(y0, first.weights, 0.5), first, jnp.zeros_like(slope.loss))
    y, last, middle = jax.lax.fori_loop(0, count, step, carry)
    return drift(y, last.weights, -0.5), last, count, middle


class RingingResponse(eqx.Module):
    """As [`centralflow.flows.response.Response`][], for a method with momentum: what
    `leapfrog` makes of a change of the forcing, mode by mode.

    `along` and `across` hold, for the tracked eigenvalues and for the nodes of the
    Krylov space, the changes of the weights and of m, in units of those of P^-1 g, by a
    forcing that is constant and one that is linear, and of the velocity at the end:
    [2, 3, k] and [2, 3, m].
    """

    optimizer: AbstractOptimizer
    y: FlowState
    dt: Float[Array, ""]
    eigenvectors: Float[Array, "k n"]
    space: Krylov
    along: Float[Array, "2 3 k"]
    across: Float[Array, "2 3 m"]

    def __init__(
        self,
        optimizer: AbstractOptimizer,
        y: FlowState,
        dt: Float[Array, ""],
        eigenvectors: Float[Array, "k n"],
        values: Float[Array, " k"],
        space: Krylov,
    ):
        self.optimizer, self.y, self.dt = optimizer, y, dt
        self.eigenvectors, self.space = eigenvectors, space
        self.along = _modes(optimizer, y, dt, values)
        self.across = _modes(optimizer, y, dt, space.nodes)

    def __call__(self, constant: Forcing, linear: Forcing) -> FlowState:
        root = jnp.sqrt(self.optimizer.preconditioner(self.y.optimizer_state))
        state = self._state_change(constant)
        m = self._apply(1, root, constant, linear) * root
        state = eqx.tree_at(lambda s: s.m, state, m)
        return self._flow_state(self._apply(0, root, constant, linear) / root, state)

    def rate(self, constant: Forcing, linear: Forcing) -> FlowState:
        """The change of the rates of weights and state at the end of the step, that of
        m apart, of which nothing else depends at once."""
        root = jnp.sqrt(self.optimizer.preconditioner(self.y.optimizer_state))
        at_end = jax.tree.map(lambda a, b: a + b / 2, constant, linear)
        state = self._state_rate(at_end)
        return self._flow_state(self._apply(2, root, constant, linear) / root, state)

    def _flow_state(self, weights: Float[Array, " n"], state: PyTree) -> FlowState:
        zero = jax.tree.map(jnp.zeros_like, self.y.observables)
        return FlowState(weights, state, zero)

    def _apply(
        self, part: int, root: Array, constant: Forcing, linear: Forcing
    ) -> Float[Array, " n"]:
        V, space = self.eigenvectors, self.space
        mean = along = across = 0.0
        for kind, forcing in enumerate((constant, linear)):
            v, values = forcing.gradient / root, self.across[kind, part]
            usual = space.mean(values)
            mean += usual * v
            along += (self.along[kind, part] - usual) * _matmul(V, v)
            across += space.within(values - usual, v)
        return mean + _matmul(along, V) + _matmul(across, space.basis)

    def _state_change(self, forcing: Forcing) -> PyTree[Array]:
        """Of the second moments, slow next to m: by the constant part alone."""
        relax = lambda d, j: self.dt * phi_1(self.dt * j) * d
        decay = state_decay(self.optimizer, self.y)
        return jax.tree.map(relax, self._state_rate(forcing), decay)

    def _state_rate(self, forcing: Forcing) -> PyTree[Array]:
        zero, s = jnp.zeros_like(forcing.gradient), self.y.optimizer_state
        rate = lambda g, g_sq: self.optimizer.state_rate(s, g, g_sq)
        moments = (forcing.gradient, forcing.gradient_sq)
        return jax.jvp(rate, (zero, zero), moments)[1]


def _modes(
    optimizer: AbstractOptimizer,
    y: FlowState,
    dt: Float[Array, ""],
    values: Float[Array, " k"],
) -> Float[Array, "2 3 k"]:
    """x, mu and dx/dt at the end of a step, for modes x of the weights and mu of P^-1 m
    that are 0 at its start, with the gradient s x + f(t), f = 1 or t / dt - 1/2."""
    count = jnp.maximum(2 * jnp.ceil(dt / (2 * _LENGTH)), 2).astype(jnp.int32)
    h = dt / count
    s = y.optimizer_state
    P = jnp.broadcast_to(optimizer.preconditioner(s), y.weights.shape)
    zero = jnp.zeros_like(y.weights)

    def rates(m, gradient, h=h):
        at = eqx.tree_at(lambda s: s.m, s, m)
        velocity, rate = optimizer.step_rates(y.weights, at, gradient, zero, h)
        return velocity, rate.m / P

    # Linear, with the same coefficients for all parameters.
    slopes = lambda fn: [x[0] for x in jax.jvp(fn, (zero,), (P,))[1]]
    by_m = slopes(lambda m: rates(m, zero))
    by_g = slopes(lambda g: rates(zero, g))
    at_start = slopes(lambda g: rates(zero, g, 0 * h))
    # A mode of negative curvature would grow beyond what a step can be wrong by.
    values = jnp.maximum(values, -3 / jnp.maximum(dt, 1) ** 2)[None]

    forcing = lambda share: jnp.stack([jnp.ones_like(share), share - 0.5])[:, None]

    def step(i, carry):
        x, mu, _ = carry
        f = forcing(((i + 0.5) / count).astype(values.dtype))
        gradient = values * x + f
        velocity = by_m[0] * mu + by_g[0] * gradient
        mu = mu + h * (by_m[1] * mu + by_g[1] * gradient)
        return x + h * velocity, mu, velocity

    none = jnp.zeros((2, values.shape[1]), values.dtype)
    x = none + h / 2 * at_start[0] * forcing(jnp.zeros_like(h))
    x, mu, last = jax.lax.fori_loop(0, count, step, (x, none, none))
    return jnp.stack([x - h / 2 * last, mu, last], axis=1)
