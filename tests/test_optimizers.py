"""Discrete updates, schedules, and the critical sharpness."""

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


@pytest.mark.parametrize("optimizer", [cf.GradientDescent(0.3)])
@pytest.mark.parametrize(("factor", "stable"), [(0.99, True), (1.01, False)])
def test_critical_sharpness_on_a_quadratic(optimizer, factor, stable):
    w = jnp.array([1.0])
    P = optimizer.preconditioner(optimizer.update_state(optimizer.init(w), w))
    curvature = factor * optimizer.critical_sharpness * P
    objective = cf.Objective(lambda w: 0.5 * curvature * jnp.sum(w**2))
    end, _ = _run(optimizer, objective, w, 500)
    assert bool(jnp.abs(end[0]) < 1) == stable


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
