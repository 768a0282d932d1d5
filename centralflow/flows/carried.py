"""Third derivatives carried from one long step to the next, to compute few of them.

D is a symmetric bilinear map, D(u, v) = grad(u' H v), needed on the span of the k
critical eigenvectors: k (k + 1) / 2 third derivatives. From step to step they turn,
mostly within that span, and D changes by some percent. Now, D serves two purposes.

- The forces, D[X] = sum_r x_r D(q_r, q_r) with the eigenpairs of X, are a part of the
  equation, and have to be right. That takes as many third derivatives as the rank of X.
- How the constraint answers to a change of the forces: a relative error of D leaves as
  much of a correction that is 2 % of the sharpness at most, and that is measured at the
  end of each step, and counts as an error of it. For this the D of the step before will
  do, turned with the eigenvectors.

So the complementarity problem is solved with the old D, D made exact along the X that
comes out, and the problem solved again. (That X is a little different, and its forces
are exact as far as it is not.)
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..objective import FlatObjective
from ..precision import full_precision
from .base import Work
from .expansion import Expansion, Staleness
from .observables import held

# D is computed anew if it would be further off than this, and where less than this
# share of a direction (its squared cosine) was in the critical span of the step before.
_STALE = 0.2
_SEEN = 0.9

_matmul = full_precision(jnp.matmul)


def carried(
    objective: FlatObjective,
    w: Float[Array, " n"],
    P: Float[Array, ""] | Float[Array, " n"],
    previous: Expansion,
    e: Expansion,
    ratio: Float[Array, ""],
) -> Expansion:
    """The expansion e at w with the forces of the `previous` one, turned, and those of
    directions that are new; or with new ones altogether. `ratio` is the length of the
    step over that of the one before."""
    k = _rows(e.forces)
    i, j = np.tril_indices(k)
    rows, identity = jnp.arange(k), jnp.eye(k, dtype=w.dtype)
    old, new = rows < previous.critical, rows < e.critical
    U, V = e.eigenvectors[:k], previous.eigenvectors[:k]
    # The projection on the old span, in the norm of P, which has changed; and the
    # squared cosines of the angles between the two, the largest first.
    gram = jnp.where(old[:, None] & old, _matmul(V * P, V.T), identity)
    overlap = jnp.where(new[:, None] & old, _matmul(U * P, V.T), 0)
    onto = jnp.linalg.solve(gram, overlap.T).T
    common = jnp.where(new[:, None] & new, _matmul(onto, overlap.T), -identity)
    cosines_sq, Q = jnp.linalg.eigh((common + common.T) / 2)
    cosines_sq, Q = cosines_sq[::-1], Q[:, ::-1].T
    known = jnp.sum(cosines_sq > _SEEN, dtype=jnp.int32)

    error, change = previous.staleness.error, previous.staleness.change
    fresh = e.pairs - known * (known + 1) // 2
    anew = ~(error + change * jnp.minimum(ratio, 2) < _STALE)
    anew |= fresh + previous.held >= e.pairs  # that is no dearer
    fresh, known = jnp.where(anew, e.pairs, fresh), jnp.where(anew, 0, known)
    Q = jnp.where(anew, identity, Q)

    turned = _matmul(_on_pairs(_matmul(Q, onto)), previous.forces)
    exact = objective.thirds(w, _matmul(Q, U), e.critical, known)
    forces = jnp.where((i >= known)[:, None], exact, turned)
    forces = jnp.where(anew, exact, _matmul(_on_pairs(Q.T), forces))

    both = np.where(i == j, 1, 2).astype(w.dtype)
    size = lambda D: jnp.sqrt(jnp.sum(both * jnp.sum(D * D / P, axis=1)))
    seen = anew & (ratio > 0) & jnp.all(~new | (cosines_sq > _SEEN))
    seen &= e.critical > 0
    found = size(exact - turned) / (size(exact) + jnp.finfo(w.dtype).tiny)
    staleness = Staleness(
        error=jnp.where(anew, 0, error),
        change=jnp.where(seen, found, change),
        exact=anew,
    )
    work = e.work + Work(third_derivatives=fresh)
    return dataclasses.replace(e, forces=forces, staleness=staleness, work=work)


def exact_along(
    objective: FlatObjective,
    w: Float[Array, " n"],
    P: Float[Array, ""] | Float[Array, " n"],
    e: Expansion,
    X: Float[Array, "k k"],
) -> Expansion:
    """The expansion e at w with the forces exact along the eigenvectors of X, if they
    were not all exact."""
    k = _rows(e.forces)
    i, j = np.tril_indices(k)
    both = np.where(i == j, 1, 2).astype(w.dtype)
    variances, Q = jnp.linalg.eigh(X[:k, :k])
    variances, Q = variances[::-1], Q[:, ::-1]
    rank = jnp.sum(held(variances), dtype=jnp.int32)
    rank = jnp.where(e.staleness.exact, 0, rank)

    exact = objective.thirds_along(w, _matmul(Q.T, e.eigenvectors[:k]), rank)
    products = Q[i] * Q[j]
    missing = exact - _matmul((both[:, None] * products).T, e.forces)
    missing = jnp.where((jnp.arange(k) < rank)[:, None], missing, 0)

    size = lambda D: jnp.sqrt(jnp.sum(D * D / P))
    change = size(missing) / (size(exact) + jnp.finfo(w.dtype).tiny)
    before = e.staleness
    change = jnp.where(rank > 0, change, before.change)
    error = jnp.where(before.exact, before.error, before.error + change)
    return dataclasses.replace(
        e,
        forces=e.forces + _matmul(products, missing),
        staleness=Staleness(error, change, exact=jnp.bool_(True)),
        work=e.work + Work(third_derivatives=rank),
    )


def _rows(forces: Float[Array, "m n"]) -> int:
    """k, of m = k (k + 1) / 2 pairs."""
    return (int(np.sqrt(8 * forces.shape[0] + 1)) - 1) // 2


def _on_pairs(R: Float[Array, "k k"]) -> Float[Array, "m m"]:
    """The matrix of D -> R D R' on the pairs i >= j of a symmetric D."""
    i, j = np.tril_indices(R.shape[0])
    both = R[i][:, i] * R[j][:, j] + R[i][:, j] * R[j][:, i]
    return jnp.where(i == j, both / 2, both)
