"""How the end of a long step answers to a change of the oscillations in it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PyTree

from ..krylov import Krylov, krylov
from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from ..precision import full_precision
from .base import FlowState, Work
from .expansion import Expansion, Forcing
from .stiff_modes import StiffModes, stiff_modes

# The most Hessian-vector products spent on the modes that are not tracked: for the
# response, and to damp an error estimate, which need not be as exact.
_KRYLOV, _DAMPED = 48, 12
# Of the Krylov space's first vector: without, it has no part along eigenvectors that
# the forcing does not push, however large their eigenvalues.
_NOISE = 1e-3

_matmul = full_precision(jnp.matmul)


class Response(eqx.Module):
    """The change of the end of a step that a change of the forcing makes in it: one
    that is constant, or one that is linear and zero at the middle,

        dw = dt f(-dt P^-1 H) dw/dt,      ds = dt f(dt J) ds/dt,

    with f = phi_1 or f = chi, dw/dt and ds/dt at the end of the step, and J the decay
    of the optimizer state. f is exact along the tracked eigenvectors V of
    A = P^-1/2 H P^-1/2; Q' f(Q A Q') Q in a Krylov space Q across them, which is exact
    to its degree in one direction, that of the forcing; and a number across both. Of
    chi it is the mean in that direction; of phi_1 the geometric mean of that and of 1,
    the most that a mode that decays can answer, and, with `caution`, up to 1.

    That is self-adjoint, and must be: with the mean in all directions but the one, the
    multipliers of seven eigenvalues left 20 to 90 % of the violation of the constraint
    that they were to remove.

    The direction is that in which all critical eigenvalues are pushed alike. What is
    fast in it has the largest part in it, and to other changes of their oscillations
    the end answers by 1 to 6 times that mean. Estimated by less than half of what it
    is, the correction overshoots by more than itself (`solvers/caution.py`).
    """

    optimizer: AbstractOptimizer
    y: FlowState
    dt: Float[Array, ""]
    eigenvectors: Float[Array, "k n"]
    values: Float[Array, " k"]
    space: Krylov
    caution: float | Float[Array, ""] = 0.0

    def __call__(self, constant: Forcing, linear: Forcing) -> FlowState:
        s, V, Q = self.y.optimizer_state, self.eigenvectors, self.space.basis
        root = jnp.sqrt(self.optimizer.preconditioner(s))
        decay = state_decay(self.optimizer, self.y)
        mean = along = across = 0.0
        state = jax.tree.map(jnp.zeros_like, s)
        for function, change in ((phi_1, constant), (chi, linear)):
            dw, ds = self._rate(change)
            f = lambda values, function=function: function(
                jnp.minimum(-self.dt * values, 3)
            )
            v, values = root * dw, f(self.space.nodes)
            usual = self.space.mean(values)
            if function is phi_1:
                more = jnp.maximum(usual, 0) ** (0.5 * (1 - self.caution))
                usual = jnp.where(usual < 1, more, usual)
            mean += usual * v
            along += (f(self.values) - usual) * _matmul(V, v)
            across += self.space.within(values - usual, v)
            state = jax.tree.map(
                lambda total, d, j, function=function: (
                    total + self.dt * function(self.dt * j) * d
                ),
                state,
                ds,
                decay,
            )
        weights = self.dt * (mean + _matmul(along, V) + _matmul(across, Q)) / root
        zero = jax.tree.map(jnp.zeros_like, self.y.observables)
        return FlowState(weights, state, zero)

    def of_the_last(self, share: Float[Array, ""]) -> "Response":
        """The response to a change in that share of the step, the last one."""
        return dataclasses.replace(self, dt=share * self.dt)

    def with_caution(self, caution: Float[Array, ""]) -> "Response":
        return dataclasses.replace(self, caution=caution)

    def _rate(self, change: Forcing) -> tuple[Float[Array, " n"], PyTree[Array]]:
        """What a change of the forcing makes of dw/dt and ds/dt."""
        zero, s = jnp.zeros_like(change.gradient), self.y.optimizer_state
        velocity = lambda g: self.optimizer.velocity(self.y.weights, s, g)
        _, dw = jax.jvp(velocity, (zero,), (change.gradient,))
        rate = lambda g, g_sq: self.optimizer.state_rate(s, g, g_sq)
        moments = (change.gradient, change.gradient_sq)
        return dw, jax.jvp(rate, (zero, zero), moments)[1]


class _Modes:
    """P^-1/2 H P^-1/2, along the tracked eigenvectors and across them."""

    def __init__(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        y: FlowState,
        e: Expansion,
    ):
        P = optimizer.preconditioner(y.optimizer_state)
        tracked = jnp.arange(e.sharpness.size) < e.tracked
        self.root = jnp.sqrt(P)
        self.eigenvectors = jnp.where(tracked[:, None], e.eigenvectors * self.root, 0)
        self.hessian = objective.preconditioned_hessian(y.weights, P)

    def across(self, v: Float[Array, " n"]) -> Float[Array, " n"]:
        return v - _matmul(_matmul(self.eigenvectors, v), self.eigenvectors)

    def space(
        self, v: Float[Array, " n"], count: Int[Array, ""], most: int
    ) -> tuple[Krylov, Float[Array, " n"]]:
        """The Krylov space of v's part across the tracked eigenvectors; that part."""
        v = self.across(v)
        operator = lambda x: self.across(self.hessian(x[None], 1)[0])
        return krylov(operator, v, count, most), v


def responder(
    objective: FlatObjective,
    optimizer: AbstractOptimizer,
    y: FlowState,
    e: Expansion,
    force: Float[Array, " n"],
    dt: Float[Array, ""],
    kind: Callable[..., Any],
) -> tuple[Any, StiffModes, Expansion]:
    """The response at y, of the kind that fits the optimizer, with a Krylov space of
    `force`; what that shows of the fastest modes; and the expansion, with the work
    counted."""
    modes = _Modes(objective, optimizer, y, e)
    # phi_1(-dt lambda) is close to 1/(dt lambda) down to lambda = 1/dt, and the force
    # has components at all rates. That takes about sqrt(kappa dt) products; with 0.3
    # times that a part in ten of the response is missed at long steps. If it were much
    # more then X would overshoot, back and forth from step to step.
    count = jnp.floor(2 + 0.3 * jnp.sqrt(dt * optimizer.critical_sharpness))
    count += e.affordable
    count = jnp.where(e.critical > 0, jnp.minimum(count, _KRYLOV), 0).astype(jnp.int32)
    v = force / modes.root
    noise = jr.normal(jr.fold_in(jr.key(2), e.calls), v.shape, v.dtype)
    noise = _NOISE * jnp.linalg.norm(v) / jnp.sqrt(v.size) * noise
    space, _ = modes.space(v + noise, count, _KRYLOV)
    V, values = modes.eigenvectors, e.sharpness
    response = kind(optimizer, y, dt, V, values, space)
    stiff = stiff_modes(V, values, e.residuals, e.tracked, space)
    return response, stiff, dataclasses.replace(e, work=e.work + Work(hvps=count))


def damped(
    objective: FlatObjective,
    optimizer: AbstractOptimizer,
    y: FlowState,
    e: Expansion,
    defect: Float[Array, " n"],
    dt: Float[Array, ""],
) -> tuple[Float[Array, " n"], Int[Array, ""]]:
    """(1 + dt P^-1 H / 2)^-2 applied to the defect of a step; and the number of
    Hessian-vector products.

    The defect is dt times a rate. Of fast modes that were not in equilibrium when the
    step began it is dt lambda times their distance from it; but they decay within the
    step. Damped once, the estimate would still be that distance, for any dt.
    """
    modes = _Modes(objective, optimizer, y, e)
    damp = lambda values: (1 + 0.5 * dt * jnp.maximum(values, 0)) ** -2
    # In short steps the errors that this leaves are real enough to count, but where
    # many third derivatives are to be saved.
    count = jnp.floor(jnp.log2(1 + dt * optimizer.critical_sharpness) - 5)
    count = jnp.clip(count + e.affordable, 0, _DAMPED).astype(jnp.int32)
    v, V = modes.root * defect, modes.eigenvectors
    along = _matmul(damp(e.sharpness) * _matmul(V, v), V)
    space, rest = modes.space(v, count, _DAMPED)
    spread = jnp.linalg.norm(rest) * _matmul(space.coefficients(damp), space.basis)
    return (along + jnp.where(count > 0, spread, rest)) / modes.root, count


def phi_1(z: Array) -> Array:
    """(e^z - 1) / z."""
    small = jnp.abs(z) < 1e-3
    return jnp.where(small, 1 + z / 2, jnp.expm1(z) / jnp.where(small, 1, z))


def chi(z: Array) -> Array:
    """phi_2(z) - phi_1(z) / 2, with phi_2(z) = (phi_1(z) - 1) / z: the end of
    y' = z y + t - 1/2 from y = 0, at t = 1."""
    small = jnp.abs(z) < 0.2
    series = -z / 12 * (1 + z / 2 + 3 * z**2 / 20 + z**3 / 30 + z**4 / 168)
    safe = jnp.where(small, 1, z)
    return jnp.where(small, series, (phi_1(z) - 1) / safe - phi_1(z) / 2)


def state_decay(optimizer: AbstractOptimizer, y: FlowState) -> PyTree[Array]:
    """J = d(ds/dt)/ds, entry by entry: the entries of an optimizer state are coupled
    by the gradient only."""
    zero = jnp.zeros_like(y.weights)
    ones = jax.tree.map(jnp.ones_like, y.optimizer_state)
    rate = lambda s: optimizer.state_rate(s, zero, zero)
    return jax.jvp(rate, (y.optimizer_state,), (ones,))[1]


def relaxed_state(
    optimizer: AbstractOptimizer, y: FlowState, rate: FlowState, dt: Float[Array, ""]
) -> PyTree[Array]:
    """The optimizer state after dt, if what drives it stayed as it is."""
    return jax.tree.map(
        lambda s, r, j: s + dt * phi_1(dt * j) * r,
        y.optimizer_state,
        rate.optimizer_state,
        state_decay(optimizer, y),
    )
