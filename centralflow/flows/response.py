"""How the end of a long step answers to a change of the oscillations in it."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..krylov import Krylov, krylov
from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from ..precision import full_precision
from ..solvers.rkc import Polynomial
from .base import FlowState, Work
from .expansion import Expansion, Forcing

# The most Hessian-vector products spent on the modes that are not tracked: for the
# response, and to damp an error estimate, which need not be as exact.
_KRYLOV, _DAMPED = 48, 12

_matmul = full_precision(jnp.matmul)


class Response(eqx.Module):
    """The change of the end of a step that a constant change of the forcing makes:

        dw = dt psi(-dt P^-1 H) dw/dt,      ds = dt phi_1(dt J) ds/dt,

    with psi(z) = (R(z) - 1)/z the response of the Runge-Kutta step, which is close to
    phi_1, and J the decay of the optimizer state. psi is exact along the tracked
    eigenvectors V of P^-1/2 H P^-1/2; exact to the degree of the Krylov space in one
    direction across them, that of the forcing; and its mean there, psi_0, in the other
    directions.
    """

    optimizer: AbstractOptimizer
    y: FlowState
    dt: Float[Array, ""]
    eigenvectors: Float[Array, "k n"]
    along: Float[Array, " k"]
    space: Krylov
    across: Float[Array, " m"]  # psi applied to the first vector of the space

    def __call__(self, change: Forcing) -> FlowState:
        zero, s = jnp.zeros_like(change.gradient), self.y.optimizer_state
        velocity = lambda g: self.optimizer.velocity(self.y.weights, s, g)
        _, dw = jax.jvp(velocity, (zero,), (change.gradient,))
        rate = lambda g, g_sq: self.optimizer.state_rate(s, g, g_sq)
        moments = (change.gradient, change.gradient_sq)
        _, ds = jax.jvp(rate, (zero, zero), moments)
        decay = state_decay(self.optimizer, self.y)
        ds = jax.tree.map(lambda d, j: self.dt * phi_1(self.dt * j) * d, ds, decay)

        root = jnp.sqrt(self.optimizer.preconditioner(s))
        v, V, psi_0 = root * dw, self.eigenvectors, self.across[0]
        tracked = _matmul((self.along - psi_0) * _matmul(V, v), V)
        push = jnp.dot(self.space.basis[0], v, precision="highest")
        others = push * _matmul(self.across.at[0].set(0), self.space.basis)
        weights = self.dt * (psi_0 * v + tracked + others) / root
        return FlowState(weights, ds, jax.tree.map(jnp.zeros_like, self.y.observables))


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
    R: Polynomial,
) -> tuple[Response, Expansion]:
    """The response at y, with a Krylov space of `force`; and the expansion, with the
    work counted."""
    modes = _Modes(objective, optimizer, y, e)
    # psi(-dt lambda) is close to 1/(dt lambda) down to lambda = 1/dt, and the force has
    # components at all rates. That takes about sqrt(kappa dt) products; with 0.4 times
    # that a part in ten of the response is missed at dt = 50, 200, 1,000 and 4,000. If
    # it were much more then X would overshoot, back and forth from step to step.
    count = jnp.floor(2 + 0.4 * jnp.sqrt(dt * optimizer.critical_sharpness))
    count = jnp.where(e.critical > 0, jnp.minimum(count, _KRYLOV), 0).astype(jnp.int32)
    space, _ = modes.space(force / modes.root, count, _KRYLOV)
    psi = lambda values: R.response(jnp.minimum(-dt * values, 3))
    along, across = psi(e.sharpness), space.coefficients(psi)
    response = Response(optimizer, y, dt, modes.eigenvectors, along, space, across)
    return response, dataclasses.replace(e, work=e.work + Work(hvps=count))


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
    count = jnp.floor(jnp.log2(1 + dt * optimizer.critical_sharpness) - 4)
    count = jnp.clip(count, 0, _DAMPED).astype(jnp.int32)
    v, V = modes.root * defect, modes.eigenvectors
    along = _matmul(damp(e.sharpness) * _matmul(V, v), V)
    space, rest = modes.space(v, count, _DAMPED)
    spread = jnp.linalg.norm(rest) * _matmul(space.coefficients(damp), space.basis)
    return (along + jnp.where(count > 0, spread, rest)) / modes.root, count


def phi_1(z: Array) -> Array:
    """(e^z - 1) / z."""
    small = jnp.abs(z) < 1e-3
    return jnp.where(small, 1 + z / 2, jnp.expm1(z) / jnp.where(small, 1, z))


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
