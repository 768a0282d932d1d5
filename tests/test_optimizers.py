"""Discrete updates, schedules, and the critical sharpness."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import centralflow as cf


def _run(optimizer, objective, w, steps):
    w, flat = objective.flatten(w)
    state = optimizer.init(w)
    for _ in range(steps):
        w, state = optimizer.update(w, state, flat.grad(w))
    return w, state


@pytest.mark.parametrize(
    "learning_rate",
    [0.1, optax.cosine_decay_schedule(0.1, 10), lambda step: 0.1 / (1 + step)],
)
def test_gradient_descent_is_optax_sgd(learning_rate):
    objective = cf.Objective(lambda w: jnp.sum(jnp.cosh(w)) + w[0] * w[1])
    start = jnp.array([1.0, -2.0, 0.5])
    w, state = _run(cf.GradientDescent(learning_rate), objective, start, 7)
    assert state == 7
    sgd, v = optax.sgd(learning_rate), start
    opt_state = sgd.init(v)
    for _ in range(7):
        g = objective.flatten(v)[1].grad(v)
        updates, opt_state = sgd.update(g, opt_state)
        v = optax.apply_updates(v, updates)
    # g / (1 / eta) against eta g: two roundings of float32 a step
    np.testing.assert_allclose(w, v, rtol=7 * 4 * 6e-8)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("learning_rate", [0.1, optax.cosine_decay_schedule(0.1, 10)])
def test_rmsprop_is_optax_rmsprop(learning_rate, eps, bias_correction):
    objective = cf.Objective(lambda w: jnp.sum(jnp.cosh(w)) + w[0] * w[1])
    start = jnp.array([1.0, -2.0, 0.5])
    optimizer = cf.RMSProp(learning_rate, 0.9, eps, bias_correction)
    w, _ = _run(optimizer, objective, start, 7)
    theirs = optax.rmsprop(
        learning_rate, 0.9, eps, eps_in_sqrt=False, bias_correction=bias_correction
    )
    v, state = start, theirs.init(start)
    for _ in range(7):
        updates, state = theirs.update(objective.flatten(v)[1].grad(v), state)
        v = optax.apply_updates(v, updates)
    # some ten roundings of float32 a step
    np.testing.assert_allclose(w, v, rtol=7 * 10 * 6e-8)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.99999])
def test_a_beta2_near_one_in_float32(beta2, bias_correction):
    """1 - beta2 is not what float32 makes of beta2, subtracted from 1."""
    gradients = np.random.default_rng(0).normal(size=(20, 4))
    optimizer = cf.RMSProp(1.0, beta2, 1e-8, bias_correction)
    state, nu = optimizer.init(jnp.zeros(4)), 0.0
    for g in gradients:
        state = optimizer.update_state(state, jnp.asarray(g, jnp.float32))
        nu = beta2 * nu + (1 - beta2) * g**2
    nu = nu / (1 - beta2**20) if bias_correction else nu
    P = optimizer.preconditioner(state)
    # twenty times two roundings, and the root halves them
    np.testing.assert_allclose(P, np.sqrt(nu) + 1e-8, rtol=20 * 6e-8)


def test_scalar_rmsprop_is_rmsprop_of_the_norm():
    """In one dimension the two are the same, and in more nu takes in |g|^2."""
    arguments = (0.1, 0.9, 0.01, True)
    one = cf.Objective(lambda w: jnp.sum(jnp.cosh(w)))
    w, _ = _run(cf.ScalarRMSProp(*arguments), one, jnp.array([1.5]), 5)
    v, _ = _run(cf.RMSProp(*arguments), one, jnp.array([1.5]), 5)
    np.testing.assert_allclose(w, v, rtol=1e-6)
    optimizer = cf.ScalarRMSProp(*arguments)
    state = optimizer.init(jnp.zeros(2))
    state = optimizer.update_state(state, jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(state.nu, 0.1 * 25, rtol=1e-6)
    np.testing.assert_allclose(  # bias-corrected to |g| = 5
        optimizer.preconditioner(state), (5 + 0.01) / 0.1, rtol=1e-5
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [cf.RMSProp, cf.ScalarRMSProp])
def test_the_flow_of_the_state_follows_its_updates(kind):
    """At constant gradient nu_hat = g * g at all times, and nu itself follows the
    updates to the accuracy of a backward Euler step, (1 - beta2)^2/2 each."""
    g, beta2 = jnp.array([0.5, 2.0]), 0.99
    optimizer = kind(0.1, beta2, bias_correction=True)
    state = optimizer.update_state(optimizer.init(g), g)
    discrete, flow = state, state
    for _ in range(100):
        discrete = optimizer.update_state(discrete, g)
        for _ in range(10):
            rate = optimizer.state_rate(flow, g, g * g)
            flow = jax.tree.map(lambda s, r: s + 0.1 * r, flow, rate)
    assert flow.updates == pytest.approx(101)
    np.testing.assert_allclose(flow.nu, discrete.nu, rtol=100 * 0.01**2)
    # 1/beta2 a step: the weight beta2^age of the initial zero decays as nu - g * g does
    assert flow.age == pytest.approx(1 + 100 / beta2)
    exact = optimizer.preconditioner(discrete)
    np.testing.assert_allclose(optimizer.preconditioner(flow), exact, rtol=5e-3)


@pytest.mark.parametrize(
    "optimizer",
    [
        cf.GradientDescent(0.3),
        # eps is far above the gradients, so the preconditioner is constant
        cf.RMSProp(0.3, 0.9, eps=1.0),
        cf.ScalarRMSProp(0.3, 0.9, eps=1.0),
    ],
)
@pytest.mark.parametrize(("factor", "stable"), [(0.99, True), (1.01, False)])
def test_critical_sharpness_on_a_quadratic(optimizer, factor, stable):
    w = jnp.array([1e-8])
    P = optimizer.preconditioner(optimizer.update_state(optimizer.init(w), w))
    curvature = factor * optimizer.critical_sharpness * P
    objective = cf.Objective(lambda w: jnp.sum(0.5 * curvature * w**2))
    end, _ = _run(optimizer, objective, w, 500)
    assert bool(jnp.abs(end[0]) < w[0]) == stable


def test_schedule_counts_steps_from_zero():
    seen = cf.GradientDescent(lambda step: 0.1 + step)
    state = seen.init(jnp.zeros(1))
    for step in range(3):
        state = seen.update_state(state, jnp.zeros(1))
        np.testing.assert_allclose(
            1 / seen.preconditioner(state), 0.1 + step, rtol=1e-6
        )


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("value", [0, -0.1, np.nan, np.inf, "fast", [0.1, 0.2], None])
def test_bad_learning_rate(value):
    with pytest.raises(ValueError, match="learning_rate"):
        cf.GradientDescent(value)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", [cf.RMSProp, cf.ScalarRMSProp])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(beta2=0.0), "beta2"),
        (dict(beta2=1.0), "beta2"),
        (dict(beta2=np.nan), "beta2"),
        (dict(eps=-1e-8), "eps"),
        (dict(eps=np.inf), "eps"),
        (dict(learning_rate=0.0), "learning_rate"),
        (dict(learning_rate=1j), "learning_rate"),
        (dict(beta2=None), "beta2"),
        (dict(beta2=[0.9]), "beta2"),
        (dict(eps="small"), "eps"),
        (dict(eps=1j), "eps"),
        (dict(bias_correction="no"), "bias_correction"),
    ],
)
def test_bad_rmsprop(kind, change, named):
    with pytest.raises(ValueError, match=named):
        kind(**(dict(learning_rate=0.1, beta2=0.9) | change))
