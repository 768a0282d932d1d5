"""The largest eigenpairs of a symmetric operator, tracked by block Rayleigh–Ritz."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from .precision import full_precision

# The residuals that guards may have if there is a scout, in those of the wanted pairs.
_LOOSELY = 4
# The random part of the scout, and of a guard in its place; and the shift of its power
# step, over the largest eigenvalue. With 0.1 and 1/4 it was late for what rose fast.
_NOISE, _NOISE_OF_GUARD, _SHIFT = 0.3, 0.1, 1 / 16

# Product by product: the user's operator is called in between.
_matmul = full_precision(jnp.matmul)


def _inner(A: Float[Array, "a n"], B: Float[Array, "b n"]) -> Float[Array, "a b"]:
    """A Bᵀ, for the larger b: on CPUs it is faster with B first, an order that XLA does
    not keep across a transpose by itself."""
    return lax.optimization_barrier(_matmul(B, A.T)).T


class Eigenpairs(eqx.Module):
    """Approximate eigenpairs, as returned by [`centralflow.eigen.top_eigenpairs`][].

    - `values`: The Ritz values, descending; -inf in rows that the basis did not span.
    - `vectors`: Orthonormal rows, one per Ritz value; zero where `values` is -inf.
    - `images`: The operator applied to `vectors` (combined from the stored products).
    - `residuals`: |A v - value v|, which bounds the distance from `values` to the
        spectrum; inf where `values` is -inf.
    - `products`: How often the operator was applied to a vector.
    - `sweeps`: How often the basis was enlarged.
    - `converged`: Whether all wanted residuals are within the tolerance.
    """

    values: Float[Array, "k"]
    vectors: Float[Array, "k n"]
    images: Float[Array, "k n"]
    residuals: Float[Array, "k"]
    products: Int[Array, ""]
    sweeps: Int[Array, ""]
    converged: Bool[Array, ""]


class _State(eqx.Module):
    basis: Float[Array, "m n"]  # orthonormal in the first `size` rows, then zero
    images: Float[Array, "m n"]  # the operator applied to `basis`
    gram: Float[Array, "m m"]  # basis imagesᵀ, the operator restricted to the basis
    size: Int[Array, ""]
    ritz: Float[Array, "k m"]  # the Ritz vectors' coefficients in `basis`
    search: Float[Array, "k+1 n"]  # what the basis is to be enlarged by
    # As of an `Eigenpairs`, whose vectors are `ritz` times `basis`.
    values: Float[Array, "k"]
    residuals: Float[Array, "k"]
    products: Int[Array, ""]
    sweeps: Int[Array, ""]
    converged: Bool[Array, ""]
    proceed: Bool[Array, ""]


def _unit(rows: Float[Array, "m n"]) -> Float[Array, "m n"]:
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    usable = (norms > 0) & jnp.isfinite(norms)
    return jnp.where(usable, rows / jnp.where(usable, norms, 1), 0)


def _orthonormalise(
    rows: Float[Array, "b n"],
    basis: Float[Array, "m n"],
    empty: bool | Bool[Array, ""] = False,
) -> tuple[Float[Array, "b n"], Int[Array, ""]]:
    """Orthonormal rows spanning what `rows` (of norm one or zero) adds to `basis`.

    They come first, and are followed by zeros; also returned is their number. An
    `empty` basis is zero.
    """
    # With S = rows - rows basisᵀ basis and S Sᵀ = U Λ Uᵀ, the rows of Λ^-½ Uᵀ S are
    # orthonormal. Unlike QR this is only products of long matrices, which shard over n,
    # and dependent rows drop out: their λ is small. The rounding errors ε of S are
    # magnified by λ^-½ and those of the Gram matrix by λ^-1, so by the cut-off λ > √ε
    # orthogonality is lost to √ε at worst; that makes a second pass exact to O(ε).
    cutoff = float(jnp.finfo(rows.dtype).eps) ** 0.5

    def once(_, carry):
        rows, _ = carry
        across = lambda: rows - _matmul(_inner(rows, basis), basis)
        rows = lax.cond(empty, lambda: rows, across)
        λ, U = jnp.linalg.eigh(_matmul(rows, rows.T))
        λ, U = λ[::-1], U[:, ::-1]
        scale = jnp.where(λ > cutoff, lax.rsqrt(jnp.maximum(λ, cutoff)), 0)
        return _matmul((U * scale).T, rows), jnp.sum(λ > cutoff, dtype=jnp.int32)

    return lax.fori_loop(0, 2, once, (rows, jnp.int32(0)))


def _ritz(
    gram: Float[Array, "m m"], size: Int[Array, ""], k: int
) -> tuple[Float[Array, "k"], Float[Array, "k m"]]:
    """The k largest eigenpairs of the leading `size` × `size` block."""
    # The unused rows must not add eigenvalues 0, above those of a negative operator.
    # They get one below all others, |λ| <= |gram|_∞, but of their magnitude: with, say,
    # -1e30 the others would be lost to rounding.
    bound = jnp.max(jnp.sum(jnp.abs(gram), axis=1))
    below = jnp.where(bound > 0, -2 * bound, -1)
    used = jnp.arange(gram.shape[0]) < size
    unused = jnp.diag(jnp.where(used, 0, below))
    λ, U = jnp.linalg.eigh(jnp.where(used[:, None] & used, gram, unused))
    return λ[::-1][:k], jnp.where(used[:k, None], U[:, ::-1][:, :k].T, 0)


def top_eigenpairs(
    operator: Callable[[Float[Array, "m n"], Int[Array, ""]], Float[Array, "m n"]],
    start: Float[Array, "k n"],
    count: int | Int[Array, ""],
    wanted: int | Int[Array, ""],
    *,
    tolerance: float | Float[Array, ""],
    max_sweeps: int,
    above: float | Float[Array, ""] = jnp.inf,
    key: PRNGKeyArray | None = None,
) -> Eigenpairs:
    """The algebraically largest eigenpairs of a symmetric operator A.

    This is meant to be called again and again while A moves, each time from the vectors
    found last, and minimises the number of applications of A. `count` of them find the
    Ritz pairs within the span of `start`. Then, in sweeps, the basis is enlarged by the
    residuals of those wanted pairs that have not converged, at one application each
    (and one more while a guard has not converged); all products are stored. When
    3k + 1 rows are full the basis is restarted from at most 2k.

    **Arguments:**

    - `operator`: A function `(V, m)` that applies A to the first `m` rows of V (usually
        by a `jax.lax.fori_loop`: `m` is traced) and returns zeros in the others.
    - `start`: Guesses for the eigenvectors, as rows; their number k bounds `count`.
        They need not be orthonormal. Rows that are zero, not finite or dependent are
        replaced by random ones: `start` may be zero if nothing is known.
    - `count`: How many rows of `start` are used, but for a scout. Further rows of the
        result are a by-product, in case `count` is larger in the next call.
    - `wanted`: How many pairs have to converge, `wanted <= count`. The others are
        guards: they cost an application each, are followed loosely (with a scout, to 4
        times the tolerance), and show an eigenvalue that is about to overtake the
        wanted ones.
    - `tolerance`: The largest residual norm |A v - λ v| allowed, over the largest |Ritz
        value|. (It must be relative: next to an operator with few large eigenvalues a
        random vector has a small residual, and a small Ritz value.)
    - `max_sweeps`: The largest number of sweeps.
    - `above`: Pairs of larger Ritz values are wanted too, as far as `count` goes.
    - `key`: If given, one row more of `start` is used, which is the *scout*, at one
        application and no sweeps, but for one if it has found nothing positive. It is
        perturbed at random by a third of its length, and looks for eigenvectors that
        are not seen from the others: exactly orthogonal to them, say by a symmetry, or
        on their way up from below. For this, [`centralflow.eigen.scouted`][] is where
        the next call starts from, and the key is another one each time. If `count` is k
        the last guard is perturbed instead, by a tenth, and at least one sweep is done.

    **Returns:**

    An [`centralflow.eigen.Eigenpairs`][]. If A is not finite then it has not converged.

    ??? cite "References"

        The iteration, restarted from the present and the previous Ritz vectors:

        ```bibtex
        @article{stathopoulos2007nearly,
            author={Stathopoulos, Andreas},
            title={Nearly Optimal Preconditioned Methods for {H}ermitian Eigenproblems
                   under Limited Memory. {P}art {I}: Seeking One Eigenvalue},
            journal={SIAM Journal on Scientific Computing},
            volume={29}, number={2}, pages={481--514}, year={2007},
        }
        ```

        Orthonormalisation by Gram matrices:

        ```bibtex
        @article{stathopoulos2002block,
            author={Stathopoulos, Andreas and Wu, Kesheng},
            title={A Block Orthogonalization Procedure with Constant Synchronization
                   Requirements},
            journal={SIAM Journal on Scientific Computing},
            volume={23}, number={6}, pages={2165--2182}, year={2002},
        }
        ```
    """
    k, n = start.shape
    m = 3 * k + 1
    dtype = start.dtype
    count, wanted = jnp.minimum(count, n), jnp.minimum(wanted, n)
    row = jnp.arange(k)
    scouts = 0 if key is None else jnp.where(count < jnp.minimum(k, n), 1, 0)

    def random(i):
        seed = jax.random.fold_in(jax.random.key(0) if key is None else key, i)
        return _unit(jax.random.normal(seed, (1, n), dtype))[0]

    # The first pass takes the start for its search directions and is no sweep yet: so
    # the operator, usually a large program, is compiled once.
    def sweep(state):
        new, rank = _orthonormalise(state.search, state.basis, state.size == 0)
        new_images = operator(new, rank)
        zero = jnp.zeros_like(state.size)
        basis = lax.dynamic_update_slice(state.basis, new, (state.size, zero))
        images = lax.dynamic_update_slice(state.images, new_images, (state.size, zero))
        block = _inner(new_images, basis)
        gram = lax.dynamic_update_slice(state.gram, block, (state.size, zero))
        gram = lax.dynamic_update_slice(gram, block.T, (zero, state.size))
        size = state.size + rank

        θ, coefficients = _ritz(gram, size, k)
        spanned = row < size
        defects = _matmul(coefficients, images)
        defects = defects - _matmul(
            jnp.where(spanned, θ, 0)[:, None] * coefficients, basis
        )
        residuals = jnp.where(spanned, jnp.linalg.norm(defects, axis=1), jnp.inf)
        bound = tolerance * jnp.max(jnp.abs(jnp.where(spanned, θ, 0)))
        is_wanted = (row < wanted) | ((row < count) & spanned & (θ > above))
        sweeps = state.sweeps + 1
        converged = jnp.all((residuals <= bound) | ~is_wanted)

        # One search direction per wanted pair: fewer at a time converge no faster from
        # a warm start, where each defect is the first-order change of its vector. And
        # one for the guards, the worst of them: with none they go stale and no longer
        # show what is about to be wanted; with all, they cost as much as if wanted.
        # If the start was deficient it is filled up by random directions.
        missing = size < count + scouts
        seeks = jnp.any((row == count) & (scouts > 0) & (θ > 0))
        probe = (sweeps == 0) & (key is not None) & ~seeks
        large = residuals > bound
        stale = residuals > jnp.where(scouts > 0, _LOOSELY, 1) * bound
        is_guard = spanned & stale & ~is_wanted & (row < count)
        is_guard |= spanned & probe & ~is_wanted & (row < count + scouts)
        worst = row == jnp.argmax(jnp.where(is_guard, residuals, -1))
        directions = _unit(jnp.where(spanned[:, None], defects, 0))
        guard = jnp.sum(jnp.where((is_guard & worst)[:, None], directions, 0), axis=0)
        noise = lax.cond(missing, random, lambda i: jnp.zeros(n, dtype), sweeps)
        wanted_directions = jnp.where((large & is_wanted)[:, None], directions, 0)
        search = jnp.concatenate([wanted_directions, _unit((guard + noise)[None])])

        # Restart from the Ritz vectors and from what the previous ones, as of one sweep
        # earlier, add to their span: the third term of conjugate gradients. All is done
        # with the coefficients, so that neither products nor long vectors are needed.
        # The choice is one of the first 2k rows: both branches of a conditional that
        # returned the whole basis would have one of their own.
        def restart():
            change = state.ritz - _matmul(
                _matmul(state.ritz, coefficients.T), coefficients
            )
            change, rank = _orthonormalise(_unit(change), coefficients)
            keep = jnp.concatenate([coefficients, change])
            return (
                _matmul(keep, basis),
                _matmul(keep, images),
                jnp.pad(_matmul(_matmul(keep, gram), keep.T), ((0, m - 2 * k),) * 2),
                k + rank,
                jnp.eye(k, m, dtype=dtype),
            )

        first, first_images, gram, next_size, ritz = lax.cond(
            size + k + 1 > m,
            restart,
            lambda: (basis[: 2 * k], images[: 2 * k], gram, size, coefficients),
        )
        used = (jnp.arange(m) < next_size)[:, None]
        basis = jnp.where(used, basis.at[: 2 * k].set(first), 0)
        images = jnp.where(used, images.at[: 2 * k].set(first_images), 0)
        stuck = (sweeps > 0) & (rank == 0)  # the basis spans everything it can
        finite = jnp.all(jnp.isfinite(θ))
        proceed = (~converged | missing | probe) & ~stuck & finite
        return _State(
            basis=basis,
            images=images,
            gram=gram,
            size=next_size,
            ritz=ritz,
            search=search,
            values=jnp.where(spanned, θ, -jnp.inf),
            residuals=residuals,
            products=state.products + rank,
            sweeps=sweeps,
            converged=converged,
            proceed=proceed,
        )

    chosen = jnp.where((row < count + scouts)[:, None], _unit(start), 0)
    if key is not None:
        # A random search direction instead would be uncoupled from vectors that have
        # converged, hence forgotten after each call. In a vector some of it stays: a
        # step of the power method removes what belongs to small eigenvalues and
        # magnifies what belongs to larger ones, of size n^-½ at first. The sign of an
        # eigenvector, which is arbitrary, makes no difference.
        noise = jnp.where(scouts > 0, _NOISE, _NOISE_OF_GUARD) * random(max_sweeps)
        noise = jnp.where(_matmul(chosen, noise)[:, None] < 0, -noise, noise)
        last = row == count + scouts - 1
        chosen = _unit(chosen + jnp.where(last[:, None], noise, 0))
    init = _State(
        basis=jnp.zeros((m, n), dtype),
        images=jnp.zeros((m, n), dtype),
        gram=jnp.zeros((m, m), dtype),
        size=jnp.int32(0),
        ritz=jnp.zeros((k, m), dtype),
        search=jnp.concatenate([chosen, jnp.zeros((1, n), dtype)]),
        values=jnp.full(k, -jnp.inf, dtype),
        residuals=jnp.full(k, jnp.inf, dtype),
        products=jnp.int32(0),
        sweeps=jnp.int32(-1),
        converged=jnp.bool_(False),
        proceed=jnp.bool_(True),
    )
    final = lax.while_loop(
        lambda state: state.proceed & (state.sweeps < max_sweeps), sweep, init
    )
    return Eigenpairs(
        values=final.values,
        vectors=_matmul(final.ritz, final.basis),
        images=_matmul(final.ritz, final.images),
        residuals=final.residuals,
        products=final.products,
        sweeps=final.sweeps,
        converged=final.converged,
    )


def scouted(pairs: Eigenpairs, count: int | Int[Array, ""]) -> Float[Array, "k n"]:
    """The vectors of `pairs`, found with this `count` and a `key`, where the next call
    is to start: the scout takes a step of the power method, whose image is known.

    As it has no sweeps, that is how it turns to the largest of the eigenvalues that are
    left. The operator is shifted a little, since the largest of modulus, if negative,
    is not what is looked for. Once it is at a negative one it begins anew.
    """
    values = jnp.where(jnp.isneginf(pairs.values), 0, pairs.values)
    step = _unit(pairs.images + _SHIFT * jnp.max(values) * pairs.vectors)
    step = jnp.where(values[:, None] < 0, 0, step)
    scout = jnp.arange(len(step)) == count
    return jnp.where(scout[:, None], step, pairs.vectors)
