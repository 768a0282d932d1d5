"""The critical eigenvectors where a step has turned them, against dense ones."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from centralflow.flows.coupling import turned_eigenvectors

SIZE, CRITICAL, KAPPA = 9, 2, 2.0


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tracked", [SIZE, 4])
def test_of_first_order(tracked):
    """H and P change by t. What is left is of second order in t if all eigenvectors are
    tracked; else (kappa P - H)^-1 is a guess, exact for eigenvalues of kappa / 2."""
    rng = np.random.default_rng(0)
    P, symmetric = np.exp(rng.normal(size=SIZE)), rng.normal(size=(2, SIZE, SIZE))
    Q, _ = np.linalg.qr(symmetric[0])
    values = KAPPA * np.concatenate([[1, 1, 0.8, 0.7], np.full(SIZE - 4, 0.5)])
    root = np.sqrt(P)
    H = root[:, None] * (Q * values) @ Q.T * root
    E, dP = symmetric[1] + symmetric[1].T, P * rng.normal(size=SIZE)
    U = np.pad(Q.T[:tracked] / root, ((0, SIZE - tracked), (0, 0)))
    rows = np.arange(SIZE)
    errors = []
    for t in 1e-2, 1e-3:
        H1, P1 = H + t * E, P + t * dP
        images = U @ H1
        V = turned_eigenvectors(
            *map(jnp.asarray, (U, images, P1, values)),
            jnp.asarray(rows < CRITICAL),
            jnp.asarray(rows < tracked),
            KAPPA,
        )
        np.testing.assert_allclose((V * P1) @ V.T, np.diag(rows < CRITICAL), atol=1e-12)
        true = scipy.linalg.eigh(H1, np.diag(P1))[1][:, -CRITICAL:]
        errors.append(np.max(np.abs(V.T @ V - true @ true.T)))
        before = np.max(np.abs(U[:CRITICAL].T @ U[:CRITICAL] - true @ true.T))
    np.testing.assert_allclose(errors[0] / errors[1], 100, rtol=0.2)
    assert errors[1] < 0.05 * before
