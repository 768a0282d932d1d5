"""Slowing the fastest modes, and how a step's end responds to its forcing, in closed
form and against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from centralflow.flows.response import chi, phi_1
from centralflow.flows.stiff_modes import none_known, stiff_modes
from centralflow.krylov import krylov

pytestmark = pytest.mark.usefixtures("x64")

SIZE, TRACKED, PRODUCTS = 60, 3, 30


def _problem(spectrum, seed=0):
    """A preconditioner, a matrix P^-1/2 H P^-1/2, its eigenvectors, and what is found
    from the top three of them and a Krylov space."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    A, P = jnp.asarray((Q * spectrum) @ Q.T), jnp.asarray(rng.uniform(1, 3, SIZE))
    V = jnp.asarray(Q[:, :TRACKED].T)
    across = lambda x: x - V.T @ (V @ x)
    operator = lambda x: across(A @ across(x))
    v = across(jnp.asarray(rng.normal(size=SIZE)))
    space = krylov(operator, v, jnp.asarray(PRODUCTS), PRODUCTS)
    values, exact = jnp.asarray(spectrum[:TRACKED]), jnp.zeros(TRACKED)
    return P, A, stiff_modes(V, values, exact, jnp.asarray(TRACKED), space)


def _separated():
    return np.concatenate([[2.0, 1.9, 1.7, 1.5, 1.2, 1.0], np.linspace(0.4, 0, 54)])


def test_the_top_eigenpairs_are_found():
    spectrum = _separated()
    _, _, modes = _problem(spectrum)
    V = np.asarray(modes.eigenvectors)
    used = int(np.sum(modes.values > 0))
    assert used >= 6
    np.testing.assert_allclose(modes.values[:6], spectrum[:6], atol=1e-6)
    # What has not converged bounds the rest, as well as eigenvectors are known.
    assert spectrum[used] <= 1.01 * modes.rest < 0.5
    np.testing.assert_allclose(V @ V.T, np.diag(np.arange(16) < used), atol=1e-10)


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.3])
@pytest.mark.parametrize("dt", [1e3, 60.0])
def test_no_mode_is_faster_than_the_floor(dt, scale):
    """Nor slower; P may have grown or fallen since the modes were found."""
    P, A, modes = _problem(_separated())
    floor = max(float(modes.rest), 40 / dt)
    root, dt = jnp.sqrt(P), jnp.asarray(dt)
    # dw/dt = -(scale P)^-1 H w, with H = P^1/2 A P^1/2
    slowed = jax.vmap(
        lambda w: scale * modes.slowed(-(A @ (root * w)) / root / scale, scale * P, dt),
        out_axes=1,
    )(jnp.eye(SIZE))
    rates = np.sort(np.linalg.eigvals(-slowed).real)[::-1]
    fast = int(np.sum(_separated() > floor))
    # A residual of 1 % of the eigenvalue couples a mode to those that are not slowed.
    np.testing.assert_allclose(rates[:fast], floor, rtol=0.015)
    np.testing.assert_allclose(rates[fast:], _separated()[fast:], atol=0.015 * floor)


def test_turned_eigenvectors():
    """A mode of eigenvalue lambda, turned by an angle a towards one that is not slowed,
    has a rate of at most floor + lambda sin^2 a."""
    spectrum = np.concatenate([[2.0, 1.9, 1.7], np.zeros(SIZE - 3)])
    P, _, modes = _problem(spectrum)
    V, root, angle, dt = modes.eigenvectors, jnp.sqrt(P), 0.3, jnp.asarray(400.0)
    other = np.linalg.svd(np.asarray(V[:3]))[2][-1]
    turned = np.cos(angle) * V[0] + np.sin(angle) * other
    slowed = jax.vmap(
        lambda w: modes.slowed(2 * turned * (turned @ (root * w)) / root, P, dt),
        out_axes=1,
    )(jnp.eye(SIZE))
    top = np.max(np.linalg.eigvals(slowed).real)
    floor = max(float(modes.rest), 0.1)
    bound = floor + 2 * np.sin(angle) ** 2
    assert 2 * np.sin(angle) ** 2 < top < bound < 0.4 + floor


def test_nothing_known_slows_nothing():
    modes = none_known(4, jnp.float64)
    rate = jnp.arange(4.0)
    np.testing.assert_array_equal(modes.slowed(rate, jnp.ones(4), jnp.ones(())), rate)


def test_a_cluster_that_is_not_resolved_is_not_slowed():
    """57 eigenvalues from 1.6 down to 0 and 30 products: whatever the Ritz values, no
    mode that is not slowed may be faster than what the rest is taken for."""
    spectrum = np.concatenate([[2.0, 1.9, 1.8], np.linspace(1.6, 0, SIZE - 3)])
    _, _, modes = _problem(spectrum)
    used = int(np.sum(modes.values > 0))
    missed = spectrum[used:]
    assert np.all(missed < 1.02 * modes.rest), (used, modes.rest)


@pytest.mark.parametrize("z", [0.0, -1e-4, -0.1, -0.19, -0.21, -1.0, -40.0, 0.5])
def test_response_functions(z):
    """The ends of y' = z y + f(t), y(0) = 0, for f = 1 and f = t - 1/2."""
    end = lambda f: quad(lambda t: np.exp(z * (1 - t)) * f(t), 0, 1, epsabs=1e-13)[0]
    one, slope = end(lambda t: 1.0), end(lambda t: t - 0.5)
    # The series of phi_1 leaves out z^2 / 6, 2e-7; that of chi, z^6 / 13440.
    np.testing.assert_allclose(phi_1(jnp.asarray(z)), one, rtol=2e-7)
    np.testing.assert_allclose(chi(jnp.asarray(z)), slope, atol=1e-8)
