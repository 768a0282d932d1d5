"""The equation of the central flow.

Notation, as in the literature: w weights, s optimizer state, P(s) preconditioner,
g = grad L, H = Hessian, kappa = critical sharpness; the rows u_i of U are the top
eigenvectors of P^-1 H with eigenvalues lambda_i, normalized to U P U' = I; the iterate
is w + delta with E[delta] = 0 and E[delta delta'] = Sigma = U' X U.
"""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from ..eigen import scouted, top_eigenpairs
from ..failures import Failure, eigen_failure, first_of, largest, slope_failure, when
from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from ..precision import full_precision
from ..results import RESULTS
from ..solvers import AbstractComplementarityTerm
from .base import FlowState, Work
from .expansion import Expansion, Forcing, Slope, Staleness
from .observables import record, without_oscillations

# Eigenvectors tracked beyond the critical ones, so that the next to become critical is
# known before it does.
GUARDS = 2


class CentralTerm(AbstractComplementarityTerm):
    """The central flow as a differential equation with a complementarity constraint."""

    objective: FlatObjective
    optimizer: AbstractOptimizer
    metrics: dict[str, Callable]
    coordinates: Int[Array, " C"]
    block_size: int = eqx.field(static=True)
    eigen_tolerance: Float[Array, ""]
    renew_every: Int[Array, ""]  # so many steps
    margin: Float[Array, ""]  # of the critical set, over the critical sharpness

    # The equation.

    def slope(self, y: FlowState) -> Slope:
        return Slope(*self.objective.value_and_grad(y.weights))

    @full_precision
    def forcing(self, y: FlowState, e: Expansion, X: Float[Array, "k k"]) -> Forcing:
        """E[g] - g = (1/2) sum_ij X_ij D_ij and E[g * g] - g * g = diag(H Sigma H),
        with H u_i = kappa P u_i, which holds wherever X is not zero and makes the
        constraint's dependence on X symmetric."""
        i, j = np.tril_indices(self.room(y))
        force = 0.5 * (jnp.where(i == j, 1, 2) * X[i, j]) @ e.forces
        P = self.optimizer.preconditioner(y.optimizer_state)
        HU = self.optimizer.critical_sharpness * P * e.eigenvectors
        return Forcing(force, jnp.sum(HU * (X @ HU), axis=0))

    def rate(
        self, y: FlowState, slope: Slope, forcing: Forcing, dt: Float[Array, ""]
    ) -> FlowState:
        """dw/dt = velocity(w, s, E[g]) and ds/dt = state_rate(s, E[g], E[g * g])."""
        g = slope.gradient
        mean, mean_sq = g + forcing.gradient, g * g + forcing.gradient_sq
        weights, state = self.optimizer.step_rates(
            y.weights, y.optimizer_state, mean, mean_sq, dt
        )
        return FlowState(weights, state, jax.tree.map(jnp.zeros_like, y.observables))

    def vf(self, t, y: FlowState, args) -> FlowState:
        """The rate at X = 0: the stable flow."""
        zero = jnp.zeros_like(y.weights)
        return self.rate(y, self.slope(y), Forcing(zero, zero), t - t)

    @property
    def memory(self) -> float | Float[Array, ""]:
        return self.optimizer.memory

    # The constraint C = U (kappa P - H) U'.

    def constraint(self, e: Expansion) -> Float[Array, "k k"]:
        return self.optimizer.critical_sharpness * e.gram - e.hessian

    @full_precision
    def constraint_rate(
        self, y: FlowState, e: Expansion, rate: FlowState
    ) -> Float[Array, "k k"]:
        """dC_ij/dt = kappa u_i' dP/dt u_j - D_ij . dw/dt."""
        kappa, U = self.optimizer.critical_sharpness, e.eigenvectors
        _, dP = jax.jvp(
            self.optimizer.preconditioner, (y.optimizer_state,), (rate.optimizer_state,)
        )
        i, j = np.tril_indices(self.room(y))
        dH = e.forces @ rate.weights
        dH = jnp.zeros_like(e.hessian).at[i, j].set(dH).at[j, i].set(dH)
        return kappa * (U * dP) @ U.T - dH

    @full_precision
    def drift(self, y: FlowState, e: Expansion, rate: FlowState) -> FlowState:
        """Without what the tracked modes do, if they ring: with momentum they return,
        several times within the memory."""
        if not self.optimizer.has_memory:
            return rate
        P, U = self.optimizer.preconditioner(y.optimizer_state), e.eigenvectors
        fast = jnp.arange(self.block_size) < e.tracked
        fast &= e.sharpness > 0.1 * self.optimizer.critical_sharpness
        along = jnp.where(fast, U @ (P * rate.weights), 0)
        weights = rate.weights - along @ U
        return FlowState(weights, rate.optimizer_state, rate.observables)

    def active(self, e: Expansion) -> Int[Array, ""]:
        return e.critical

    def count_critical(self, sharpness: Float[Array, " k"]) -> Int[Array, ""]:
        """How many eigenvalues are so near the critical one that they may reach it
        before the eigenvectors are computed anew."""
        return jnp.sum(sharpness > self.edge, dtype=jnp.int32)

    @property
    def edge(self) -> Float[Array, ""]:
        return (1 - self.margin) * self.optimizer.critical_sharpness

    def record(self, y: FlowState, e: Expansion, X: Float[Array, "k k"]) -> FlowState:
        return record(self, y, e, X)

    def failure(self, y: FlowState, e: Expansion) -> Failure:
        third = largest(e.forces)
        # A part of the oscillation's own that is not finite has no other cause.
        of_X = y.observables["oscillating"]["loss"] if y.observables else 0.0
        return first_of(
            slope_failure(y.weights, e.slope.loss, e.slope.gradient),
            eigen_failure(
                e.sharpness,
                e.residuals,
                jnp.arange(self.block_size) < e.known,
                self.optimizer.critical_sharpness,
                self.eigen_tolerance,
            ),
            when(~jnp.isfinite(third), RESULTS.nonfinite_third_derivative, third),
            when(~jnp.isfinite(of_X), RESULTS.diverged, of_X),
        )

    def without_oscillations(self, y: FlowState) -> FlowState:
        return without_oscillations(y)

    # The expansion.

    def expand(self, y: FlowState, previous: Expansion | None) -> Expansion:
        if previous is None or previous.eigenvectors.shape[0] != self.block_size:
            return self._renewed(y, previous)
        return jax.lax.cond(
            previous.age + 1 < self.renew_every,
            lambda: self._reused(y, previous),
            lambda: self._renewed(y, previous),
        )

    def _reused(self, y: FlowState, previous: Expansion) -> Expansion:
        root = jnp.sqrt(self.optimizer.preconditioner(y.optimizer_state))
        U, known = previous.eigenvectors * (previous.root / root), previous.known
        quotients = jnp.sum(U * self.objective.hvps(y.weights, U, known), axis=1)
        sharpness = jnp.where(
            jnp.arange(self.block_size) < known, quotients, previous.sharpness
        )
        return dataclasses.replace(
            previous,
            slope=self.slope(y),
            sharpness=sharpness,
            hessian=jnp.diag(sharpness),
            eigenvectors=U,
            root=root,
            age=previous.age + 1,
            work=previous.work + Work(gradients=1, hvps=known),
        )

    def _renewed(self, y: FlowState, previous: Expansion | None) -> Expansion:
        slope = self.slope(y)
        if previous is None:
            k = self.block_size
            e = self.spectrum(y, None, k, max(k - GUARDS, 1))
        else:
            start = previous.eigenvectors
            e = self.spectrum(y, previous, *self.followed(previous), start=start)
            e = dataclasses.replace(e, work=previous.work + e.work)
        work = e.work + Work(gradients=1)
        return self.with_forces(y, dataclasses.replace(e, slope=slope, work=work))

    def room(self, y: FlowState) -> int:
        """How many eigenvalues may be critical: if there are more, the block is to be
        enlarged."""
        k = self.block_size
        return k if k >= y.weights.size else max(k - GUARDS, 1)

    def with_forces(self, y: FlowState, e: Expansion) -> Expansion:
        U = e.eigenvectors[: self.room(y)]
        return dataclasses.replace(
            e,
            forces=self.objective.thirds(y.weights, U, e.critical),
            staleness=Staleness.of(True, y.weights.dtype),
            work=e.work + Work(third_derivatives=e.pairs),
        )

    def followed(self, previous: Expansion) -> tuple[Array, Array]:
        k = self.block_size
        count = jnp.minimum(previous.critical + GUARDS, k)
        return count, jnp.minimum(previous.critical + 1, k)

    def spectrum(
        self,
        y: FlowState,
        previous: Expansion | None,
        count: int | Int[Array, ""],
        wanted: int | Int[Array, ""],
        start: Float[Array, "j n"] | None = None,
        tolerance: Float[Array, ""] | None = None,
    ) -> Expansion:
        """An expansion of which only the eigenpairs are known, to the usual tolerance
        or to a smaller one."""
        w, k = y.weights, self.block_size
        P = self.optimizer.preconditioner(y.optimizer_state)
        tolerance = self.eigen_tolerance if tolerance is None else tolerance
        if start is None:
            start, calls, sweeps = jr.normal(jr.key(0), (k, w.size), w.dtype), 0, 200
        else:
            start, calls, sweeps = start * jnp.sqrt(P), previous.calls + 1, 20
            missing = k - start.shape[0]
            if missing:
                extra = jr.normal(jr.key(k), (missing, w.size), w.dtype)
                start = jnp.concatenate([start, extra])
        pairs = top_eigenpairs(
            self.objective.preconditioned_hessian(w, P),
            start,
            count,
            wanted,
            tolerance=tolerance.astype(w.dtype),
            max_sweeps=sweeps,
            above=self.edge,
            # Looks for eigenvectors that cannot be seen from those tracked.
            key=jr.fold_in(jr.key(1), calls),
        )
        above = jnp.minimum(self.count_critical(pairs.values), count)
        known = jnp.maximum(wanted, above)
        room = self.room(y)
        critical = jnp.minimum(above, room)
        # There may be fewer eigenvalues than rows.
        exists = ~jnp.isneginf(pairs.values)
        sharpness = jnp.where(exists, pairs.values, 0)
        residual = jnp.max(
            jnp.where((jnp.arange(k) < known) & exists, pairs.residuals, 0)
        )
        largest = jnp.max(jnp.abs(sharpness))
        residual = residual / jnp.where(largest > 0, largest, 1)
        return Expansion(
            slope=Slope(jnp.zeros((), w.dtype), jnp.zeros_like(w)),
            sharpness=sharpness,
            residuals=jnp.where(exists, pairs.residuals, 0),
            eigenvectors=scouted(pairs, count) / jnp.sqrt(P),
            hessian=jnp.diag(sharpness),
            gram=jnp.eye(k, dtype=w.dtype),
            forces=jnp.zeros((room * (room + 1) // 2, w.size), w.dtype),
            staleness=Staleness.of(False, w.dtype),
            tracked=jnp.asarray(count, jnp.int32),
            known=known,
            critical=critical,
            held=jnp.int32(0),
            excess=jnp.zeros((), w.dtype),
            coupled=jnp.int32(0),
            root=jnp.sqrt(P),
            age=jnp.int32(0),
            calls=jnp.asarray(calls, jnp.int32),
            work=Work(
                hvps=pairs.products,
                unconverged=(~pairs.converged).astype(jnp.int32),
                eigen_residual=residual,
            ),
        )
