"""Eigenpairs against dense decompositions, and the number of products they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse.linalg import lobpcg_standard

from centralflow.eigen import scouted, top_eigenpairs

DTYPES = ("float32", "float64")


def bulk(n):
    """Decays to slightly below zero, as for the Hessian of a neural network."""
    return 0.5 * np.exp(-np.arange(n) / 30) - 0.02 * np.linspace(0, 1, n)


SPECTRA = {
    "separated": np.concatenate([[2.0, 1.9, 1.5, 1.2, 0.8], bulk(195)]),
    "gap 1e-3": np.concatenate([[2.0, 1.999, 1.998], bulk(197)]),
    "gap 1e-6": np.concatenate([[2.0, 2 - 1e-6, 2 - 2e-6], bulk(197)]),
    "repeated": np.concatenate([[2.0, 2.0, 2.0], bulk(197)]),
    "wide": np.geomspace(1, 1e-12, 200),
    "negative": np.concatenate([[2.0, 1.9, 1.5, 1.2, 0.8], bulk(195)]) - 2.5,
    "rank 4": np.concatenate([[2.0, 1.0, 1.0, 0.5], np.zeros(196)]),
    "zero": np.zeros(200),
    "large": 1e10 * np.concatenate([[2.0, 1.9, 1.5], bulk(197)]),
    "small": 1e-10 * np.concatenate([[2.0, 1.9, 1.5], bulk(197)]),
}


def symmetric(spectrum, seed=0):
    n = len(spectrum)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    matrix = (q * spectrum) @ q.T
    return (matrix + matrix.T) / 2


def rows_of(matrix):
    def operator(V, count):
        def apply(i, images):
            return images.at[i].set(jnp.matmul(matrix, V[i], precision="highest"))

        return jax.lax.fori_loop(0, count, apply, jnp.zeros_like(V))

    return operator


@jax.jit(static_argnames="max_sweeps")
def solve(matrix, start, count, wanted, tolerance, max_sweeps=100, key=None):
    return top_eigenpairs(
        rows_of(matrix),
        start,
        count,
        wanted,
        tolerance=tolerance,
        max_sweeps=max_sweeps,
        key=key,
    )


def random(k, n, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(k, n)), dtype)


def rounding(pairs, scale):
    """Bounds the rounding errors of inner products of length n and of up to 100 sweeps.

    A few ε per product, accumulating at most linearly in the sweeps: that is an
    estimate, not a proof. The vectors of 60 sweeps at a tolerance of zero were
    orthonormal to 70 ε.
    """
    return 100 * float(jnp.finfo(pairs.values.dtype).eps) * scale


def check_consistent(pairs, matrix):
    """What must hold whether or not the pairs have converged."""
    values, vectors = np.float64(pairs.values), np.float64(pairs.vectors)
    spanned = np.isfinite(values)
    scale = np.abs(np.linalg.eigvalsh(matrix)).max()
    small = rounding(pairs, scale)
    np.testing.assert_allclose(
        vectors @ vectors.T, np.diag(spanned), atol=rounding(pairs, 1)
    )
    np.testing.assert_allclose(pairs.images, vectors @ matrix, atol=small)
    defects = vectors @ matrix - np.where(spanned, values, 0)[:, None] * vectors
    residuals = np.linalg.norm(defects, axis=1)
    np.testing.assert_allclose(
        pairs.residuals, np.where(spanned, residuals, np.inf), rtol=1e-5, atol=small
    )
    assert np.all(np.diff(values[spanned]) <= 0)
    assert np.all(values[~spanned] == -np.inf)
    return residuals, small


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_dense(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        matrix = symmetric(SPECTRA[name])
        relative = 1e-4 if dtype == "float32" else 1e-8
        wanted = 3
        matrix = jnp.asarray(matrix, dtype)
        pairs = solve(matrix, random(6, 200, dtype), 4, wanted, relative)
        tolerance = relative * float(jnp.max(jnp.abs(pairs.values)))
        assert pairs.values.dtype == pairs.vectors.dtype == dtype
        # The matrix as rounded to the dtype is the one whose eigenpairs are sought.
        matrix = np.float64(matrix)
        residuals, small = check_consistent(pairs, matrix)
        assert pairs.converged
        assert np.all(pairs.residuals[:wanted] <= tolerance)
        true, vectors = np.linalg.eigh(matrix)
        true, vectors = true[::-1], vectors[:, ::-1]
        # Ritz values lie below the eigenvalues (Cauchy), and some eigenvalue is within
        # the residual. That it is the i-th one cannot be known from residuals; from a
        # random start it is so.
        error = true[:wanted] - np.float64(pairs.values[:wanted])
        assert np.all(error >= -small)
        assert np.all(error <= residuals[:wanted] + small)
        gap = true[wanted - 1] - true[wanted]
        if gap > 10 * tolerance:
            total = np.linalg.norm(residuals[:wanted])
            lost = np.float64(pairs.vectors[:wanted]) @ vectors[:, wanted:]
            # Davis and Kahan, with the Ritz values within `total` of the true ones; the
            # eigenvalues' errors sum to at most the residuals' squares over the gap.
            assert np.linalg.norm(lost, 2) <= (total + small) / (gap - total)
            assert error.sum() <= total**2 / (gap - total) + wanted * small


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("shift", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("known", [True, False])
def test_fewer_dimensions_than_rows(n, shift, known):
    matrix = symmetric(np.arange(n) + shift)
    start = random(4, n) * known
    pairs = solve(jnp.asarray(matrix, "float32"), start, 4, 4, 1e-4)
    check_consistent(pairs, np.float64(np.float32(matrix)))
    # All there is is found, and nothing else: no 0 from the rows that are not used.
    np.testing.assert_allclose(
        pairs.values[:n], np.arange(n)[::-1] + shift, atol=rounding(pairs, 7)
    )
    assert np.all(pairs.values[n:] == -np.inf)
    assert pairs.converged
    assert pairs.products == n


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_deficient_start(rank):
    # Of six rows only the span of `rank` is usable; one is not even finite.
    matrix = symmetric(SPECTRA["separated"])
    start = random(6, rank, seed=2) @ random(rank, 200)
    start = start.at[5].set(jnp.nan)
    pairs = solve(jnp.asarray(matrix, "float32"), start, 6, 4, 1e-3)
    residuals, small = check_consistent(pairs, np.float64(np.float32(matrix)))
    assert pairs.converged
    np.testing.assert_allclose(
        pairs.values[:4], [2.0, 1.9, 1.5, 1.2], atol=residuals[:4].max() + small
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_finite(bad):
    matrix = jnp.eye(50).at[3, 4].set(bad)
    pairs = solve(matrix, random(4, 50), 3, 2, 1e-3, key=jax.random.key(0))
    assert not pairs.converged
    assert pairs.products <= 4  # it stops, and does not try on


def test_sweeps_are_limited():
    matrix = jnp.asarray(symmetric(SPECTRA["separated"]), "float32")
    for max_sweeps in (0, 3):
        pairs = solve(matrix, random(6, 200), 3, 2, 1e-6, max_sweeps)
        assert pairs.sweeps == max_sweeps
        assert not pairs.converged
        # Two wanted pairs and the worst guard in each sweep, none of them converged.
        assert pairs.products == 3 + 3 * max_sweeps


def test_products_are_counted():
    matrix = jnp.asarray(symmetric(SPECTRA["separated"]), "float32")
    calls = []

    def operator(V, count):
        def apply(i, images):
            jax.debug.callback(calls.append, i)
            return images.at[i].set(matrix @ V[i])

        return jax.lax.fori_loop(0, count, apply, jnp.zeros_like(V))

    def count(start):
        return top_eigenpairs(operator, start, 4, 3, tolerance=1e-3, max_sweeps=50)

    pairs = jax.jit(count)(random(6, 200))
    jax.effects_barrier()
    assert pairs.products == len(calls) > 4


@pytest.mark.parametrize("wanted", [1, 3, 5])
def test_fewer_products_than_lobpcg(wanted):
    matrix = jnp.asarray(symmetric(SPECTRA["separated"]), "float32")
    start, tolerance = random(wanted + 1, 200), 2e-3

    # LOBPCG stops at residuals of 10 n tol (λ + |A v|), so this asks of it
    # `tolerance` for the last wanted pair, and less than that for the others. It
    # applies the matrix to its basis of 3 `wanted` vectors in each iteration.
    easier = tolerance / (10 * 200 * 2 * SPECTRA["separated"][wanted - 1])
    _, _, iterations = lobpcg_standard(matrix, start[:wanted].T, m=100, tol=easier)
    assert iterations < 100
    relative = tolerance / SPECTRA["separated"][0]
    pairs = solve(matrix, start, wanted + 1, wanted, relative)
    assert pairs.converged
    assert pairs.products < 3 * wanted * iterations


def test_warm_start_costs_count():
    matrix = jnp.asarray(symmetric(SPECTRA["separated"]), "float32")
    cold = solve(matrix, random(6, 200), 4, 3, 1e-3)
    # Rounding moves residuals just below the tolerance by ~1e-6, so allow that.
    warm = solve(matrix, cold.vectors, 4, 3, 1.01e-3)
    assert warm.products == 4
    assert warm.sweeps == 0
    assert warm.converged
    # One more can be asked for, from the rows that came along, and costs less than
    # from scratch.
    more = solve(matrix, cold.vectors, 5, 4, 1e-3)
    scratch = solve(matrix, random(6, 200), 5, 4, 1e-3)
    assert more.converged
    assert more.products < scratch.products


def test_count_and_wanted():
    matrix = jnp.asarray(symmetric(SPECTRA["separated"]), "float32")
    start = random(6, 200)
    # Rows of the start beyond `count` do not enter.
    one = solve(matrix, start, 4, 3, 1e-3)
    two = solve(matrix, start.at[4:].set(7.0), 4, 3, 1e-3)
    np.testing.assert_array_equal(one.vectors, two.vectors)
    # `converged` is about the wanted rows; with more of them wanted, more are found.
    assert np.all(one.residuals[:3] <= 1e-3 * one.values[0])
    assert np.any(one.residuals[3:] > 1e-3)
    all_ = solve(matrix, start, 6, 5, 1e-3)
    assert np.all(all_.residuals[:5] <= 1e-3)
    # Without sweeps, the basis spans `count` rows.
    none = solve(matrix, start, 4, 3, 1e-3, 0)
    np.testing.assert_array_equal(np.isfinite(none.values), np.arange(6) < 4)


def drifting(steps, angle, n=100):
    """Outliers that move and cross, in eigenvectors that turn with time."""
    generator = np.random.default_rng(5).normal(size=(n, n)) / np.sqrt(n)
    generator = angle / 2 * (generator - generator.T)
    turn = np.linalg.solve(np.eye(n) - generator, np.eye(n) + generator)
    vectors = np.linalg.qr(np.random.default_rng(6).normal(size=(n, n)))[0]
    for t in range(steps):
        # The first two cross at t = 10, the last two at t = 20.
        top = np.array([2.0 - 0.01 * t, 1.9, 1.5]) + 0.02 * t * np.array([0, 0, 1])
        spectrum = np.concatenate([top, [1.2, 0.8], bulk(n - 5)])
        yield np.sort(spectrum)[::-1], (vectors * spectrum) @ vectors.T
        vectors = turn @ vectors


@pytest.mark.parametrize("angle", [1e-3, 1e-2])
def test_drift_is_tracked(angle):
    tolerance, vectors, products = 2e-2, random(6, 100), []
    for true, matrix in drifting(30, angle):
        pairs = solve(jnp.asarray(matrix, "float32"), vectors, 4, 3, tolerance)
        vectors = pairs.vectors
        assert pairs.converged
        # All of them, through the crossings, and within the residuals.
        np.testing.assert_allclose(pairs.values[:3], true[:3], atol=tolerance)
        products.append(int(pairs.products))
    # At most one sweep on average: 4 products and 3 wanted pairs and a guard.
    assert np.mean(products[1:]) <= 8
    assert np.mean(products[1:]) < products[0] / 2


def follow(diagonals, key, k=6, hidden=399):
    """Whether the largest value is known in each of a series of diagonal matrices, with
    4 rows of k. Coordinates never mix: what is zero in the start remains exactly zero,
    but for random perturbations."""
    vectors, found = random(k, 400).at[:, hidden].set(0), []
    for t, diagonal in enumerate(diagonals):
        noise = key if key is None else jax.random.fold_in(key, t)
        matrix = jnp.asarray(np.diag(diagonal), "float32")
        pairs = solve(matrix, vectors, 4, 3, 2e-2, key=noise)
        vectors = scouted(pairs, 4)
        assert pairs.converged
        found.append(abs(float(pairs.values[0]) - diagonal.max()) <= 2e-2)
    return found


def rising(t, slope):
    return np.concatenate([[2.0, 1.9, 1.5, 1.2, 0.8], bulk(394), [0.4 + slope * t]])


@pytest.mark.parametrize("k", [4, 6])
def test_hidden_eigenvector_is_found(k):
    """One that rises from among the bulk to above all others. It is among the wanted
    from t = 23 on, and the largest only from t = 33 on, which is never missed."""
    diagonals = [rising(t, 0.05) for t in range(80)]
    assert not follow(diagonals, None)[-1]
    assert all(follow(diagonals, jax.random.key(3), k))


def test_the_scout_finds_more_than_a_perturbed_guard():
    """Of one that rises three times as fast, and is the largest from t = 11 on."""
    diagonals, misses = [rising(t, 0.15) for t in range(25)], []
    for k in (6, 4):
        found = [follow(diagonals, jax.random.key(seed), k) for seed in range(8)]
        assert np.all(np.array(found)[:, -1])
        misses.append(np.sum(~np.array(found)))
    assert 1.5 * misses[0] < misses[1]


def test_the_scout_is_not_led_to_negative_eigenvalues():
    """Without the shift the power method would turn to the largest modulus."""
    diagonal = np.concatenate([[2.0, 1.9, 1.5, 1.2, 0.8], np.zeros(394), [-0.9]])
    # It starts at the negative one.
    vectors = jnp.eye(400, dtype="float32")[jnp.array([0, 1, 2, 3, 399, 5])]
    matrix = jnp.asarray(np.diag(diagonal), "float32")
    for t in range(30):
        key = jax.random.key(t)
        pairs = solve(matrix, vectors, 4, 3, 2e-2, key=key)
        vectors = scouted(pairs, 4)
    assert abs(vectors[4] @ jnp.eye(400)[4]) > 0.9
    # Nothing but the scout has moved.
    np.testing.assert_array_equal(vectors[:4], pairs.vectors[:4])


def test_scout_costs_one_product():
    matrix = jnp.asarray(symmetric(SPECTRA["separated"]), "float32")
    settled = solve(matrix, random(6, 200), 5, 5, 1e-3).vectors
    assert solve(matrix, settled, 5, 4, 1.1e-3).products == 5
    # As the sixth row; or, without room for it, for the perturbed guard.
    for start in settled, settled[:5]:
        found = solve(matrix, start, 5, 4, 1.1e-3, key=jax.random.key(0))
        assert found.products == 6
        assert found.converged


def test_vmap():
    matrices = jnp.asarray(
        [symmetric(SPECTRA[s]) for s in ("separated", "wide", "negative")], "float32"
    )
    starts = jnp.stack([random(5, 200, seed=s) for s in range(3)])
    counts, wanted = jnp.array([5, 3, 4]), jnp.array([3, 3, 2])
    keys = jax.random.split(jax.random.key(0), 3)

    def one(matrix, start, count, wanted, key):
        return solve(matrix, start, count, wanted, 1e-2, 100, key)

    batch = jax.vmap(one)(matrices, starts, counts, wanted, keys)
    for i in range(3):
        single = one(matrices[i], starts[i], counts[i], wanted[i], keys[i])
        assert single.converged
        assert batch.converged[i]
        # The products may differ in their last bits, so in order of summation, which
        # changes vectors within residuals, and values by their squares over the gaps.
        w = wanted[i]
        np.testing.assert_allclose(batch.values[i][:w], single.values[:w], atol=1e-3)
        assert abs(int(batch.products[i]) - int(single.products)) <= 2


@pytest.mark.usefixtures("x64")
def test_pairs_above_a_value_are_wanted_too():
    """Among the first `count`; the others stay guards."""
    matrix = jnp.asarray(symmetric(SPECTRA["separated"]))  # 2, 1.9, 1.5, 1.2, 0.8
    start = jax.random.normal(jax.random.key(0), (4, 200))
    find = lambda above: top_eigenpairs(
        rows_of(matrix), start, 4, 1, tolerance=1e-8, max_sweeps=200, above=above
    )
    residuals = lambda above: np.asarray(find(above).residuals) / 2
    assert find(1.4).converged
    for above, wanted in ((1.4, 3), (jnp.inf, 1), (0.0, 4)):
        found = residuals(above) <= 1e-8
        np.testing.assert_array_equal(found, np.arange(4) < wanted)
