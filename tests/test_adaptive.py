"""The flows of the adaptive optimizers against the optimizers, on digits, along runs
that spend most of their time at the edge."""

import jax
import numpy as np
import pytest

import centralflow as cf

from .problems import reference


def _run(optimizer, warm_start, steps):
    """The run, its central and its stable flow, from shortly before the edge."""
    _, _, objective, model = reference("rmsprop_mlp_digits")
    warm = cf.train(objective, model, optimizer, warm_start)
    problem = (objective, warm.model, optimizer, steps)
    options = dict(optimizer_state=warm.optimizer_state, coordinates=range(0, 8970, 30))
    return (
        cf.train(*problem, **options),
        cf.predict(*problem, **options, flow=cf.CentralFlow(substeps=2)),
        cf.predict(*problem, **options, flow=cf.StableFlow()),
    )


def _mean(series):
    """Past the first 100 steps, in which the oscillations set in."""
    return np.mean(np.asarray(series, float)[100:], axis=0)


def test_rmsprop():
    optimizer = cf.RMSProp(2e-4, 0.99, 1e-7, bias_correction=True)
    run, central, stable = _run(optimizer, 110, 400)
    assert np.mean(central.sharpness[:, 0] > 1.99) > 0.9
    report, naive = cf.compare(run, central), cf.compare(run, stable)
    # Measured: 0.10 %, and 1.1 % against 16 %. Asked for: 1 %, and a fifth.
    assert report.loss_error < 0.003
    assert report.weight_distance < naive.weight_distance / 8
    # Averages over slow cycles; measured are -2.0 % and -3.7 %.
    norm = _mean(run.grad_norm_sq) / _mean(central.mean_grad_norm_sq)
    trace = _mean(run.trace_covariance) / _mean(central.trace_covariance)
    assert abs(norm - 1) < 0.08
    assert abs(trace - 1) < 0.08
    # Each squared gradient by itself, which span four decades and are mostly
    # oscillation: the stable flow's are 8 times smaller. Measured: 2.4 % and 11 %.
    observed, predicted = _mean(run.gradient_sq), _mean(central.gradient_sq)
    assert np.max(observed) > 1e4 * np.min(observed)
    assert np.median(observed / _mean(stable.gradient_sq)) > 5
    errors = np.abs(np.log(observed / predicted))
    assert np.median(errors) < 0.06
    assert np.quantile(errors, 0.95) < 0.2
    steps = _mean(run.step_sizes) / _mean(central.step_sizes)
    assert np.quantile(np.abs(steps - 1), 0.95) < 0.06


def test_scalar_rmsprop():
    optimizer = cf.ScalarRMSProp(0.02, 0.99, 1e-7, bias_correction=True)
    run, central, stable = _run(optimizer, 100, 500)
    assert np.mean(central.sharpness[:, 0] > 1.99) > 0.85
    report, naive = cf.compare(run, central), cf.compare(run, stable)
    # Measured: 1.1 %, and 0.93 % against 28.7 %. Asked for: 2 %, and a fifth.
    assert report.loss_error < 0.02
    assert report.weight_distance < naive.weight_distance / 10
    # With one or two critical eigenvalues the cycles are longer and stronger: measured
    # are +13 % and +10 %.
    norm = _mean(run.grad_norm_sq) / _mean(central.mean_grad_norm_sq)
    trace = _mean(run.trace_covariance) / _mean(central.trace_covariance)
    assert abs(norm - 1) < 0.3
    assert abs(trace - 1) < 0.3
    # All parameters have one step size; the stable flow's is 1.7 times as large.
    np.testing.assert_array_equal(np.ptp(run.step_sizes, axis=1), 0)
    assert abs(_mean(run.step_sizes) / _mean(central.step_sizes) - 1)[0] < 0.03


@pytest.mark.slow
def test_the_stationary_preconditioner_is_the_real_one_late_in_a_run():
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(1000))
    model = cf.models.MLP(64, 10, key=jax.random.key(0))
    optimizer = cf.RMSProp(2e-4, 0.99, 1e-7, bias_correction=True)
    run = cf.train(objective, model, optimizer, 1200)
    w, flat = objective.flatten(run.model)
    state = optimizer.update_state(run.optimizer_state, flat.grad(w))
    real = np.asarray(optimizer.preconditioner(state))
    found = cf.stationary_preconditioner(
        objective, run.model, optimizer, run.optimizer_state
    )
    P, g = np.asarray(found.preconditioner), np.abs(flat.grad(w))
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert found.converged
    # measured: 0.994 (0.88 for |g|), and 0.97
    assert cosine(P, real) > 0.98 > 0.93 > cosine(g, real)
    assert abs(np.linalg.norm(real) / np.linalg.norm(P) - 1) < 0.1
