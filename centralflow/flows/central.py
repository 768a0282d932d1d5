"""The central flow: the time-averaged trajectory at the edge of stability.

Notation, as in the literature: w weights, s optimizer state, P(s) preconditioner,
g = grad L, H = Hessian, kappa = critical sharpness; the rows u_i of U are the top
eigenvectors of P^-1 H with eigenvalues lambda_i, normalized to U P U' = I; the iterate
is w + delta with E[delta] = 0 and E[delta delta'] = Sigma = U' X U.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..eigen import top_eigenpairs
from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer, Vector
from ..precision import full_precision
from ..solvers import AbstractComplementarityTerm, Moreau
from .base import AbstractFlow, FlowState, Work

# An eigenvalue is taken for one that may become critical within a step unless it would
# have to rise by more than this share of the critical sharpness per optimizer step.
_MAX_RISE = 0.1
# Eigenvectors tracked beyond the critical ones, so that the next to become critical is
# known before it does.
_GUARDS = 2


class CentralFlow(AbstractFlow):
    """The central flow,

        dw/dt = velocity(w, s, E[g]),          E[g]     = g + (1/2) grad <Sigma, H>,
        ds/dt = state_rate(s, E[g], E[g * g]), E[g * g] = g * g + diag(H Sigma H),

    where X is such that no eigenvalue of P^-1 H exceeds the critical sharpness:

        0 <= X   perpendicular to   U (kappa P - H) U' >= 0.

    **Arguments:**

    - `substeps`: the number of fixed steps per optimizer step.
    - `block_size`: the number of eigenvectors there is room for. It is doubled when
        they are all needed.
    - `eigen_tolerance`: the residual norm to which the eigenpairs are computed, over
        the largest eigenvalue.

    ??? cite "Reference"

        J. Cohen, A. Damian, A. Talwalkar, J. Z. Kolter, J. D. Lee, *Understanding
        optimization in deep learning with central flows*, arXiv 2410.24206.
    """

    # Arrays, so that one program serves all their values.
    substeps: Int[Array, ""]
    eigen_tolerance: Float[Array, ""]
    block_size: int = eqx.field(static=True)

    def __init__(
        self, substeps: int = 4, *, block_size: int = 8, eigen_tolerance: float = 2e-3
    ):
        for name, value in (("substeps", substeps), ("block_size", block_size)):
            if not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
        if not 0 < eigen_tolerance < 1:
            raise ValueError(
                f"`eigen_tolerance` must be between 0 and 1, got {eigen_tolerance!r}."
            )
        self.substeps = jnp.asarray(substeps)
        self.block_size = int(block_size)
        self.eigen_tolerance = jnp.asarray(eigen_tolerance, jnp.result_type(float))

    def term(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        metrics: dict[str, Callable],
    ) -> "CentralTerm":
        return CentralTerm(
            objective,
            optimizer,
            metrics,
            self.block_size,
            self.eigen_tolerance,
            _MAX_RISE / self.substeps,
        )

    def solver(self) -> Moreau:
        return Moreau()

    def stepsize(
        self, rtol: float | None
    ) -> tuple[diffrax.AbstractStepSizeController, Any]:
        if rtol is not None:
            raise ValueError(
                f"`rtol` is {rtol!r}, but the steps of `CentralFlow` are fixed: set "
                "`substeps` instead."
            )
        return diffrax.ConstantStepSize(), 1 / self.substeps

    def start(self, term: Any, y: FlowState, previous: Any) -> tuple[FlowState, Any]:
        return self.solver().start(term, y, 1 / self.substeps, previous)

    def observe(self, term: Any, t: Any, y: FlowState) -> dict[str, PyTree[Array]]:
        return y.observables

    def work(self, solver_state: Any, steps: Any, reports: int) -> Work:
        work = solver_state.expansion.work
        return dataclasses.replace(
            work, unconverged=work.unconverged + solver_state.unconverged
        )

    def event(self) -> diffrax.Event:
        def crowded(t, y, args, *, terms, **kwargs):
            term = getattr(terms, "term", terms)
            if self.block_size >= y.weights.size:
                return jnp.array(False)
            critical = term.count_critical(y.observables["sharpness"])
            return critical + _GUARDS > self.block_size

        return diffrax.Event(crowded)

    def enlarge(self) -> "CentralFlow":
        return CentralFlow(
            int(self.substeps),
            block_size=2 * self.block_size,
            eigen_tolerance=float(self.eigen_tolerance),
        )


class Expansion(eqx.Module):
    """The loss to third order at one point, along the top eigenvectors there.

    `sharpness` and `eigenvectors` hold whatever Ritz pairs there are, of which the
    first `known` have converged and the first `critical` may become tight. Row
    i (i + 1) / 2 + j of `forces` is D_ij = grad (u_i' H u_j), i >= j, for the critical
    u_i and u_j.
    """

    loss: Float[Array, ""]
    gradient: Float[Array, " n"]
    sharpness: Float[Array, " k"]
    eigenvectors: Float[Array, "k n"]
    forces: Float[Array, "m n"]
    known: Int[Array, ""]
    critical: Int[Array, ""]
    work: Work


class CentralTerm(AbstractComplementarityTerm):
    """The central flow as a differential equation with a complementarity constraint."""

    objective: FlatObjective
    optimizer: AbstractOptimizer
    metrics: dict[str, Callable]
    block_size: int = eqx.field(static=True)
    eigen_tolerance: Float[Array, ""]
    margin: Float[Array, ""]  # of the critical set, over the critical sharpness

    # The averages over the oscillations, to second order in delta.

    def mean_loss(self, e: Expansion, X: Float[Array, "k k"]) -> Float[Array, ""]:
        """E[L] = L + <H, Sigma> / 2."""
        return e.loss + 0.5 * jnp.sum(e.sharpness * jnp.diag(X))

    @full_precision
    def mean_gradient(self, e: Expansion, X: Float[Array, "k k"]) -> Vector:
        """E[g] = g + (1/2) sum_ij X_ij D_ij."""
        i, j = np.tril_indices(X.shape[0])
        return e.gradient + 0.5 * (jnp.where(i == j, 1, 2) * X[i, j]) @ e.forces

    @full_precision
    def mean_gradient_sq(
        self, y: FlowState, e: Expansion, X: Float[Array, "k k"]
    ) -> Vector:
        """E[g * g] = g * g + diag(H Sigma H), with H u_i = kappa P u_i, which holds
        wherever X is not zero and makes the constraint's dependence on X symmetric."""
        P = self.optimizer.preconditioner(y.optimizer_state)
        HU = self.optimizer.critical_sharpness * P * e.eigenvectors
        return e.gradient**2 + jnp.sum(HU * (X @ HU), axis=0)

    @full_precision
    def mean_grad_norm_sq(
        self, y: FlowState, e: Expansion, X: Float[Array, "k k"]
    ) -> Float[Array, ""]:
        """E|g|^2 = |g|^2 + tr(H Sigma H)."""
        P = self.optimizer.preconditioner(y.optimizer_state)
        HU = e.sharpness[:, None] * P * e.eigenvectors
        return e.gradient @ e.gradient + jnp.sum(X * (HU @ HU.T))

    def mean_observable(
        self, fn: Callable, y: FlowState, e: Expansion, X: Float[Array, "k k"]
    ) -> PyTree[Array]:
        """E[h] = h + <hess h, Sigma> / 2, with Sigma = sum_r f_r f_r'."""
        variances, Q = jnp.linalg.eigh(X)
        factors = full_precision(jnp.matmul)(
            (jnp.sqrt(jnp.maximum(variances, 0)) * Q).T, e.eigenvectors
        )
        k = X.shape[0]

        def real(model):  # counts, too, have averages
            dtype = y.weights.dtype
            return jax.tree.map(lambda x: jnp.asarray(x, dtype), fn(model))

        def add(r, total):
            f = factors[k - 1 - r]  # the critical ones have the largest variances
            half = self.objective.second_derivative(real, y.weights, f, f)
            return jax.tree.map(lambda a, b: a + 0.5 * b, total, half)

        value = real(self.objective.model(y.weights))
        return jax.lax.fori_loop(0, e.critical, add, value)

    # The equation.

    def vf(self, t, y: FlowState, args) -> FlowState:
        """The rate at X = 0: the stable flow."""
        g = self.objective.grad(y.weights)
        return self._rate(y, g, g * g)

    def rate(self, y: FlowState, e: Expansion, X: Float[Array, "k k"]) -> FlowState:
        return self._rate(y, self.mean_gradient(e, X), self.mean_gradient_sq(y, e, X))

    def _rate(self, y: FlowState, gradient: Vector, gradient_sq: Vector) -> FlowState:
        return FlowState(
            self.optimizer.velocity(y.weights, y.optimizer_state, gradient),
            self.optimizer.state_rate(y.optimizer_state, gradient, gradient_sq),
            jax.tree.map(jnp.zeros_like, y.observables),
        )

    # The constraint C = U (kappa P - H) U' = kappa - diag(lambda).

    def constraint(self, e: Expansion) -> Float[Array, "k k"]:
        kappa = self.optimizer.critical_sharpness
        return jnp.diag(kappa - e.sharpness)

    @full_precision
    def constraint_rate(
        self, y: FlowState, e: Expansion, rate: FlowState
    ) -> Float[Array, "k k"]:
        """dC_ij/dt = kappa u_i' dP/dt u_j - D_ij . dw/dt."""
        kappa, U = self.optimizer.critical_sharpness, e.eigenvectors
        _, dP = jax.jvp(
            self.optimizer.preconditioner, (y.optimizer_state,), (rate.optimizer_state,)
        )
        i, j = np.tril_indices(self.block_size)
        dH = e.forces @ rate.weights
        dH = (
            jnp.zeros((self.block_size,) * 2, dH.dtype)
            .at[i, j]
            .set(dH)
            .at[j, i]
            .set(dH)
        )
        return kappa * (U * dP) @ U.T - dH

    def active(self, e: Expansion) -> Int[Array, ""]:
        return e.critical

    def count_critical(self, sharpness: Float[Array, " k"]) -> Int[Array, ""]:
        """How many eigenvalues are so near the critical one that they may reach it
        within a step."""
        limit = (1 - self.margin) * self.optimizer.critical_sharpness
        return jnp.sum(sharpness > limit, dtype=jnp.int32)

    # The expansion.

    def expand(self, y: FlowState, previous: Expansion | None) -> Expansion:
        w, k = y.weights, self.block_size
        P = self.optimizer.preconditioner(y.optimizer_state)
        loss, gradient = self.objective.value_and_grad(w)
        if previous is None:
            start = jr.normal(jr.key(0), (k, w.size), w.dtype)
            count, wanted, sweeps, work = k, max(k - _GUARDS, 1), 200, Work()
        else:
            start = previous.eigenvectors * jnp.sqrt(P)
            missing = k - start.shape[0]
            if missing:
                extra = jr.normal(jr.key(k), (missing, w.size), w.dtype)
                start = jnp.concatenate([start, extra])
            wanted = jnp.minimum(previous.critical + 1, k)
            count = jnp.minimum(previous.critical + _GUARDS, k)
            sweeps, work = 20, previous.work
        pairs = top_eigenpairs(
            self.objective.preconditioned_hessian(w, P),
            start,
            count,
            wanted,
            tolerance=self.eigen_tolerance.astype(w.dtype),
            max_sweeps=sweeps,
            # Looks for eigenvectors that a symmetry hides from those tracked.
            key=jr.fold_in(jr.key(1), work.gradients),
        )
        U = pairs.vectors / jnp.sqrt(P)
        critical = self.count_critical(pairs.values)
        relative = pairs.residuals / jnp.max(jnp.abs(pairs.values))
        residual = jnp.max(jnp.where(jnp.arange(k) < wanted, relative, 0))
        return Expansion(
            loss=loss,
            gradient=gradient,
            sharpness=jnp.where(jnp.isfinite(pairs.values), pairs.values, 0),
            eigenvectors=U,
            forces=self.objective.thirds(w, U, critical),
            known=jnp.maximum(wanted, critical),
            critical=critical,
            work=Work(
                work.gradients + jnp.int32(1),
                work.hvps + pairs.products,
                work.third_derivatives + critical * (critical + 1) // 2,
                work.unconverged + (~pairs.converged).astype(jnp.int32),
                jnp.maximum(work.eigen_residual, residual),
            ),
        )

    def record(self, y: FlowState, e: Expansion, X: Float[Array, "k k"]) -> FlowState:
        observables = dict(
            loss=e.loss,
            mean_loss=self.mean_loss(e, X),
            grad_norm_sq=e.gradient @ e.gradient,
            mean_grad_norm_sq=self.mean_grad_norm_sq(y, e, X),
            sharpness=jnp.where(
                jnp.arange(self.block_size) < e.known, e.sharpness, jnp.nan
            ),
            oscillation=jnp.maximum(jnp.linalg.eigvalsh(X)[::-1], 0),
            metrics={
                name: self.mean_observable(fn, y, e, X)
                for name, fn in self.metrics.items()
            },
        )
        return FlowState(y.weights, y.optimizer_state, observables)

    def is_finite(self, y: FlowState, e: Expansion) -> Bool[Array, ""]:
        return jnp.isfinite(y.observables["mean_loss"]) & jnp.all(
            jnp.isfinite(y.weights)
        )
