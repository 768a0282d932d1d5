"""Heavy ball, Nesterov, Adam and NAdam: updates, critical sharpness, flow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centralflow as cf

RATES = [0.02, optax.cosine_decay_schedule(0.02, 10)]
BETAS = [0.1, 0.5, 0.9, 0.99]


def _averaged(learning_rate, beta):
    return optax.chain(
        optax.ema(beta, debias=False), optax.scale_by_learning_rate(learning_rate)
    )


METHODS = {
    "heavy ball": (
        lambda rate: cf.HeavyBall(rate, 0.9),
        lambda rate: optax.sgd(rate, 0.9),
    ),
    "heavy ball, averaged": (
        lambda rate: cf.HeavyBall(rate, 0.9, averaged=True),
        lambda rate: _averaged(rate, 0.9),
    ),
    "Nesterov": (
        lambda rate: cf.Nesterov(rate, 0.9),
        lambda rate: optax.sgd(rate, 0.9, nesterov=True),
    ),
    "Adam": (
        lambda rate: cf.Adam(rate, 0.8, 0.95, 1e-3),
        lambda rate: optax.adam(rate, 0.8, 0.95, 1e-3),
    ),
    "NAdam": (
        lambda rate: cf.NAdam(rate, 0.8, 0.95, 1e-3),
        lambda rate: optax.nadam(rate, 0.8, 0.95, 1e-3),
    ),
}


@pytest.mark.parametrize("learning_rate", RATES)
@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_that_of_optax(method, learning_rate):
    objective = cf.Objective(lambda w: jnp.sum(jnp.cosh(w)) + w[0] * w[1])
    start = jnp.array([1.0, -2.0, 0.5])
    _, flat = objective.flatten(start)
    ours, theirs = (make(learning_rate) for make in METHODS[method])
    w = v = start
    state, their_state = ours.init(w), theirs.init(v)
    for _ in range(12):
        w, state = ours.update(w, state, flat.grad(w))
        updates, their_state = theirs.update(flat.grad(v), their_state, v)
        v = optax.apply_updates(v, updates)
    assert ours.updates(state) == 12
    # some ten roundings of float32 a step
    np.testing.assert_allclose(w, v, rtol=12 * 10 * 6e-8)


def test_without_bias_correction():
    g, w = jnp.array([0.5, -2.0]), jnp.zeros(2)
    for kind, mean in ((cf.Adam, 0.2 * g), (cf.NAdam, (0.8 * 0.2 + 0.2) * g)):
        optimizer = kind(0.1, 0.8, 0.95, 1e-3, bias_correction=False)
        new, _ = optimizer.update(w, optimizer.init(w), g)
        expected = -0.1 * mean / (jnp.sqrt(0.05 * g**2) + 1e-3)
        np.testing.assert_allclose(new, expected, rtol=1e-5)


def test_nesterov_averaged_is_nesterov_with_a_smaller_rate():
    objective = cf.Objective(lambda w: jnp.sum(jnp.cosh(w)))
    start = jnp.array([1.0, -2.0])
    one = cf.train(objective, start, cf.Nesterov(0.2, 0.9, averaged=True), 10)
    other = cf.train(objective, start, cf.Nesterov(0.02, 0.9), 10)
    np.testing.assert_allclose(one.model, other.model, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "make",
    [
        lambda beta: cf.HeavyBall(0.3, beta),
        lambda beta: cf.HeavyBall(0.3, beta, averaged=True),
        lambda beta: cf.Nesterov(0.3, beta),
        lambda beta: cf.Nesterov(0.3, beta, averaged=True),
        lambda beta: cf.Adam(0.3, beta, 0.999, bias_correction=False),
        lambda beta: cf.NAdam(0.3, beta, 0.999, bias_correction=False),
    ],
)
def test_the_critical_sharpness_is_where_the_update_map_leaves_the_unit_circle(
    make, beta
):
    """The linear map (w, m) -> (w', m') of one step on a quadratic whose curvature
    makes P^-1 H a little less, or more, than critical: the eigenvalues of the map
    itself, of its Jacobian, at a frozen P."""
    optimizer = make(beta)
    state = optimizer.update_state(optimizer.init(jnp.ones(1)), jnp.ones(1))
    if isinstance(optimizer, cf.Adam | cf.NAdam):
        # a second moment so large that a gradient changes nothing
        huge = jnp.full(1, 1e30)
        state = type(state)(state.m, type(state.second)(*_with_nu(state.second, huge)))
    P = jnp.sum(optimizer.preconditioner(state))

    def radius(sharpness):
        def step(z):
            w, s = z[:1], _with_m(state, z[1:])
            w, s = optimizer.update(w, s, sharpness * P * w)
            return jnp.concatenate([w, s.m])

        # m is of the size of the gradient, P w: scaled to that of w
        scale = jnp.array([1.0, P])
        J = jax.jacobian(lambda z: step(z * scale) / scale)(jnp.zeros(2))
        roots = np.linalg.eigvals(np.asarray(J))
        return roots[np.argmax(np.abs(roots))]

    critical = float(optimizer.critical_sharpness)
    for share in np.linspace(0.02, 0.999, 50):
        assert abs(radius(share * critical)) < 1
    assert abs(radius(1.001 * critical)) > 1
    # nu after one more update is beta2 times what it was
    at = 1 if not hasattr(state, "second") else np.sqrt(0.999)
    assert radius(at * critical) == pytest.approx(-1, abs=1e-9)


def _with_m(state, m):
    return dataclasses.replace(state, m=m)


def _with_nu(second, nu):
    return second.updates, nu, second.age
