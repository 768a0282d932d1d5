"""What turned eigenvectors lack, against dense matrices."""

import jax.numpy as jnp
import numpy as np
import pytest

from centralflow.flows.coupling import coupling

SIZE, ROWS, CRITICAL, TRACKED, KAPPA = 40, 6, 2, 4, 2.0


def _turned(size, towards, bulk, scale=1.0, seed=0):
    """Eigenvectors of P^-1 H before a step, and H after it: the critical ones turned
    by a step of some `size` towards those of the rows `towards`. At the edge after it,
    with the eigenvalues 1.9 and 1.7 of two more below, and all others up to `bulk`."""
    rng = np.random.default_rng(seed)
    P = np.exp(rng.normal(size=SIZE)) if scale is None else np.full(SIZE, scale)
    V, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
    before = np.concatenate([[2, 2, 1.9, 1.7], np.linspace(bulk, 0, SIZE - TRACKED)])
    change = np.zeros((SIZE, SIZE))
    change[:CRITICAL, towards] = size * rng.normal(
        size=change[:CRITICAL, towards].shape
    )
    A = V @ (np.diag(before) + change + change.T) @ V.T
    U = (V / np.sqrt(P)[:, None]).T[:ROWS]
    H = np.sqrt(P)[:, None] * A * np.sqrt(P)
    rows = np.arange(ROWS)
    P = jnp.asarray(P if scale is None else scale)
    found = coupling(
        jnp.asarray(U), jnp.asarray(np.where(rows[:, None] < CRITICAL, U @ H, 0)), P,
        jnp.eye(ROWS), jnp.asarray(before[:ROWS]), jnp.asarray(rows < CRITICAL),
        jnp.asarray(rows < TRACKED), KAPPA,
    )  # fmt: skip
    return found, np.linalg.eigvalsh(A)[-1] - KAPPA


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1.0, 0.1, None])
def test_towards_the_guards(scale):
    """Exact, by their eigenvalues together, however large."""
    found, excess = _turned(0.1, slice(CRITICAL, TRACKED), 0.5, scale)
    assert excess > 0.05
    np.testing.assert_allclose(found.excess, excess, rtol=1e-12)
    np.testing.assert_allclose(found.values[-2:], KAPPA, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1.0, None])
@pytest.mark.parametrize("bulk", [0.0, 0.5, 1.0])
def test_towards_the_bulk(bulk, scale):
    """All eigenvalues there being between 0 and kappa / 2, the distance to them is one
    to two times that which is assumed: the excess is at most twice too large. That is
    to second order; the next one is size^2 / kappa = 0.01 times smaller."""
    found, excess = _turned(0.02, slice(TRACKED, None), bulk, scale)
    ratio = float(found.excess / excess)
    assert 1 - 0.03 < ratio < 2 + 0.03
    if bulk == 0:
        np.testing.assert_allclose(ratio, 2, rtol=0.02)


@pytest.mark.usefixtures("x64")
def test_the_step_is_of_second_order():
    ratio = [
        _turned(size, slice(CRITICAL, None), 0.5)[0].excess for size in (2e-3, 1e-3)
    ]
    np.testing.assert_allclose(ratio[0] / ratio[1], 4, rtol=0.01)


@pytest.mark.usefixtures("x64")
def test_what_would_be_lost():
    """Nothing by leaving out what is not coupled; all by leaving the guards out; a part
    of it, that of the second, by leaving one out."""
    found, excess = _turned(0.1, slice(CRITICAL, TRACKED), 0.5)
    np.testing.assert_allclose(found.lost[2], excess, rtol=1e-12)
    assert 0 < found.lost[3] < found.lost[2]
    np.testing.assert_allclose(np.asarray(found.lost)[[0, 4, 5]], 0, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_far_below_the_edge():
    """Where no eigenvalue comes near the edge it does not matter what they lack."""
    U = jnp.eye(3)
    H = jnp.diag(jnp.array([1.5, 1.4, 0.1])) + 0.1
    rows = jnp.arange(3)
    images = jnp.where(rows[:, None] < 1, U @ H, 0)
    found = coupling(
        U, images, jnp.asarray(1.0), U, jnp.diag(H), rows < 1, rows < 2, KAPPA
    )
    assert found.excess == 0
    np.testing.assert_array_equal(found.lost, 0)
