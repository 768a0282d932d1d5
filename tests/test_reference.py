"""The digits problem: against a published run of the flow, and the real optimizer."""

import jax
import numpy as np
import pytest

import centralflow as cf
from centralflow.compare import variances

from .problems import reference


@pytest.fixture(scope="module")
def gradient_descent():
    arrays, config, objective, model = reference("gd_mlp_digits")
    optimizer = cf.GradientDescent(config["learning_rate"])
    flow = cf.CentralFlow(substeps=config["flow_substeps"])
    prediction = cf.predict(objective, model, optimizer, config["steps"], flow=flow)
    run = cf.train(
        objective, model, optimizer, config["steps"],
        sharpness_every=10, sharpness_count=3,
    )  # fmt: skip
    return arrays, prediction, run


def _errors(ours, published):
    return np.abs(np.asarray(ours)[: len(published)] / published - 1)


def test_the_optimizer_is_the_published_one(gradient_descent):
    arrays, _, run = gradient_descent
    # float32 rounding, which the instability at the edge amplifies later on
    assert np.max(_errors(run.loss, arrays["discrete_loss"])[:50]) < 1e-5


def test_loss(gradient_descent):
    arrays, prediction, _ = gradient_descent
    errors = _errors(prediction.loss, arrays["central_loss"])
    # The same scheme with another eigensolver: what is asked for is 1e-2 and 2e-3, and
    # measured are 1e-5 and 3e-6.
    assert np.max(errors) < 4e-5
    assert np.mean(errors) < 1e-5


def test_mean_loss(gradient_descent):
    arrays, prediction, _ = gradient_descent
    errors = _errors(prediction.mean_loss, arrays["central_mean_loss"])
    # Asked for are 1.5e-2 and 3e-3; measured are 2.6e-4, at a step at which an
    # eigenvalue becomes critical and X jumps, and 2e-5.
    assert np.max(errors) < 1e-3
    assert np.mean(errors) < 1e-4


def test_sharpness(gradient_descent):
    arrays, prediction, _ = gradient_descent
    published = arrays["central_sharpness"][:, 0]
    errors = np.abs(prediction.sharpness[: len(published), 0] - published)
    assert np.max(errors) < 3e-4  # asked for is 1e-2, measured 7.5e-5


def test_oscillation(gradient_descent):
    arrays, prediction, _ = gradient_descent
    published = np.nansum(arrays["central_variances"], axis=1)
    ours = np.sum(prediction.oscillation, axis=1)[: len(published)]
    # Measured: 2.2e-3 of the largest at worst, 1e-3 on average where it is large.
    assert np.max(np.abs(ours - published)) < 0.01 * np.max(published)
    large = published > 0.05 * np.max(published)
    assert np.sum(large) > 100
    assert np.mean(np.abs(ours[large] / published[large] - 1)) < 5e-3


def test_mean_grad_norm(gradient_descent):
    arrays, prediction, _ = gradient_descent
    errors = _errors(prediction.mean_grad_norm_sq, arrays["central_mean_grad_norm_sq"])
    assert np.mean(errors) < 6e-3  # measured 2.7e-3


def test_complementarity(gradient_descent):
    _, prediction, _ = gradient_descent
    top = np.asarray(prediction.sharpness[:, 0])
    X = np.asarray(prediction.oscillation)
    # Linearized over an optimizer step: second order in its length. The published run
    # reaches 2.00152, ours 2.00145, where two eigenvalues meet.
    assert np.max(top) < 2 + 2e-3
    assert np.min(X) >= 0
    assert np.max(X[:, 0] * np.abs(2 - top)) < 2e-3 * np.max(X)


def test_against_the_optimizer(gradient_descent):
    """At this learning rate the sharpness surges past the edge before an oscillation
    has grown, so the optimizer overshoots (to 2.7); the flow holds it at 2."""
    _, prediction, run = gradient_descent
    report = cf.compare(run, prediction)
    # measured: 1.6 %, 4.7 % and 4.4 %
    assert report.loss_error < 0.02
    assert report.sharpness_error < 0.06
    assert report.weight_distance < 0.06


@pytest.mark.slow
def test_averages_of_a_run_at_the_edge():
    """E[L], E|g|^2 and the oscillation variances where two to three eigenvalues stay
    critical. A run goes around its averages in slow cycles: they are compared over the
    whole stretch, over which ten or so cycles cancel."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(1000))
    model = cf.models.MLP(64, 10, key=jax.random.key(0))
    optimizer = cf.GradientDescent(0.7)
    warm = cf.train(objective, model, optimizer, 86)
    run = cf.train(
        objective, warm.model, optimizer, 500, sharpness_every=10, sharpness_count=6
    )
    prediction = cf.predict(
        objective, warm.model, optimizer, 500, flow=cf.CentralFlow(substeps=2)
    )
    assert np.mean(prediction.sharpness[:, 1] > 1.99) > 0.5
    mean = lambda series: float(np.mean(np.asarray(series)[100:]))
    loss, flow_loss = mean(run.loss), mean(prediction.mean_loss)
    norm, flow_norm = mean(run.grad_norm_sq), mean(prediction.mean_grad_norm_sq)
    observed, predicted = variances(run, prediction)
    variance = np.sum(observed[10:]) / np.sum(predicted[10:])
    # Measured: 1.001, 1.014 and 1.018; and 1.004, 1.055 and 1.060 from another
    # start. How the cycles fall depends on rounding.
    assert abs(loss / flow_loss - 1) < 0.01
    # the oscillation is nearly all of E[L] - L and of E|g|^2
    assert mean(prediction.grad_norm_sq) < 0.1 * flow_norm
    assert abs(norm / flow_norm - 1) < 0.12
    assert abs(variance - 1) < 0.12


@pytest.fixture(scope="module")
def rmsprop():
    arrays, config, objective, model = reference("rmsprop_mlp_digits")
    names = ("learning_rate", "beta2", "eps", "bias_correction")
    optimizer = cf.RMSProp(*(config[name] for name in names))
    warm = cf.train(objective, model, optimizer, config["warm_start"])
    problem = (objective, warm.model, optimizer, config["steps"] - 1)
    start = dict(optimizer_state=warm.optimizer_state)
    flow = cf.CentralFlow(substeps=config["flow_substeps"])
    prediction = cf.predict(*problem, **start, flow=flow)
    return arrays, prediction, cf.train(*problem, **start)


def test_rmsprop_optimizer(rmsprop):
    arrays, _, run = rmsprop
    assert np.max(_errors(run.loss, arrays["discrete_loss"])[:50]) < 1e-5


def test_rmsprop_flow(rmsprop):
    arrays, prediction, _ = rmsprop
    # Asked for are 1e-2 everywhere and 3e-3 on average; measured are 1.4e-6 and 2.6e-7
    # for the loss, 3.5e-5 and 3e-6 for the mean loss.
    for ours, published, largest, mean in (
        (prediction.loss, arrays["central_loss"], 1e-5, 2e-6),
        (prediction.mean_loss, arrays["central_mean_loss"], 2e-4, 2e-5),
    ):
        errors = _errors(ours, published)
        assert np.max(errors) < largest
        assert np.mean(errors) < mean
    published = arrays["central_sharpness"][:, 0]
    errors = np.abs(prediction.sharpness[: len(published), 0] - published)
    assert np.max(errors) < 3e-4  # asked for is 2e-2, measured 4.7e-5
    published = np.nansum(arrays["central_variances"], axis=1)
    ours = np.sum(prediction.oscillation, axis=1)[: len(published)]
    shown = published > 1e-5
    assert np.sum(shown) > 150
    errors = np.abs(ours[shown] / published[shown] - 1)
    # asked for is 5e-2 everywhere; measured are 1.5e-2, and 1.9e-3 on average
    assert np.max(errors) < 0.03
    assert np.mean(errors) < 5e-3
