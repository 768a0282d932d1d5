"""What is known of the loss at one point, and what the oscillations add to it."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .base import Work


class Slope(eqx.Module):
    loss: Float[Array, ""]
    gradient: Float[Array, " n"]


class Forcing(eqx.Module):
    """What the oscillations add to E[g] and to E[g * g]."""

    gradient: Float[Array, " n"]
    gradient_sq: Float[Array, " n"]


class Staleness(eqx.Module):
    """How far forces that were carried from an earlier point are from those at this
    one: the relative `error`, infinite of what is not known; by how much they changed
    in the last step; and whether they are `exact`, or those along X at least."""

    error: Float[Array, ""]
    change: Float[Array, ""]
    exact: Bool[Array, ""]

    @classmethod
    def of(cls, known: bool, dtype: Any) -> "Staleness":
        """That of forces that are exact, or not known."""
        error = jnp.asarray(0.0 if known else jnp.inf, dtype)
        return cls(error, jnp.zeros((), dtype), jnp.asarray(known))


class Expansion(eqx.Module):
    """The loss to third order at one point, along the top eigenvectors there.

    `eigenvectors` holds U, whatever Ritz vectors there are and one that scouts, of
    which the first `tracked` are followed, the first `known` have converged, and the
    first `critical` may become tight; `residuals` are those of P^-1/2 H P^-1/2.
    `hessian` is U H U' and `gram` is U P U', the identity where the eigenvectors were
    computed; `sharpness` holds the eigenvalues of the two. Row i (i + 1) / 2 + j of
    `forces` is D_ij = grad (u_i' H u_j), i >= j, for the critical u_i and u_j; after a
    long step it is that at the predicted end, or empty. `held` is the rank of X.

    Eigenvectors and forces may be `age` short steps old: then P^1/2 u_i is what it was,
    `root` is P^1/2 now, and the hessian is that of the Rayleigh quotients. After a
    long step `excess` is by how much the largest eigenvalue may exceed that of the
    critical eigenvectors, and at least `coupled` eigenvectors must count as critical
    for it to be small.
    """

    slope: Slope
    sharpness: Float[Array, " k"]
    residuals: Float[Array, " k"]
    eigenvectors: Float[Array, "k n"]
    hessian: Float[Array, "k k"]
    gram: Float[Array, "k k"]
    forces: Float[Array, "m n"]
    staleness: Staleness
    tracked: Int[Array, ""]
    known: Int[Array, ""]
    critical: Int[Array, ""]
    held: Int[Array, ""]
    excess: Float[Array, ""]
    coupled: Int[Array, ""]
    root: Float[Array, ""] | Float[Array, " n"]
    age: Int[Array, ""]
    calls: Int[Array, ""]
    work: Work

    @property
    def pairs(self) -> Int[Array, ""]:
        """The number of the D_ij, i >= j."""
        return self.critical * (self.critical + 1) // 2

    @property
    def affordable(self) -> Int[Array, ""]:
        """Hessian-vector products that cost a twentieth of what all D_ij do: if there
        are many, whatever makes steps longer is cheap."""
        return self.pairs // 10
