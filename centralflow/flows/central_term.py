"""The equation of the central flow, and what long steps need of it.

Notation, as in the literature: w weights, s optimizer state, P(s) preconditioner,
g = grad L, H = Hessian, kappa = critical sharpness; the rows u_i of U are the top
eigenvectors of P^-1 H with eigenvalues lambda_i, normalized to U P U' = I; the iterate
is w + delta with E[delta] = 0 and E[delta delta'] = Sigma = U' X U.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..eigen import top_eigenpairs
from ..failures import Failure, eigen_failure, first_of, largest, slope_failure, when
from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from ..precision import full_precision
from ..results import RESULTS
from ..solvers import AbstractStiffComplementarityTerm, Step
from .base import FlowState, Work
from .coupling import coupling
from .dense import crossing
from .expansion import Expansion, Forcing, Slope
from .leapfrog import RingingResponse, leapfrog
from .observables import record, without_oscillations
from .response import Response, damped, relaxed_state, responder, state_decay
from .step_error import approach, errors
from .stiff_modes import StiffModes, none_known

# Eigenvectors tracked beyond the critical ones, so that the next to become critical is
# known before it does.
GUARDS = 2
# By how much slowed modes may be faster than they should, for having turned in a step.
_TURNED = 1.3
# An eigenvector counts as critical if leaving it out would let the sharpness exceed the
# critical one by this share of the tolerance. (What it adds grows with the fourth power
# of the step: twice as long, and it is a third.)
_COUPLED = 0.02

_matmul = full_precision(jnp.matmul)


class CentralTerm(AbstractStiffComplementarityTerm):
    """The central flow as a differential equation with a complementarity constraint."""

    objective: FlatObjective
    optimizer: AbstractOptimizer
    metrics: dict[str, Callable]
    coordinates: Int[Array, " C"]
    block_size: int = eqx.field(static=True)
    eigen_tolerance: Float[Array, ""]
    renew_every: Int[Array, ""]  # so many short steps
    margin: Float[Array, ""]  # of the critical set, over the critical sharpness
    rtol: Float[Array, ""]  # of long steps

    # The equation.

    def slope(self, y: FlowState) -> Slope:
        return Slope(*self.objective.value_and_grad(y.weights))

    @full_precision
    def forcing(self, y: FlowState, e: Expansion, X: Float[Array, "k k"]) -> Forcing:
        """E[g] - g = (1/2) sum_ij X_ij D_ij and E[g * g] - g * g = diag(H Sigma H),
        with H u_i = kappa P u_i, which holds wherever X is not zero and makes the
        constraint's dependence on X symmetric."""
        i, j = np.tril_indices(self._room(y))
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
        observables = jax.tree.map(jnp.zeros_like, y.observables)
        if observables:
            observables["smooth"]["loss"] = g @ weights
        return FlowState(weights, state, observables)

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
        i, j = np.tril_indices(self._room(y))
        dH = e.forces @ rate.weights
        dH = jnp.zeros_like(e.hessian).at[i, j].set(dH).at[j, i].set(dH)
        return kappa * (U * dP) @ U.T - dH

    @full_precision
    def drift(self, y: FlowState, e: Expansion, rate: FlowState) -> FlowState:
        """Without what the tracked modes do, if they ring: with momentum they return,
        several times within the memory."""
        if not self.rings:
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
            e = self._spectrum(y, None, k, max(k - GUARDS, 1))
        else:
            start = previous.eigenvectors
            e = self._spectrum(y, previous, *self._followed(previous), start=start)
            e = dataclasses.replace(e, work=previous.work + e.work)
        work = e.work + Work(gradients=1, third_derivatives=e.pairs)
        return dataclasses.replace(e, slope=slope, forces=self._forces(y, e), work=work)

    def _room(self, y: FlowState) -> int:
        """How many eigenvalues may be critical: if there are more, the block is to be
        enlarged."""
        k = self.block_size
        return k if k >= y.weights.size else max(k - GUARDS, 1)

    def _forces(self, y: FlowState, e: Expansion) -> Float[Array, "m n"]:
        U = e.eigenvectors[: self._room(y)]
        return self.objective.thirds(y.weights, U, e.critical)

    def _followed(self, previous: Expansion) -> tuple[Array, Array]:
        k = self.block_size
        count = jnp.minimum(previous.critical + GUARDS, k)
        return count, jnp.minimum(previous.critical + 1, k)

    def _spectrum(
        self,
        y: FlowState,
        previous: Expansion | None,
        count: int | Int[Array, ""],
        wanted: int | Int[Array, ""],
        start: Float[Array, "j n"] | None = None,
    ) -> Expansion:
        """An expansion of which only the eigenpairs are known."""
        w, k = y.weights, self.block_size
        P = self.optimizer.preconditioner(y.optimizer_state)
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
            tolerance=self.eigen_tolerance.astype(w.dtype),
            max_sweeps=sweeps,
            above=self.edge,
            # Looks for eigenvectors that a symmetry hides from those tracked.
            key=jr.fold_in(jr.key(1), calls),
        )
        above = jnp.minimum(self.count_critical(pairs.values), count)
        known = jnp.maximum(wanted, above)
        room = self._room(y)
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
            eigenvectors=pairs.vectors / jnp.sqrt(P),
            hessian=jnp.diag(sharpness),
            gram=jnp.eye(k, dtype=w.dtype),
            forces=jnp.zeros((room * (room + 1) // 2, w.size), w.dtype),
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

    # Long steps.

    @full_precision
    def reach(
        self,
        y: FlowState,
        rate: FlowState,
        e: Expansion,
        stiff: StiffModes,
        dt: Float[Array, ""],
    ) -> Float[Array, ""]:
        # P may fall in the step, the decay of the learning rate or of nu permitting.
        U = e.eigenvectors
        seen = (jnp.arange(self.block_size) < e.tracked) & (e.sharpness > 0)

        slowness = stiff.slowness(e.sharpness, dt)
        sharpness = e.sharpness * jnp.minimum(_TURNED * slowness, 1)

        squares = U * U

        def largest(share):
            state = relaxed_state(self.optimizer, y, rate, share * dt)
            P = self.optimizer.preconditioner(state)
            norms = squares @ P if P.ndim else P * jnp.sum(squares, axis=1)
            return jnp.max(jnp.where(seen, sharpness / norms, 0))

        shares = jnp.linspace(0, 1, 17, dtype=dt.dtype)
        rates = [0.1 * self.optimizer.critical_sharpness]  # at least
        rates.append(jnp.max(jax.lax.map(largest, shares)))
        for decay in jax.tree.leaves(state_decay(self.optimizer, y)):
            rates.append(jnp.max(jnp.abs(decay)))
        # H changes in the step, too.
        return 1.1 * dt * jnp.max(jnp.stack([jnp.asarray(r, dt.dtype) for r in rates]))

    def expand_ahead(
        self, y: FlowState, previous: Any, before: Any, ratio: Any
    ) -> Expansion:
        if previous is None:
            return self._spectrum(y, None, self.block_size, min(3, self.block_size))
        start = previous.eigenvectors
        if start.shape[0] == self.block_size:
            # What of U the step before changed, once more.
            P = self.optimizer.preconditioner(y.optimizer_state)
            old = before.eigenvectors * jnp.sqrt(P)
            norm = jnp.linalg.norm(old, axis=1, keepdims=True)
            old = jnp.where(norm > 0, old / jnp.where(norm > 0, norm, 1), 0)
            V = start * jnp.sqrt(P)
            change = V - _matmul(_matmul(V, old.T), old)
            start = (V + jnp.minimum(ratio, 2) * change) / jnp.sqrt(P)
        count, wanted = self._followed(previous)
        count = jnp.minimum(count + previous.affordable, self.block_size)
        close = self.count_critical(previous.sharpness)
        close = jnp.minimum(jnp.minimum(close, self._room(y)), count)
        wanted = jnp.maximum(wanted, close)
        e = self._spectrum(y, previous, count, wanted, start=start)
        # What was at the edge, or close, may be predicted far below it, for being held
        # too much: once that is corrected it is back, and may be beyond. Without
        # oscillations and below the edge there is nothing to solve for.
        critical = jnp.maximum(jnp.maximum(e.critical, previous.held), close)
        critical = jnp.maximum(critical, jnp.minimum(previous.coupled, self._room(y)))
        critical = jnp.minimum(critical, e.tracked)
        below = e.sharpness[0] < self.optimizer.critical_sharpness
        critical = jnp.where(below & (previous.held == 0), 0, critical)
        e = dataclasses.replace(e, critical=critical)
        work = e.work + Work(third_derivatives=e.pairs)
        return dataclasses.replace(e, forces=self._forces(y, e), work=work)

    def no_stiff_modes(self, y: FlowState) -> StiffModes:
        return none_known(y.weights.size, y.weights.dtype)

    def slowed(
        self,
        y: FlowState,
        slope: Slope,
        rate: FlowState,
        stiff: StiffModes,
        dt: Float[Array, ""],
    ) -> FlowState:
        P = self.optimizer.preconditioner(y.optimizer_state)
        weights = stiff.slowed(rate.weights, P, dt)
        rate = FlowState(weights, rate.optimizer_state, rate.observables)
        if rate.observables:
            rate.observables["smooth"]["loss"] = slope.gradient @ weights
        return rate

    def responder(
        self, y: FlowState, e: Expansion, dt: Float[Array, ""]
    ) -> tuple[Callable, StiffModes, Expansion]:
        active = jnp.arange(self.block_size) < e.critical
        force = self.forcing(y, e, jnp.diag(active.astype(dt.dtype))).gradient
        kind = RingingResponse if self.rings else Response
        finite = jnp.isfinite(largest((y.weights, e.sharpness, force)))
        response, stiff, e = responder(
            self.objective, self.optimizer, y, e, force, dt, kind
        )
        return response, stiff, _doubted(e, finite, response.space.nodes)

    @property
    def rings(self) -> bool:
        return self.optimizer.has_memory

    def ring(
        self, y: FlowState, slope: Slope, forcing: Forcing, dt: Float[Array, ""]
    ) -> tuple[FlowState, FlowState, Int[Array, ""], Float[Array, ""]]:
        return leapfrog(self, y, slope, forcing, dt)

    def complete(self, y: FlowState, e: Expansion, X, stages, converged) -> Expansion:
        P, U = self.optimizer.preconditioner(y.optimizer_state), e.eigenvectors
        active = jnp.arange(self.block_size) < e.critical
        block = active[:, None] & active
        images = self.objective.hvps(y.weights, U, e.critical)
        gram = jnp.where(block, _matmul(U * P, U.T), e.gram)
        tracked = jnp.arange(self.block_size) < e.tracked
        kappa = self.optimizer.critical_sharpness
        now = coupling(U, images, P, gram, e.sharpness, active, tracked, kappa)
        variances = jnp.linalg.eigvalsh(X)
        held = jnp.sum(variances > 1e-3 * jnp.max(variances), dtype=jnp.int32)
        enough = now.lost < _COUPLED * self.rtol * kappa
        enough &= jnp.arange(self.block_size) >= held
        work = Work(
            gradients=stages,  # one less in the step, and one at its end
            hvps=e.critical,
            unconverged=(~converged).astype(jnp.int32),
        )
        return dataclasses.replace(
            e,
            slope=self.slope(y),
            sharpness=now.values[::-1],
            hessian=now.hessian,
            gram=gram,
            forces=e.forces[:0],
            held=held,
            excess=now.excess,
            coupled=jnp.argmax(enough).astype(jnp.int32),
            work=e.work + work,
        )

    def begins(self, before: Expansion) -> Bool[Array, ""]:
        return before.held == 0

    def settled(
        self, before: Expansion, after: Expansion, onset: Float[Array, ""]
    ) -> Bool[Array, ""]:
        return (after.held > 0) & ((before.held == after.held) | (onset > 0))

    def onset(
        self, before: Expansion, start: Expansion, predicted: Expansion, ratio: Any
    ) -> Float[Array, ""]:
        sharpness = (e.sharpness[0] for e in (before, start, predicted))
        share = crossing(*sharpness, self.optimizer.critical_sharpness, ratio)
        return jnp.where(start.held == 0, jnp.minimum(share, 0.9), 0)

    def damped(
        self, y: FlowState, e: Expansion, defect: FlowState, dt: Float[Array, ""]
    ) -> tuple[FlowState, Expansion]:
        weights, count = damped(
            self.objective, self.optimizer, y, e, defect.weights, dt
        )
        e = _doubted(e, jnp.isfinite(largest((y.weights, defect.weights))), weights)
        defect = FlowState(weights, defect.optimizer_state, defect.observables)
        return defect, dataclasses.replace(e, work=e.work + Work(hvps=count))

    @full_precision
    def distance(self, y0: FlowState, y1: FlowState) -> Float[Array, ""]:
        P = self.optimizer.preconditioner(y1.optimizer_state)
        return jnp.sqrt(jnp.sum(P * (y1.weights - y0.weights) ** 2))

    def relative_error(self, step: Step) -> Float[Array, ""]:
        return jnp.max(jnp.stack(list(errors(self, step).values())))

    def approach(self, step: Step) -> Float[Array, "2 k"]:
        return approach(self, step)


def _doubted(e: Expansion, finite: Bool[Array, ""], products: Array) -> Expansion:
    """What the Hessian made not finite, of something `finite`, makes e so."""
    bad = finite & ~jnp.isfinite(largest(products))
    return dataclasses.replace(e, sharpness=jnp.where(bad, jnp.nan, e.sharpness))
