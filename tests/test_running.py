"""`train` and `predict`: what they record, what they refuse, how they fail."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .problems import tiny_loss, tiny_network


def _problem(dtype=jnp.float32):
    model, data = tiny_network(dtype)
    return cf.Objective(tiny_loss, data), model


def test_train_is_the_optimizer():
    objective, model = _problem()
    run = cf.train(objective, model, cf.GradientDescent(0.2), 9, weight_times=[4])
    w, flat = objective.flatten(model)
    path = [w]
    for _ in range(9):
        path.append(path[-1] - 0.2 * flat.grad(path[-1]))
    np.testing.assert_array_equal(run.times, np.arange(10))
    rounding = dict(rtol=1e-5, atol=1e-6)  # of float32, over nine steps
    np.testing.assert_allclose(run.loss, [flat.loss(w) for w in path], **rounding)
    norms = [jnp.sum(flat.grad(w) ** 2) for w in path]
    np.testing.assert_allclose(run.grad_norm_sq, norms, **rounding)
    np.testing.assert_array_equal(run.weight_times, [0, 4, 9])
    np.testing.assert_allclose(
        run.weights, jnp.stack(path)[jnp.array([0, 4, 9])], **rounding
    )
    np.testing.assert_array_equal(objective.flatten(run.model)[0], run.weights[-1])
    assert run.stats["gradients"] == 10
    assert run.result == cf.RESULTS.successful


def test_train_in_pieces_is_train_at_once():
    objective, model = _problem()
    optimizer = cf.GradientDescent(lambda step: 0.2 / (1 + step))
    whole = cf.train(objective, model, optimizer, 20)
    half = cf.train(objective, model, optimizer, 10)
    rest = cf.train(
        objective, half.model, optimizer, 10, optimizer_state=half.optimizer_state
    )
    np.testing.assert_array_equal(rest.loss, whole.loss[10:])
    # with a progress bar the same program runs in pieces
    shown = cf.train(objective, model, optimizer, 20, progress=True)
    np.testing.assert_array_equal(shown.loss, whole.loss)


def test_measurements_of_a_known_oscillation():
    """On a quadratic at the edge, w_t = (-1)^t a along the critical eigenvector."""
    curvature = jnp.array([20.0, 3.0, 1.0])
    objective = cf.Objective(lambda w: 0.5 * jnp.sum(curvature * w**2))
    run = cf.train(
        objective, jnp.array([0.5, 0.0, 0.0]), cf.GradientDescent(0.1), 40,
        sharpness_every=10, sharpness_count=2,
    )  # fmt: skip
    rows = np.arange(0, 41, 10)
    assert not np.any(np.isfinite(np.delete(run.sharpness, rows, axis=0)))
    np.testing.assert_allclose(run.sharpness[rows], [[2.0, 0.3]] * 5, rtol=1e-4)
    # the variance in the P-inner product, P = 1/eta, is a^2 / eta
    np.testing.assert_allclose(run.oscillation[rows[2:], 0], 0.5**2 / 0.1, rtol=1e-4)
    np.testing.assert_allclose(run.oscillation[rows[2:], 1], 0, atol=1e-4)


@pytest.mark.usefixtures("x64")
def test_metrics_are_predicted_averages():
    """With H and Sigma known, E[h] = h + <hess h, Sigma>/2 for h of any shape."""
    objective = cf.Objective(lambda w: 10 * w[0] ** 2 - 0.01 * w[0] ** 2 * w[1] - w[1])
    metrics = dict(
        quadratic=lambda w: jnp.stack([w[0] ** 2, w[0] * w[1]]),
        count=lambda w: jnp.asarray(3),
    )
    flow = cf.predict(
        objective, jnp.array([0.0, -1.0]), cf.GradientDescent(0.1), 3, metrics=metrics,
        flow=cf.CentralFlow(substeps=1),
    )  # fmt: skip
    assert flow.metrics["quadratic"].shape == (4, 2)
    np.testing.assert_allclose(flow.metrics["count"], 3)
    # oscillation = sigma^2 / eta with sigma^2 the variance of w_0
    sigma_sq = 0.1 * flow.oscillation[:, 0]
    np.testing.assert_allclose(flow.metrics["quadratic"][:, 0], sigma_sq, atol=1e-9)


def test_metrics_of_models_with_other_leaves():
    """Such as the booleans of `equinox.nn.MultiheadAttention`."""
    model = dict(w=jnp.array([1.0, -1.0]), square=True)
    value = lambda m: jnp.sum(m["w"] ** 2) if m["square"] else jnp.sum(m["w"])
    problem = (cf.Objective(value), model, cf.GradientDescent(0.1), 2)
    for fn in (cf.train, cf.predict):
        trajectory = fn(*problem, metrics=dict(value=value))
        ends = trajectory.metrics["value"][jnp.array([0, -1])]
        np.testing.assert_allclose(ends, trajectory.mean_loss[jnp.array([0, -1])])


def test_times_and_weight_times():
    objective, model = _problem()
    optimizer = cf.GradientDescent(0.2)
    every = cf.predict(objective, model, optimizer, 10)
    np.testing.assert_array_equal(every.times, np.arange(11))
    some = cf.predict(
        objective, model, optimizer, 10, times=[0.5, 2, 7.25], weight_times=[2, 7.25]
    )
    np.testing.assert_array_equal(some.times, [0.5, 2, 7.25])
    np.testing.assert_array_equal(some.weight_times, [0, 2, 7.25, 10])
    assert some.weights.shape == (4, every.weights.shape[1])
    np.testing.assert_allclose(some.loss[1], every.loss[2], rtol=1e-6)
    np.testing.assert_array_equal(some.weights[-1], every.weights[-1])


@pytest.mark.parametrize("flow", [cf.CentralFlow(2), cf.StableFlow()])
def test_jit_and_vmap(flow):
    objective, model = _problem()

    def final_loss(rate):
        optimizer = cf.GradientDescent(rate)
        return cf.predict(objective, model, optimizer, 5, flow=flow).mean_loss

    rates = jnp.array([0.1, 0.3])
    one_by_one = jnp.stack([final_loss(rate) for rate in rates])
    rounding = dict(rtol=1e-5)
    np.testing.assert_allclose(jax.jit(final_loss)(rates[1]), one_by_one[1], **rounding)
    np.testing.assert_allclose(jax.vmap(final_loss)(rates), one_by_one, **rounding)
    train = lambda rate: cf.train(objective, model, cf.GradientDescent(rate), 5).loss
    np.testing.assert_allclose(
        jax.vmap(train)(rates), jnp.stack([train(r) for r in rates]), **rounding
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_dtype_follows_the_model(dtype):
    with jax.enable_x64(True):
        objective, model = _problem(dtype)
        for trajectory in (
            cf.train(objective, model, cf.GradientDescent(0.2), 4, sharpness_every=2),
            cf.predict(objective, model, cf.GradientDescent(0.2), 4),
            cf.predict(
                objective, model, cf.GradientDescent(0.2), 4, flow=cf.StableFlow()
            ),
        ):
            for name in ("loss", "mean_loss", "sharpness", "oscillation", "weights"):
                assert getattr(trajectory, name).dtype == dtype, name


def _diverging():
    return cf.Objective(lambda w: jnp.sum(w**4)), jnp.array([1.0, 2.0])


def test_divergence_of_a_run_keeps_what_there_was():
    objective, model = _diverging()
    with pytest.raises(
        cf.NumericalFailure, match=r"diverged.*inf at t = 3.*at t = 2"
    ) as info:
        cf.train(objective, model, cf.GradientDescent(1.0), 1000)
    run = info.value.trajectory
    again = cf.train(objective, model, cf.GradientDescent(1.0), 1000, throw=False)
    assert again.result == cf.RESULTS.diverged
    for kept in (run, again):
        np.testing.assert_array_equal(kept.times, [0, 1, 2])
        assert np.all(np.isfinite(kept.loss))
        assert np.all(np.isfinite(kept.model))
        assert kept.stats["gradients"] < 10  # it stopped at once


@pytest.mark.parametrize("flow", [cf.CentralFlow(), cf.CentralFlow(1), cf.StableFlow()])
def test_divergence_of_a_flow_keeps_what_there_was(flow):
    # dw/dt = 1 + w^2 reaches infinity at t = pi/2
    objective = cf.Objective(
        lambda w: -jnp.sum(jnp.where(w > 1e3, jnp.nan, w + w**3 / 3))
    )
    model = jnp.array([0.0])
    with pytest.raises(cf.NumericalFailure) as info:
        cf.predict(objective, model, cf.GradientDescent(1.0), 100, flow=flow)
    prediction = info.value.trajectory
    if flow == cf.CentralFlow(1):  # too coarse to see it
        assert 1 <= prediction.times[-1] < 20
    else:
        np.testing.assert_array_equal(prediction.times, [0, 1])
        w = np.tan(1.0)
        # rtol = 1e-2, and errors grow as dw/dt = 1 + w^2, by 3.4
        assert abs(prediction.loss[1] + w + w**3 / 3) < 0.034 * (w + w**3 / 3)
    assert np.all(np.isfinite(prediction.loss))
    assert np.all(np.isfinite(prediction.model))


@pytest.mark.parametrize("flow", [cf.CentralFlow(), cf.StableFlow()])
def test_failure_in_the_first_step_keeps_the_start(flow):
    # The schedule is fine at each step of the optimizer, but not between them.
    rate = lambda step: jnp.where(step == jnp.round(step), 0.1, jnp.nan)
    objective, model = cf.Objective(lambda w: jnp.sum(w**2)), jnp.ones(2)
    optimizer = cf.GradientDescent(rate)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing converges there
        flow = cf.predict(objective, model, optimizer, 5, flow=flow, throw=False)
    assert flow.result != cf.RESULTS.successful
    np.testing.assert_array_equal(flow.times, [0])
    np.testing.assert_array_equal(flow.loss, [2])
    np.testing.assert_array_equal(flow.weights, [[1, 1]])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("fn", [cf.train, cf.predict])
def test_a_schedule_is_checked_from_the_count_of_the_state(fn):
    optimizer = cf.GradientDescent(lambda step: jnp.where(step > 22, -1.0, 0.1))
    objective, model = _problem()
    with pytest.raises(ValueError, match=r"`learning_rate`.* -1\.0 at step 23"):
        fn(objective, model, optimizer, 3, optimizer_state=jnp.asarray(20.0))


class _Counting(cf.AbstractOptimizer):
    learning_rate: float = 0.1

    def init(self, weights):
        return jnp.zeros((), int)

    def update_state(self, state, gradient):
        return state + 1

    def state_rate(self, state, gradient, gradient_sq):
        return jnp.ones_like(state)

    def preconditioner(self, state):
        return jnp.asarray(1 / self.learning_rate)


def test_warns_if_the_start_is_above_the_edge():
    objective = cf.Objective(lambda w: 10 * jnp.sum(w**2))
    # Without third derivatives nothing can bring the sharpness down either.
    with (
        pytest.warns(UserWarning, match="did not converge"),
        pytest.warns(UserWarning, match=r"sharpness at the start, 6, .* critical 2"),
    ):
        cf.predict(objective, jnp.ones(2), cf.GradientDescent(0.3), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf.predict(objective, jnp.ones(2), cf.GradientDescent(0.09), 1)


def _nothing(model):
    raise AssertionError("no work may be done")


_good = dict(steps=3)
_bad = [
    (dict(steps=0), "`steps`"),
    (dict(steps=-3), "`steps`"),
    (dict(steps=2.5), "`steps`"),
    (dict(steps=True), "`steps`"),
    (dict(objective=tiny_loss), "`objective`"),
    (dict(optimizer=0.1), "`optimizer`"),
    (dict(model=dict(A=jnp.arange(3))), "`model`"),
    (dict(objective=cf.Objective(lambda m: m["b"])), "`loss_fn`.*scalar"),
    (dict(objective=cf.Objective(lambda m: jnp.sum(m["b"]) / 0)), "`loss_fn`.*inf"),
    (dict(objective=cf.Objective(lambda m: jnp.nan * m["b"][0])), "`loss_fn`.*nan"),
    (dict(objective=cf.Objective(lambda m: jnp.asarray(1))), "`loss_fn`.*real"),
    (dict(optimizer_state=jnp.zeros(3)), "`optimizer_state`"),
    (dict(optimizer_state=dict(nu=jnp.zeros(()))), "`optimizer_state`"),
    (dict(optimizer_state="x"), "`optimizer_state`"),
    (dict(optimizer_state=jnp.asarray(0)), r"`optimizer_state`.*int32\[\]"),
    (dict(optimizer=_Counting()), "`optimizer`.*floating-point.*int32"),
    (dict(metrics={"f": 3}), "`metrics`"),
    (dict(metrics=[lambda m: 0.0]), "`metrics`.*list"),
    (dict(metrics={"f": lambda m: "word"}), "`metrics`.*'f'"),
    (dict(metrics={"f": lambda m: dict(a=1.0)}), "`metrics`.*'f'"),
    (dict(optimizer=cf.GradientDescent(lambda t: 0.1 - t)), "`learning_rate`.*step 1"),
    (dict(optimizer=cf.GradientDescent(lambda t: t / 0)), "`learning_rate`"),
    (dict(optimizer=cf.GradientDescent(lambda t: jnp.ones(2))), "`learning_rate`"),
    (dict(weight_times="ab"), "`weight_times`"),
    (dict(weight_times=[2, 1]), "`weight_times`"),
    (dict(weight_times=[5]), r"`weight_times`.*\[0, 3\]"),
]
_bad_train = [
    (dict(sharpness_every=0), "`sharpness_every`"),
    (dict(sharpness_count=0), "`sharpness_count`"),
    (dict(weight_times=[1.5]), "`weight_times`.*integers"),
]
_bad_predict = [
    (dict(flow="central"), "`flow`"),
    (dict(rtol=-1e-3), "`rtol`"),
    (dict(rtol=1e-3, flow=cf.CentralFlow(1)), "`rtol`.*substeps"),
    (dict(rtol=0.1), "`rtol`.*0.05"),
    (
        dict(optimizer=cf.RMSProp(0.1, 0.2), flow=cf.CentralFlow(1)),
        "`substeps` is 1, .* fewer than 2",
    ),
    (dict(solver_state=jnp.zeros(3)), "`solver_state`"),
    (dict(times=[]), "`times`"),
    (dict(times=[[1.0]]), "`times`"),
    (dict(times=[2, 1]), "`times`.*increasing"),
    (dict(times=[1, 1]), "`times`.*increasing"),
    (dict(times=[0, np.nan]), "`times`"),
    (dict(times=[-1, 2]), r"`times`.*\[0, 3\]"),
    (dict(times=[0, 4]), r"`times`.*\[0, 3\]"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("fn", "change", "message"),
    [(fn, *case) for fn in (cf.train, cf.predict) for case in _bad]
    + [(cf.train, *case) for case in _bad_train]
    + [(cf.predict, *case) for case in _bad_predict],
)
def test_bad_arguments(fn, change, message):
    objective, model = _problem()
    arguments = dict(
        objective=objective, model=model, optimizer=cf.GradientDescent(0.1), steps=3
    )
    with pytest.raises(ValueError, match=message):
        fn(**(arguments | change))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "arguments",
    [
        dict(substeps=0),
        dict(substeps=1.5),
        dict(renew_every=2),
        dict(renew_every=0),
        dict(block_size=0),
        dict(eigen_tolerance=0),
    ],
)
def test_bad_central_flow(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        cf.CentralFlow(**arguments)
