"""The time-average and the errors that `compare` reports."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import centralflow as cf

exact = dict(rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 60), st.integers(1, 80), st.floats(-2, 2), st.floats(-3, 3))
def test_time_average_removes_period_two_and_keeps_lines(T, window, slope, amplitude):
    t = np.arange(T)
    line = 1 + slope * t
    wave = amplitude * (-1.0) ** t
    average = cf.time_average(line + wave, window)
    if window == 1:
        np.testing.assert_allclose(average, line + wave, **exact)
    else:
        np.testing.assert_allclose(average[1:-1], line[1:-1], atol=1e-12 * T * 10)
        np.testing.assert_allclose(average[[0, -1]], (line + wave)[[0, -1]], **exact)


def test_time_average_is_a_hann_window():
    impulse = np.zeros(41)
    impulse[20] = 1
    j = np.arange(-20, 21)
    hann = np.where(np.abs(j) <= 4, (1 + np.cos(np.pi * j / 5)) / 10, 0)
    np.testing.assert_allclose(cf.time_average(impulse, 8), hann, **exact)
    np.testing.assert_allclose(cf.time_average(impulse, 9), hann, **exact)


def _trajectory(times, loss, weights=((0.0, 0.0), (3.0, 4.0)), **changes):
    times, loss = jnp.asarray(times, float), jnp.asarray(loss, float)
    nothing = jnp.full((times.size, 2), jnp.nan)
    trajectory = cf.Trajectory(
        times=times,
        loss=loss,
        mean_loss=loss,
        grad_norm_sq=loss,
        mean_grad_norm_sq=loss,
        sharpness=nothing,
        oscillation=nothing,
        metrics={},
        weight_times=jnp.array([times[0], times[-1]]),
        weights=jnp.asarray(weights),
        model=None,
        optimizer_state=None,
        critical_sharpness=2.0,
        result=cf.RESULTS.successful,
        stats=dict(gradients=10, hvps=3, third_derivatives=1, seconds=2.0),
    )
    return dataclasses.replace(trajectory, **changes)


def test_known_errors():
    t = np.arange(101)
    loss = np.exp(-t / 50)
    run = _trajectory(t, loss * (1 + 0.3 * (-1.0) ** t))
    # 2 % too high everywhere, reported at every tenth step only: on a logarithmic
    # scale the exponential is a straight line.
    prediction = _trajectory(t[::10], 1.02 * loss[::10], weights=((0, 0), (3.0, 3.5)))
    report = cf.compare(run, prediction, window=6)
    # the factor exp(-t/50) turns the mean of the oscillation by 0.3 (1/50)^2
    assert report.loss_error == pytest.approx(0.02, abs=2e-4)
    assert report.max_loss_error == pytest.approx(0.02, abs=3e-4)
    assert report.grad_norm_error == pytest.approx(0.02, abs=2e-4)
    assert report.weight_distance == pytest.approx(0.1)
    assert np.isnan(report.sharpness_error)
    assert np.isnan(report.oscillation_error)
    assert report.steps == 100
    assert report.work_ratio == (10 + 2 * 3 + 4 * 1) / 10
    for row in ("loss error", "not measured", "100 steps, window 6"):
        assert row in str(report)


def test_a_curved_loss_is_no_error():
    t = np.arange(201)
    loss = np.exp(-t / 10)  # curved on the scale of the window
    report = cf.compare(_trajectory(t, loss), _trajectory(t, loss), window=40)
    assert report.max_loss_error < 1e-12  # rounding of exp(log)


def test_sharpness_and_oscillation():
    t = np.arange(101)
    measured = t % 10 == 0
    sharpness = np.where(measured[:, None], [[2.0, 1.5]], np.nan)
    oscillation = np.where((measured & (t > 0))[:, None], [[0.3, 0.1]], np.nan)
    run = _trajectory(t, 1 + 0 * t)
    run = dataclasses.replace(
        run, sharpness=jnp.asarray(sharpness), oscillation=jnp.asarray(oscillation)
    )
    # linear in time: the mean over the ten steps up to a measurement is 4.5 behind
    predicted = 0.44 * (t / 100)
    prediction = dataclasses.replace(
        run,
        sharpness=jnp.full((101, 3), 2.02),
        oscillation=jnp.asarray(predicted)[:, None] * jnp.array([1.0, 0, 0]),
    )
    report = cf.compare(run, prediction)
    assert report.sharpness_error == pytest.approx(0.01, rel=1e-5)
    ends = np.arange(10, 101, 10)
    errors = np.abs(0.44 * (ends - 4.5) / 100 - 0.4)
    assert report.oscillation_error == pytest.approx(np.mean(errors) / 0.4, rel=1e-5)


def test_only_common_steps_count():
    t = np.arange(101)
    run, prediction = _trajectory(t, 1 + 0.0 * t), _trajectory(t[:50], 1 + 0.0 * t[:50])
    report = cf.compare(run, prediction)
    assert report.steps == 49
    assert np.isnan(report.weight_distance)  # the last weights are of other times


@pytest.mark.usefixtures("untyped")
def test_bad_arguments():
    t = np.arange(11)
    run = _trajectory(t, 1 + 0.0 * t)
    other = eqx.tree_at(lambda x: x.weights, run, jnp.zeros((2, 5)))
    with pytest.raises(ValueError, match="`run` has 2 parameters and `prediction` 5"):
        cf.compare(run, other)
    with pytest.raises(ValueError, match="`prediction`"):
        cf.compare(run, "prediction")
    with pytest.raises(ValueError, match="`window`"):
        cf.compare(run, run, window=0)
    with pytest.raises(ValueError, match="in common"):
        cf.compare(run, _trajectory(t + 9, 1 + 0.0 * t))


def test_two_predictions():
    t = np.arange(11)
    variances = jnp.linspace(1, 2, 11)[:, None] * jnp.array([1, 0.5])
    one = _trajectory(t, 1.0 + t, oscillation=variances)
    two = _trajectory(t, 1.0 + t, oscillation=1.03 * variances)
    assert cf.compare(one, one).oscillation_error == 0
    assert cf.compare(one, two).oscillation_error == pytest.approx(0.03, rel=1e-5)


def test_a_gradient_that_vanishes_for_a_while():
    """The error is that next to the mean, which is 1/2 but for the smooth change."""
    t = np.arange(101)
    gradient = jnp.where(t < 50, 1.0, 1e-9)
    run = _trajectory(t, 1.0 + t, grad_norm_sq=gradient, mean_grad_norm_sq=gradient)
    flow = dataclasses.replace(run, mean_grad_norm_sq=gradient + 1e-2)
    report = cf.compare(run, flow, window=10)
    assert report.grad_norm_error == pytest.approx(0.02, rel=0.03)
