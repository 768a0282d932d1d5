"""Midpoints, eigenvalues measured at them, and the observables of runs and flows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .problems import tiny_loss, tiny_network


def test_midpoints_of_a_line_and_an_oscillation():
    t = np.arange(7.0)[:, None]
    line, wave = np.hstack([t, 2 - 3 * t]), (-1.0) ** t * [0.5, -2.0]
    np.testing.assert_allclose(cf.midpoints(line + wave), line[1:-1], atol=1e-6)
    square = np.asarray(cf.midpoints(t**2))  # (t^2 + ((t+1)^2 + (t-1)^2) / 2) / 2
    np.testing.assert_allclose(square, t[1:-1] ** 2 + 0.5, atol=1e-6)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("weights", [np.zeros((2, 3)), np.zeros(5)])
def test_bad_midpoints(weights):
    with pytest.raises(ValueError, match="`weights`"):
        cf.midpoints(weights)


def _problem(dtype=jnp.float64):
    model, data = tiny_network(dtype)
    return cf.Objective(tiny_loss, data), model


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "optimizer", [cf.GradientDescent(0.3), cf.RMSProp(0.01, 0.9, eps=0.1)]
)
def test_sharpness_is_that_of_dense_matrices(optimizer):
    objective, model = _problem()
    w, flat = objective.flatten(model)
    state = optimizer.update_state(optimizer.init(w), flat.grad(w))
    found = cf.sharpness(
        objective, model, optimizer, state, count=4, tolerance=1e-7
    )  # fmt: skip
    P = np.broadcast_to(optimizer.preconditioner(state), w.shape)
    H = np.asarray(jax.hessian(flat.loss)(w))
    exact = np.linalg.eigvalsh(H / np.sqrt(np.outer(P, P)))[::-1]
    assert found.converged
    # of second order in the residual of 1e-7
    np.testing.assert_allclose(found.values, exact[:4], rtol=1e-10)
    U = np.asarray(found.vectors)
    np.testing.assert_allclose((U * P) @ U.T, np.eye(4), atol=1e-10)
    np.testing.assert_allclose(
        H @ U.T, (P * U).T * found.values, atol=1e-6 * np.max(np.abs(H))
    )


@pytest.mark.usefixtures("x64")
def test_midpoints_and_sharpness_are_what_train_measures():
    objective, model = _problem()
    optimizer, steps = cf.GradientDescent(0.2), 12
    run = cf.train(
        objective, model, optimizer, steps, weight_times=range(steps + 1),
        sharpness_every=4, sharpness_count=2,
    )  # fmt: skip
    _, flat = objective.flatten(model)
    middle = cf.midpoints(run.weights)
    for t in (4, 8):
        there, state = flat.model(middle[t - 1]), jnp.asarray(t + 1.0)
        found = cf.sharpness(objective, there, optimizer, state, count=2)
        # train's residuals are 1e-2
        np.testing.assert_allclose(found.values, run.sharpness[t], rtol=1e-4)
    apart = np.sum((run.weights[1:-1] - middle) ** 2, axis=1)
    np.testing.assert_allclose(run.trace_covariance[1:-1], apart, rtol=1e-9)
    assert np.isnan(run.trace_covariance[0])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(count=0), "`count`"),
        (dict(count=1000), "`count` is 1000"),
        (dict(tolerance=0.0), "`tolerance`"),
        (dict(optimizer_state=jnp.zeros(3)), "`optimizer_state`"),
    ],
)
def test_bad_sharpness(change, message):
    objective, model = _problem(jnp.float32)
    arguments = dict(optimizer_state=jnp.asarray(1.0)) | change
    with pytest.raises(ValueError, match=message):
        cf.sharpness(objective, model, cf.GradientDescent(0.1), **arguments)


def _at_the_edge():
    """L(x, y) = sum_i (y_i x_i^2/2 - b_i y_i) with y_i = 2/eta: Sigma_ii = 2 b_i."""
    b = jnp.array([0.02, 0.03])
    objective = cf.Objective(lambda w: jnp.sum(w["y"] * w["x"] ** 2 / 2 - b * w["y"]))
    return objective, dict(x=jnp.zeros(2), y=jnp.full(2, 2 / 0.5)), b


@pytest.mark.usefixtures("x64")
def test_predicted_second_moments_in_closed_form():
    objective, model, b = _at_the_edge()
    flow = cf.predict(
        objective, model, cf.GradientDescent(0.5), 5, coordinates=[3, 0, 1],
        flow=cf.CentralFlow(substeps=1),
    )  # fmt: skip
    # E[g * g] is b^2 along y and (2/eta)^2 Sigma along x
    expected = np.array([b[1] ** 2, 16 * 2 * b[0], 16 * 2 * b[1]])
    np.testing.assert_allclose(flow.gradient_sq, np.tile(expected, (6, 1)), rtol=1e-9)
    np.testing.assert_allclose(flow.step_sizes, 0.5, rtol=1e-12)
    np.testing.assert_allclose(flow.trace_covariance, 2 * np.sum(b), rtol=1e-9)
    np.testing.assert_array_equal(flow.coordinates, [3, 0, 1])


@pytest.mark.parametrize("flow", [cf.CentralFlow(2), cf.StableFlow()])
@pytest.mark.parametrize("kind", [cf.RMSProp, cf.ScalarRMSProp])
@pytest.mark.usefixtures("x64")
def test_second_moments_add_up(kind, flow):
    """Over all coordinates E[g * g] adds up to E|g|^2, and 1/P is that of the state."""
    objective, model = _problem()
    optimizer = kind(0.02, 0.9, eps=1e-3)
    w, _ = objective.flatten(model)
    everywhere = dict(coordinates=range(w.size))
    warm = cf.train(objective, model, optimizer, 20, **everywhere)
    flow = cf.predict(
        objective, warm.model, optimizer, 30, optimizer_state=warm.optimizer_state,
        flow=flow, **everywhere,
    )  # fmt: skip
    for series in (warm, flow):
        total = np.sum(series.gradient_sq, axis=1)
        np.testing.assert_allclose(total, series.mean_grad_norm_sq, rtol=1e-9)
    end = flow.solver_state.y
    P = np.broadcast_to(optimizer.preconditioner(end.optimizer_state), w.shape)
    np.testing.assert_allclose(flow.step_sizes[-1], 1 / P, rtol=1e-9)
    assert warm.gradient_sq.shape == (21, w.size)


def test_nothing_is_recorded_by_default():
    objective, model, _ = _at_the_edge()
    run = cf.train(objective, model, cf.GradientDescent(0.4), 4)
    flow = cf.predict(objective, model, cf.GradientDescent(0.4), 4)
    for series in (run, flow):
        assert series.gradient_sq.shape == series.step_sizes.shape == (5, 0)
        assert series.trace_covariance.shape == (5,)
    report = cf.compare(run, flow)
    assert np.isnan(report.gradient_sq_error)
    assert np.isnan(report.step_size_error)


def test_comparison_of_observables():
    """With a prediction that is a known factor off."""
    objective, model, _ = _at_the_edge()
    run = cf.train(objective, model, cf.GradientDescent(0.4), 30, coordinates=[2, 3])
    run = dataclasses.replace(run, trace_covariance=run.times.at[0].set(jnp.nan))
    off = dataclasses.replace(
        run,
        gradient_sq=1.1 * run.gradient_sq,
        step_sizes=0.9 * run.step_sizes,
        trace_covariance=1.2 * run.times,
    )
    report = cf.compare(run, off)
    assert report.gradient_sq_error == pytest.approx(0.1, rel=1e-4)
    assert report.step_size_error == pytest.approx(0.1, rel=1e-4)
    assert report.trace_error == pytest.approx(0.2, rel=1e-4)
    assert "step sizes" in str(report)
    other = dataclasses.replace(run, coordinates=run.coordinates - 1)
    with pytest.raises(ValueError, match="different `coordinates`"):
        cf.compare(run, other)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("fn", [cf.train, cf.predict])
@pytest.mark.parametrize("bad", [[4], [-1], [0.5], "x", [[1]], 3, [True, False]])
def test_bad_coordinates(fn, bad):
    objective, model, _ = _at_the_edge()
    with pytest.raises(ValueError, match="`coordinates`"):
        fn(objective, model, cf.GradientDescent(0.4), 4, coordinates=bad)


@pytest.mark.parametrize("fn", [cf.train, cf.predict])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_a_dead_parameter_needs_eps(fn, bias_correction):
    """With nu = 0 and eps = 0 the step is 0/0: Optax's RMSProp returns NaN."""
    objective = cf.Objective(lambda w: jnp.sum(w[:2] ** 2) / 8)
    model = jnp.ones(3)
    optimizer = cf.RMSProp(0.1, 0.9, bias_correction=bias_correction)
    with pytest.raises(ValueError, match=r"zero at 1 of 3 .* index 2.*`eps`"):
        fn(objective, model, optimizer, 3)
    safe = cf.RMSProp(0.01, 0.9, eps=1e-8, bias_correction=bias_correction)
    assert fn(objective, model, safe, 3).model[2] == 1
    # with one moment for all, none is dead alone
    fn(objective, model, cf.ScalarRMSProp(0.01, 0.9), 3)
    with pytest.raises(ValueError, match="zero at 3 of 3"):
        fn(objective, jnp.zeros(3), cf.ScalarRMSProp(0.01, 0.9), 3)


@pytest.mark.parametrize("fn", [cf.train, cf.predict])
def test_bad_values_at_the_start(fn):
    objective = cf.Objective(lambda w: jnp.sum(jnp.sqrt(w)))
    with pytest.raises(ValueError, match="`loss_fn`'s gradient is inf"):
        fn(objective, jnp.zeros(3), cf.GradientDescent(0.1), 3)
    optimizer = cf.RMSProp(0.1, 0.9)
    state = optimizer.init(jnp.ones(3))
    state = dataclasses.replace(state, nu=jnp.array([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match=r"`optimizer_state` gives .* nan at index 1"):
        fn(objective, jnp.ones(3), optimizer, 3, optimizer_state=state)
    state = dataclasses.replace(state, nu=jnp.ones(4))
    with pytest.raises(ValueError, match="`optimizer_state` does not belong"):
        fn(objective, jnp.ones(3), optimizer, 3, optimizer_state=state)
