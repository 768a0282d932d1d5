"""Long steps at the edge: what is reported between their ends, on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .problems import reference


def _three_critical():
    """Steps of 60 to 160 times the optimizer's, two or three eigenvalues held."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(1000))
    model = cf.models.MLP(64, 10, key=jax.random.key(0))
    optimizer = cf.GradientDescent(0.7)
    model = cf.train(objective, model, optimizer, 86).model
    return objective, model, optimizer, 900, np.arange(200.0, 900, 25)


def _onset():
    """An oscillation begins at 520 to 530, within a step of 170."""
    _, _, objective, model = reference("gd_mlp_digits")
    optimizer = cf.GradientDescent(0.18)
    return objective, model, optimizer, 1000, np.arange(430.0, 800, 10)


@pytest.mark.parametrize("problem", [_three_critical, _onset])
def test_at_the_edge_between_the_ends_of_steps(problem):
    """The sharpness at the weights, and their loss, are those that are reported."""
    objective, model, optimizer, steps, times = problem()
    flow = cf.predict(objective, model, optimizer, steps, weight_times=times)
    assert flow.stats["accepted_steps"] < 50
    flat = objective.flatten(model)[1]
    at = np.searchsorted(flow.times, times)
    weights = jnp.asarray(flow.weights)[1:-1]
    sharpness = lambda w: cf.sharpness(objective, flat.model(w), optimizer, None).values
    true = np.array([sharpness(w)[0] for w in weights])
    held = np.asarray(flow.oscillation)[at, 0] > 0
    assert np.sum(held) > 20
    # What is asked for. Measured: 0.62 and 0.14 %; with the equation's slopes at the
    # ends of steps, and without a turn at the onset, 2.7 and 1.6 %.
    np.testing.assert_allclose(true[held] / 2, 1, atol=0.01)
    reported = np.asarray(flow.sharpness)[at, 0]
    np.testing.assert_allclose(reported / 2, true / 2, atol=0.01)
    # Measured: 0.22 and 0.05 %; with the equation's slopes 2.9 and 0.07 %.
    loss = jax.lax.map(flat.loss, weights)
    np.testing.assert_allclose(np.asarray(flow.loss)[at], loss, rtol=3e-3)
