"""The observables of the central flow, and what the oscillations add to them, to second
order in delta. Notation as in the equation of the flow, `term`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from ..precision import full_precision
from .base import FlowState
from .expansion import Expansion

_matmul = full_precision(jnp.matmul)


def record(term: Any, y: FlowState, e: Expansion, X: Float[Array, "k k"]) -> FlowState:
    """The state y with its observables."""
    k, P = term.block_size, term.optimizer.preconditioner(y.optimizer_state)
    gradient, loss = e.slope.gradient, e.slope.loss
    U, at = e.eigenvectors, term.coordinates
    HU = _matmul(e.hessian, P * U)
    observe = _observe(term.metrics, y.weights.dtype)
    smooth = dict(
        loss=loss,
        grad_norm_sq=gradient @ gradient,
        sharpness=jnp.where(jnp.arange(k) < e.known, e.sharpness, jnp.nan),
        metrics=observe(term.objective.model(y.weights)),
        gradient_sq=gradient[at] ** 2,
        step_sizes=1 / jnp.broadcast_to(P, gradient.shape)[at],
    )
    oscillating = dict(
        loss=0.5 * jnp.sum(e.hessian * X),  # E[L] - L = <H, Sigma> / 2
        grad_norm_sq=jnp.sum(X * _matmul(HU, HU.T)),  # E|g|^2 - |g|^2
        oscillation=jnp.maximum(jnp.linalg.eigvalsh(X)[::-1], 0),
        metrics=_mean_metrics(term, y, e, X),
        gradient_sq=jnp.sum(HU[:, at] * _matmul(X, HU[:, at]), axis=0),
        trace_covariance=jnp.sum(X * _matmul(U, U.T)),  # tr Sigma
    )
    observables = dict(
        smooth=smooth,
        oscillating=oscillating,
        error=jnp.zeros_like(loss),
        approach=jnp.zeros((2, k), loss.dtype),
        work=e.work,
    )
    return FlowState(y.weights, y.optimizer_state, observables)


def held(variances: Float[Array, " k"]) -> Bool[Array, " k"]:
    """Which of X's variances are not zero."""
    return variances > 1e-3 * jnp.max(variances)


def without_oscillations(y: FlowState) -> FlowState:
    """The state y with observables as if X were zero."""
    of_X = lambda y: y.observables["oscillating"]
    return eqx.tree_at(of_X, y, jax.tree.map(jnp.zeros_like, of_X(y)))


def _observe(
    metrics: dict[str, Callable], dtype: Any
) -> Callable[[PyTree], dict[str, PyTree[Array]]]:
    """The metrics as a function of the model. Counts, too, have averages."""
    real = lambda x: jnp.asarray(x, dtype)
    return lambda model: {
        name: jax.tree.map(real, fn(model)) for name, fn in metrics.items()
    }


def _mean_metrics(
    term: Any, y: FlowState, e: Expansion, X: Float[Array, "k k"]
) -> dict[str, PyTree[Array]]:
    """E[h] - h = <hess h, Sigma> / 2, with Sigma = sum_r f_r f_r'."""
    observe = _observe(term.metrics, y.weights.dtype)
    zero = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        eqx.filter_eval_shape(observe, term.objective.model(y.weights)),
    )
    if not term.metrics:
        return zero
    variances, Q = jnp.linalg.eigh(X)
    factors = _matmul((jnp.sqrt(jnp.maximum(variances, 0)) * Q).T, e.eigenvectors)
    k = X.shape[0]

    def add(r, total):
        f = factors[k - 1 - r]  # the critical ones have the largest variances
        half = term.objective.second_derivative(observe, y.weights, f, f)
        return jax.tree.map(lambda a, b: a + 0.5 * b, total, half)

    return jax.lax.fori_loop(0, e.critical, add, zero)
