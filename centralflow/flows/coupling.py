"""What the critical eigenvectors lack once they have turned in a step."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..precision import full_precision

# Where, over the critical sharpness, the eigenvalues are that no eigenvector is tracked
# of, when it is about what the critical ones turned to.
_BULK = 0.5
# The least distance of another eigenvalue, over the critical sharpness, at which an
# eigenvector is turned towards that one to first order.
_NEAREST = 0.1

_matmul = full_precision(jnp.matmul)


class Coupling(eqx.Module):
    """Of vectors U, the rows, that were eigenvectors of P^-1 H before a step and are
    nearly so after it. Products with H are known of those that were `seen`: of the
    critical ones, or of all that are tracked.

    - `hessian`: U H U' on the rows seen, and what it was before on the others.
    - `values`: The eigenvalues of this, ascending.
    - `excess`: By how much the largest eigenvalue of P^-1 H exceeds the largest of
        these, as far as both are above the critical sharpness kappa.
    - `lost`: How much lower it would be if the first 0, 1, 2, ... rows were not coupled
        to the others.
    """

    hessian: Float[Array, "k k"]
    values: Float[Array, " k"]
    excess: Float[Array, ""]
    lost: Float[Array, " k"]


@full_precision
def coupling(
    U: Float[Array, "k n"],
    images: Float[Array, "k n"],
    P: Float[Array, ""] | Float[Array, " n"],
    gram: Float[Array, "k k"],
    sharpness: Float[Array, " k"],
    seen: Bool[Array, " k"],
    tracked: Bool[Array, " k"],
    kappa: float | Float[Array, ""],
) -> Coupling:
    """`images` is U H, zero but in rows seen; `gram` is U P U', the identity but in
    these; `sharpness` are the eigenvalues before the step.

    What H does with the eigenvectors seen across them, `rest`, adds to their
    eigenvalues, to second order, rest (kappa P - H)^-1 rest'. Along the tracked
    eigenvectors, the nearest ones, this is in the eigenvalues of the matrix of both.
    Across them (kappa P - H)^-1 is taken for P^-1 / (kappa - kappa / 2): what is found
    there is of many, most of them small, eigenvalues.
    """
    block = seen[:, None] & seen
    hessian = _matmul(U, images.T)
    hessian = jnp.where(block, (hessian + hessian.T) / 2, jnp.diag(sharpness))
    # gram^-1/2 hessian gram^-1/2, whose eigenvalues are those of P^-1 H
    g, Q = jnp.linalg.eigh(gram)
    root = (Q / jnp.sqrt(g)) @ Q.T
    guards = tracked & ~seen
    along = jnp.where(block, hessian @ (Q / g) @ Q.T, 0)
    towards, beyond = _across(U, images, P, along, guards)
    more = hessian + _matmul(beyond / P, beyond.T) / (kappa - _BULK * kappa)
    others = jnp.diag(jnp.where(guards, sharpness, _BULK * kappa))
    both = root @ jnp.where(block, more, others + towards + towards.T) @ root
    first = jnp.arange(len(U)) < jnp.arange(len(U))[:, None]
    apart = jnp.where(first[:, :, None] == first[:, None, :], both, 0)
    values = jnp.linalg.eigvalsh(root @ hessian @ root)
    above = lambda values: jnp.maximum(values[..., -1], kappa)
    top = above(jnp.linalg.eigvalsh(both))
    lost = top - above(jnp.linalg.eigvalsh(apart))
    return Coupling(hessian, values, top - above(values), lost)


@full_precision
def turned_eigenvectors(
    U: Float[Array, "k n"],
    images: Float[Array, "k n"],
    P: Float[Array, ""] | Float[Array, " n"],
    sharpness: Float[Array, " k"],
    critical: Bool[Array, " k"],
    tracked: Bool[Array, " k"],
    kappa: float | Float[Array, ""],
) -> Float[Array, "k n"]:
    """The critical eigenvectors as they are after the step: U + rest (kappa P - H)^-1,
    to first order, with the same approximations, made orthonormal again in the norm of
    P. The other rows are zero."""
    block = critical[:, None] & critical
    U = jnp.where(tracked[:, None], U, 0)
    images = jnp.where(critical[:, None], images, 0)
    gram = lambda U: jnp.where(block, _matmul(U * P, U.T), jnp.eye(len(U)))
    g, Q = jnp.linalg.eigh(gram(U))
    along = jnp.where(block, _matmul(images, U.T) @ (Q / g) @ Q.T, 0)
    towards, beyond = _across(U, images, P, along, tracked & ~critical)
    away = jnp.maximum(kappa - sharpness, _NEAREST * kappa)
    change = _matmul(towards / away, U) + beyond / P / (kappa - _BULK * kappa)
    U = jnp.where(critical[:, None], U + change, 0)
    g, Q = jnp.linalg.eigh(gram(U))
    return _matmul((Q / jnp.sqrt(g)) @ Q.T, U)


def _across(
    U: Float[Array, "k n"],
    images: Float[Array, "k n"],
    P: Float[Array, ""] | Float[Array, " n"],
    along: Float[Array, "k k"],
    guards: Bool[Array, " k"],
) -> tuple[Float[Array, "k k"], Float[Array, "k n"]]:
    """What the images have beside `along` P U: along the guards, and beyond these."""
    rest = images - _matmul(along, P * U)
    towards = jnp.where(guards, _matmul(rest, U.T), 0)
    return towards, rest - _matmul(towards, P * U)
