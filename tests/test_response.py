"""The response of the end of a long step, against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf
from centralflow.flows.base import FlowState
from centralflow.flows.expansion import Forcing
from centralflow.flows.leapfrog import RingingResponse
from centralflow.flows.response import Response
from centralflow.krylov import krylov

SIZE, TRACKED, RATE, DT = 7, 2, 0.4, 30.0


@pytest.fixture(params=[SIZE - TRACKED, 2])
def known(request):
    """A response with two tracked eigenvectors of P^-1/2 H P^-1/2, and a Krylov space
    across them: of all the others, or small; with that matrix."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        Q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
        values = np.geomspace(2, 1e-3, SIZE)
        A, v = jnp.asarray((Q * values) @ Q.T), jnp.asarray(rng.normal(size=SIZE))
        V = jnp.asarray(Q[:, :TRACKED].T)
        across = lambda x: x - (V @ x) @ V
        operator = lambda x: across(A @ x)
        space = krylov(operator, across(v), jnp.asarray(request.param), SIZE)
        optimizer = cf.GradientDescent(RATE)
        y = FlowState(v, optimizer.init(v), {})
        values = jnp.asarray(values[:TRACKED])
        yield Response(optimizer, y, jnp.asarray(DT), V, values, space), A, rng


@pytest.mark.parametrize("known", [SIZE - TRACKED], indirect=True)
def test_response(known):
    """Of dx/dt = -A x - rate F(t) from x = 0, by Gauss's quadrature, which is exact to
    rounding: e^(-z) for z up to 60 is resolved by 64 nodes."""
    respond, A, rng = known
    F, slope = (jnp.asarray(rng.normal(size=SIZE)) for _ in range(2))
    zero = jnp.zeros(SIZE)
    end = respond(Forcing(F, zero), Forcing(slope, zero)).weights
    values, Q = np.linalg.eigh(A)
    x, weight = np.polynomial.legendre.leggauss(64)
    expected = np.zeros(SIZE)
    for share, w in zip((x + 1) / 2, weight / 2, strict=True):
        decay = (Q * np.exp(-DT * values * (1 - share))) @ Q.T
        expected -= DT * RATE * w * decay @ (F + slope * (share - 0.5))
    np.testing.assert_allclose(end, expected, rtol=1e-9)


@pytest.mark.parametrize("rings", [False, True])
def test_self_adjoint(known, rings):
    """Which the complementarity problem of several forces takes for granted."""
    respond, _, rng = known
    if rings:
        optimizer, w = cf.HeavyBall(RATE, 0.9), respond.y.weights
        y = FlowState(w, optimizer.init(w), {})
        r = respond
        respond = RingingResponse(optimizer, y, r.dt, r.eigenvectors, r.values, r.space)
    F, G, zero = (*jnp.asarray(rng.normal(size=(2, SIZE))), jnp.zeros(SIZE))
    for arrange in (lambda x: (x, zero), lambda x: (zero, x)):
        end = lambda x, arrange=arrange: (
            respond(*(Forcing(part, zero) for part in arrange(x))).weights
        )
        np.testing.assert_allclose(G @ end(F), F @ end(G), rtol=1e-12)
        assert abs(G @ end(F)) > 1e-2


@pytest.mark.parametrize("known", [2], indirect=True)
def test_with_caution(known):
    """Forces of which nothing is known are answered to alike: a little more than the
    known one, across the eigenvectors; with full caution by no less than in truth."""
    respond, A, rng = known
    values, Q = np.linalg.eigh(A)
    phi = -np.expm1(-DT * values) / (DT * values)
    space = np.concatenate([respond.eigenvectors, respond.space.basis[:2]])
    F = np.linalg.qr(np.concatenate([space, rng.normal(size=(3, SIZE))]).T)[0].T[4:]
    zero = jnp.zeros(SIZE)

    def answers(respond):
        none = Forcing(zero, zero)
        ends = [respond(Forcing(jnp.asarray(f), zero), none).weights for f in F]
        return -np.sum(F * np.array(ends), axis=1) / (DT * RATE)

    v = space[2]
    known = v @ (Q * phi) @ Q.T @ v  # a quadrature: not exact with two products
    usual = answers(respond)
    np.testing.assert_allclose(usual, usual[0], rtol=1e-12)
    np.testing.assert_allclose(usual, known**0.5, rtol=0.2)
    most = answers(respond.with_caution(jnp.ones(())))
    np.testing.assert_allclose(most, 1, rtol=1e-12)
    assert np.all(most > np.sum((F @ Q) ** 2 * phi, axis=1))
    half = answers(respond.with_caution(jnp.full((), 0.5)))
    np.testing.assert_allclose(half, np.sqrt(usual), rtol=1e-12)
