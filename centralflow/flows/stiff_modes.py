"""The fastest modes of a flow, slowed down, so that long steps need fewer stages."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..krylov import Krylov
from ..precision import full_precision

_MOST = 16
# Slowed modes still relax so many times in a step.
_RELAXATIONS = 40.0
# An eigenvector is known if its residual norm is within this share of the eigenvalue.
# With more, Ritz vectors of clusters are taken for fewer eigenvectors than there are:
# with 3 %, two for the six between 1.2 and 1.45 of a network. What is left of a tracked
# one's cluster is in the Krylov space.
_RESOLVED, _TRACKED = 0.01, 0.25

_matmul = full_precision(jnp.matmul)


class StiffModes(eqx.Module):
    """The top eigenpairs of P^-1/2 H P^-1/2 as far as they are known, and an estimate
    of the largest of the `rest`. Rows that are not in use are zero.

    A mode of rate lambda >> 1/dt is in equilibrium with the slow ones throughout a step
    of length dt, and it still is if it relaxes at a lower rate. For

        dw/dt = P^-1/2 (I - V' diag(1 - floor / lambda) V) P^1/2 velocity(w),

    V the orthonormal eigenvectors, explicit steps have to be stable for rates up to
    `floor` only. In the norm of P, the factor is symmetric and positive: where the
    eigenvectors have turned by an angle a, the rate of one of eigenvalue lambda is at
    most floor + lambda sin^2 a.
    """

    eigenvectors: Float[Array, "m n"]
    values: Float[Array, " m"]
    rest: Float[Array, ""]

    def slowness(self, values: Array, dt: Float[Array, ""]) -> Array:
        """floor / lambda, or 1 for modes that are slower."""
        floor = jnp.maximum(self.rest, _RELAXATIONS / dt)
        return jnp.where(values > floor, floor / jnp.where(values > 0, values, 1), 1)

    def slowed(
        self, velocity: Float[Array, " n"], P: Array, dt: Float[Array, ""]
    ) -> Float[Array, " n"]:
        V, less = self.eigenvectors, 1 - self.slowness(self.values, dt)
        root = jnp.sqrt(P)
        return velocity - _matmul(less * _matmul(V, root * velocity), V) / root


def none_known(n: int, dtype: Any) -> StiffModes:
    vectors, values = jnp.zeros((_MOST, n), dtype), jnp.zeros(_MOST, dtype)
    return StiffModes(vectors, values, jnp.asarray(jnp.inf, dtype))


def stiff_modes(
    tracked: Float[Array, "k n"],
    values: Float[Array, " k"],
    residuals: Float[Array, " k"],
    count: Int[Array, ""],
    space: Krylov,
) -> StiffModes:
    """The top ones among the first `count` tracked eigenvectors of P^-1/2 H P^-1/2 and
    the Ritz vectors of a Krylov space across them, down to the first that is not
    resolved."""
    k, m = values.size, space.nodes.size
    use = jnp.sum(jnp.where(jnp.arange(m) < space.size, space.vectors.T**2, 0), axis=1)
    exists = jnp.concatenate([jnp.arange(k) < count, use > 0.5])
    share = jnp.where(jnp.arange(k + m) < k, _TRACKED, _RESOLVED)
    values = jnp.where(exists, jnp.concatenate([values, space.nodes]), -jnp.inf)
    residuals = jnp.concatenate([residuals, space.residuals])
    residuals = jnp.where(exists, residuals, 0)
    bounds = values + residuals
    order = jnp.argsort(-bounds)
    resolved = (values > 0) & (residuals < share * values)
    known = jnp.minimum(jnp.sum(jnp.cumprod(resolved[order])), _MOST)

    values, bounds = values[order], bounds[order]
    following, last = bounds[known], bounds[jnp.maximum(known - 1, 0)]
    rest = jnp.where(jnp.isfinite(following), following, last)
    used = jnp.arange(_MOST) < known
    rows = jax.scipy.linalg.block_diag(jnp.eye(k, dtype=tracked.dtype), space.vectors.T)
    rows = jnp.where(used[:, None], rows[order][:_MOST], 0)
    vectors = _matmul(rows[:, :k], tracked) + _matmul(rows[:, k:], space.basis)
    return StiffModes(
        vectors,
        jnp.where(used, values[:_MOST], 0),
        jnp.where(known > 0, rest, jnp.inf),
    )
