"""The end of a long step: what is measured there along the tracked eigenvectors."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf
from centralflow.flows.base import FlowState

pytestmark = pytest.mark.usefixtures("x64")

VALUES = np.array([2.001, 1.83, 1.38, 0.9, 0.5, 0.3, 0.2, 0.1, 0.05])
SIZE, TRACKED = len(VALUES), 3
# What the correction adds to the Hessian of the tracked eigenvectors: it couples the
# first, which is critical, to the second, and the second rises past it.
ADDED = np.zeros((SIZE, SIZE))
ADDED[:2, :2] = [[0, 0.059], [0.059, 0.22]]


def _completed(added):
    """The expansion at weights where `added` is added to the Hessian that it knows."""

    def loss(w):
        v, t = w[:-1], w[-1]
        return 0.5 * v @ (jnp.diag(VALUES) + t * jnp.asarray(added)) @ v

    weights = jnp.zeros(SIZE + 1)
    flat = cf.Objective(loss).flatten(weights)[1]
    flow, optimizer = cf.CentralFlow(eigen_tolerance=1e-10), cf.GradientDescent(1.0)
    term = flow.term(flat, optimizer, {}, jnp.zeros(0, int), jnp.asarray(1e-2))
    y = FlowState(weights, optimizer.init(weights), {})
    zero = jnp.zeros(())
    e = term.expand_ahead(y, None, None, zero, zero)
    e = dataclasses.replace(e, tracked=jnp.int32(TRACKED))
    assert e.critical == 1
    y = dataclasses.replace(y, weights=weights.at[-1].set(1.0))
    X = jnp.zeros((flow.block_size,) * 2).at[0, 0].set(0.1)
    after, _ = term.complete(y, e, X, 1, jnp.bool_(True))
    return after, int(after.work.hvps - e.work.hvps)


def test_the_excess_is_that_of_all_tracked_eigenvectors():
    after, products = _completed(ADDED)
    true = np.linalg.eigvalsh(np.diag(VALUES) + ADDED)[::-1]
    # From the second as it was, 1.83, it would be 0.019.
    np.testing.assert_allclose(after.excess, true[0] - VALUES[0], rtol=1e-6)
    np.testing.assert_allclose(after.sharpness[:TRACKED], true[:TRACKED], rtol=1e-9)
    assert products == TRACKED
    # The next step has to count both as critical.
    assert after.coupled == 2


def test_what_is_not_coupled_is_not_looked_at():
    after, products = _completed(0 * ADDED)
    assert products == 1
    np.testing.assert_allclose(after.excess, 0, atol=1e-9)
    assert after.coupled == 1


def test_second_moments_where_the_step_size_changes():
    """X along an eigenvector, of P^-1 H and of length 1 in P, adds
    |H u|^2 X = kappa^2 |P u|^2 X = kappa^2 P X to the squared gradient, with P now."""
    optimizer = cf.ScalarRMSProp(1.0, 0.9, 0.0)
    weights = jnp.zeros(SIZE)
    hessian = jnp.asarray(VALUES)
    flat = cf.Objective(lambda w: 0.5 * w @ (hessian * w)).flatten(weights)[1]
    flow = cf.CentralFlow(eigen_tolerance=1e-10)
    term = flow.term(flat, optimizer, {}, jnp.zeros(0, int), jnp.asarray(1e-2))
    state = lambda nu: dataclasses.replace(
        optimizer.init(weights), nu=jnp.full((), nu), age=jnp.full((), 1e9)
    )
    zero = jnp.zeros(())
    e = term.expand_ahead(FlowState(weights, state(1.0), {}), None, None, zero, zero)
    assert e.critical == 1
    X = jnp.zeros((flow.block_size,) * 2).at[0, 0].set(0.1)
    after = FlowState(weights, state(1.44), {})
    _, at_end = term.complete(after, e, X, 1, jnp.bool_(True))
    added = jnp.sum(term.forcing(after, at_end, X).gradient_sq)
    kappa = optimizer.critical_sharpness
    np.testing.assert_allclose(added, kappa**2 * 1.2 * 0.1, rtol=1e-9)
