"""Functions of a matrix by the Lanczos iteration, against its eigenvectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import Polynomial
from numpy.polynomial.chebyshev import Chebyshev

from centralflow.krylov import krylov

MOST, SIZE = 6, 30


def phi_1(z):
    return np.where(z == 0, 1, np.expm1(z) / np.where(z == 0, 1, z))


def _matrix(spectrum, seed=0):
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(len(spectrum), len(spectrum))))
    return Q, (Q * spectrum) @ Q.T, rng.normal(size=len(spectrum))


def _apply(function, A, v):
    """f(A) v / |v|."""
    values, Q = np.linalg.eigh(A)
    return Q @ (function(values) * (Q.T @ v)) / np.linalg.norm(v)


def _lanczos(A, v, count, dtype=jnp.float64):
    return _jitted(jnp.asarray(A, dtype), jnp.asarray(v, dtype), jnp.asarray(count))


@jax.jit
def _jitted(A, v, count):
    return krylov(lambda x: A @ x, v, count, MOST)


def _check_orthonormal(space, rows, atol):
    basis = np.asarray(space.basis)
    gram = basis @ basis.T
    np.testing.assert_allclose(gram, np.diag(np.arange(MOST) < rows), atol=atol)
    np.testing.assert_array_equal(space.basis[rows:], 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [1, 2, 4, MOST])
def test_exact_for_polynomials(count):
    _, A, v = _matrix(np.linspace(-1, 1, SIZE))
    space = _lanczos(A, v, count)
    _check_orthonormal(space, count, atol=1e-14)
    np.testing.assert_allclose(space.basis[0], v / np.linalg.norm(v), atol=1e-15)
    rng = np.random.default_rng(1)
    degree_below = Polynomial(rng.normal(size=count))
    approximation = space.coefficients(degree_below) @ space.basis
    np.testing.assert_allclose(approximation, _apply(degree_below, A, v), atol=1e-13)
    # The first coefficient is a Gauss quadrature, exact up to degree 2 count - 1 ...
    mean = lambda f: v @ _apply(f, A, v) / np.linalg.norm(v)
    quadrature = Polynomial(rng.normal(size=2 * count))
    first = space.coefficients(quadrature)[0]
    np.testing.assert_allclose(first, mean(quadrature), atol=1e-13)
    np.testing.assert_allclose(
        space.mean(jnp.asarray(quadrature(space.nodes))), first, atol=1e-13
    )
    # ... and no more: what is missing is a square.
    power = lambda x: x ** (2 * count)
    assert mean(power) - space.coefficients(power)[0] > 1e-4
    # f of the compressed matrix, for any vector
    basis, x = np.asarray(space.basis[:count]), rng.normal(size=SIZE)
    compressed = _apply(degree_below, basis @ A @ basis.T, basis @ x)
    compressed *= np.linalg.norm(basis @ x)
    within = space.within(*map(jnp.asarray, (degree_below(space.nodes), x)))
    np.testing.assert_allclose(within[:count], compressed, atol=1e-12)
    np.testing.assert_allclose(within[count:], 0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("t", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("count", [2, MOST])
def test_phi_1_within_twice_the_best_polynomial(t, count):
    """|f(A) v - p_f| <= 2 max |f - p| over the spectrum, for every p of degree below
    `count`: here the one that interpolates f at Chebyshev's nodes."""
    top = 2.0
    _, A, v = _matrix(np.linspace(0, top, SIZE))
    f = lambda x: phi_1(-t * np.asarray(x))
    space = _lanczos(A, v, count)
    error = np.linalg.norm(space.coefficients(f) @ space.basis - _apply(f, A, v))
    p = Chebyshev.interpolate(f, count - 1, domain=[0, top])
    x = np.linspace(0, top, 10001)
    bound = 2 * np.max(np.abs(f(x) - p(x)))
    assert error <= bound + 1e-14
    assert bound < 2, "worse than nothing, and no test"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_an_invariant_subspace_ends_it(dtype):
    with jax.enable_x64(True):
        Q, A, _ = _matrix(np.linspace(0.5, 3, SIZE))
        v = Q[:, 4] + 2 * Q[:, 17]
        space = _lanczos(A, v, MOST, dtype)
        eps = float(jnp.finfo(dtype).eps)
        assert all(jnp.all(jnp.isfinite(x)) for x in (space.basis, space.nodes))
        _check_orthonormal(space, 2, atol=20 * eps)
        f = lambda x: np.exp(-np.asarray(x, float))
        approximation = np.asarray(space.coefficients(f), float) @ space.basis
        expected = _apply(f, A, v)
        np.testing.assert_allclose(approximation, expected, atol=20 * eps)


def test_the_zero_vector():
    _, A, v = _matrix(np.ones(SIZE))
    space = _lanczos(A, 0 * v, MOST, jnp.float32)
    np.testing.assert_array_equal(space.basis, 0)
    assert np.all(np.isfinite(space.coefficients(jnp.exp)))


def test_no_product_at_all():
    """Where there is nothing to solve for, the operator is not called."""
    _, _, v = _matrix(np.ones(SIZE))
    space = krylov(
        lambda x: jnp.full_like(x, jnp.nan), jnp.asarray(v), jnp.asarray(0), MOST
    )
    assert np.all(np.isfinite(space.basis))
    np.testing.assert_array_equal(space.nodes, 0)


@pytest.mark.usefixtures("x64")
def test_deflated():
    """With the top eigenvectors projected out of operator and vector, f acts on the
    rest alone, and f(0) brings nothing of them back."""
    spectrum = np.concatenate([np.linspace(0, 1, SIZE - 3), [500, 800, 1000]])
    Q, A, v = _matrix(spectrum)
    U = Q[:, -3:]
    rest = lambda x: x - U @ (U.T @ x)
    count = 5
    space = krylov(
        lambda x: rest(jnp.asarray(A) @ x), jnp.asarray(rest(v)), jnp.asarray(count),
        MOST,
    )  # fmt: skip
    # the products with A are rounded relative to 1000
    np.testing.assert_allclose(space.basis @ U, 0, atol=1e-12)
    _check_orthonormal(space, count, atol=1e-12)
    low, W = spectrum[:-3], Q[:, :-3]
    f = Polynomial(np.random.default_rng(2).normal(size=count))
    expected = W @ (f(low) * (W.T @ v)) / np.linalg.norm(rest(v))
    np.testing.assert_allclose(space.coefficients(f) @ space.basis, expected, atol=1e-9)
    assert np.max(np.abs(space.nodes)) < 1 + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_orthonormal_in_float32(seed):
    """A spectrum over six decades, as that of a Hessian."""
    _, A, v = _matrix(np.geomspace(1e-5, 10, SIZE), seed)
    space = _lanczos(A, v, MOST, jnp.float32)
    _check_orthonormal(space, MOST, atol=20 * np.finfo(np.float32).eps)
    assert np.max(space.nodes) <= 10 * (1 + 1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("count", [1, 3, MOST])
def test_residuals_of_the_eigenvectors(count):
    _, A, v = _matrix(np.linspace(-1, 1, SIZE))
    space = _lanczos(A, v, count)
    vectors = np.asarray(space.vectors.T @ space.basis)
    residuals = np.linalg.norm(vectors @ A - space.nodes[:, None] * vectors, axis=1)
    np.testing.assert_allclose(space.residuals, residuals, atol=1e-13)
    assert space.size == count
    assert np.max(residuals) > 0.05
