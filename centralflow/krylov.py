"""Functions of a symmetric operator applied to a vector, by the Lanczos iteration."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .precision import full_precision

# Not the operator, the user's, which is called in between.
_matmul = full_precision(jnp.matmul)


class Krylov(eqx.Module):
    """An orthonormal basis Q of span{v, A v, A^2 v, ...}, v / |v| its first row, and
    the eigenvalues and eigenvectors of Q A Q'. Rows that are not in use are zero. Of
    A times the last row in use, a part of norm `rest` is outside of the space."""

    basis: Float[Array, "m n"]
    nodes: Float[Array, " m"]
    vectors: Float[Array, "m m"]
    size: Int[Array, ""]
    rest: Float[Array, ""]

    def coefficients(self, function: Callable) -> Float[Array, " m"]:
        """Those of f(A) v / |v| in the basis: exact for polynomials f of degree below
        the number of products. The first, v' f(A) v / |v|^2, is a Gauss quadrature,
        exact up to twice that degree less one."""
        return _matmul(self.vectors, function(self.nodes) * self.vectors[0])

    def mean(self, values: Float[Array, " m"]) -> Float[Array, ""]:
        """That quadrature, from the values of f at the nodes."""
        return jnp.sum(self.vectors[0] ** 2 * values)

    def within(
        self, values: Float[Array, " m"], x: Float[Array, " n"]
    ) -> Float[Array, " m"]:
        """f(Q A Q') Q x, from the values of f at the nodes."""
        coordinates = _matmul(_matmul(self.basis, x), self.vectors)
        return _matmul(self.vectors, values * coordinates)

    @property
    def residuals(self) -> Float[Array, " m"]:
        """|A v - node v| of the eigenvectors' approximations in the space."""
        last = jnp.maximum(self.size - 1, 0)
        return self.rest * jnp.abs(self.vectors[last])


def krylov(
    operator: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    v: Float[Array, " n"],
    count: Int[Array, ""],
    most: int,
) -> Krylov:
    """The Krylov space of a symmetric operator, with `count <= most` products.

    With full reorthogonalization: `most` is small.
    """

    def unit(x, scale):
        norm = jnp.linalg.norm(x)
        # What is left of an invariant space is rounding.
        usable = norm > 1e-5 * scale
        return jnp.where(usable, x / jnp.where(usable, norm, 1), 0)

    def extend(j, carry):
        Q, T, _ = carry
        image = operator(Q[j])
        h = _matmul(Q, image)
        rest = image - _matmul(h, Q)
        rest = rest - _matmul(_matmul(Q, rest), Q)
        row = jnp.where(j + 1 < count, j + 1, most)
        Q = Q.at[row].set(unit(rest, jnp.linalg.norm(image)), mode="drop")
        return Q, T.at[:, j].set(h), jnp.linalg.norm(rest)

    basis = jnp.zeros((most, v.size), v.dtype).at[0].set(unit(v, 0.0))
    T = jnp.zeros((most, most), v.dtype)
    zero = jnp.zeros((), v.dtype)
    basis, T, rest = jax.lax.fori_loop(0, count, extend, (basis, T, zero))
    # Column j was found before row j + 1 of the basis was there.
    T = jnp.triu(T) + jnp.triu(T, 1).T
    nodes, vectors = jnp.linalg.eigh(T)
    return Krylov(basis, nodes, vectors, jnp.asarray(count, jnp.int32), rest)
