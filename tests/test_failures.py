"""Every way in which a run can fail, each at a known time, on one closed form.

A program takes up to twenty seconds to compile. So all that can fail is in one loss,
and which of it does is data: the same few programs serve all tests."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf
from centralflow import running
from centralflow.flows import FlowState
from centralflow.flows.base import Work
from centralflow.solvers import ForesightController, Pause, PausingController

# Where the clock passes it, what is asked for fails; between two steps of an optimizer,
# and not at an end of half a step.
T = 12.3
STEPS = 30


def _lost_past(order):
    """A function of the clock that is zero. So are its derivatives, but that past the
    threshold the one of this order, and those beyond, are not a number."""
    if order == 0:
        return lambda z, threshold: jnp.where(z > threshold, jnp.nan, 0.0)
    derivative = _lost_past(order - 1)

    @jax.custom_jvp
    def zero(z, threshold):
        return jnp.zeros_like(z)

    @zero.defjvp
    def _(primals, tangents):
        return zero(*primals), derivative(*primals) * tangents[0]

    return zero


_LOST = [_lost_past(order) for order in range(4)]


@jax.custom_jvp
def _rotation(x, u, strength):
    """Zero, with a "gradient" strength * (-u, x), whose Jacobian is not symmetric."""
    return jnp.zeros_like(x)


@_rotation.defjvp
def _(primals, tangents):
    (x, u, strength), (dx, du, _) = primals, tangents
    return jnp.zeros_like(x), strength * (x * du - u * dx)


_OFF = dict(
    loss=1e9, gradient=1e9, hessian=1e9, third=1e9, rotation=1e9, jump=1e9, kink=1e9,
    curvature=1.0, coupling=1.0, blow_up=0.0,
)  # fmt: skip


def _loss(w, data):
    """At a learning rate of 1, `z = t` is a clock. The sharpness 1.9 + 0.02 t, along x,
    is critical at t = 5 and then held, by a variance of 0.04."""
    s = dict(zip(_OFF, data[0], strict=True))
    z, x, u, c, v = w
    after = lambda name: jnp.where(z > s[name], 1.0, 0.0)
    loss = 100 - z - 0.02 * c + (1.9 + s["coupling"] * c) * x**2 / 2
    loss += after("jump") * s["curvature"] * x**2 / 2
    loss += 100 * after("kink") * jnp.abs(u)
    loss -= s["blow_up"] * v**3 / 3  # v = 1 / (1 - blow_up * t)
    loss += _rotation(x, u, 40 * after("rotation"))
    orders = ("loss", "gradient", "hessian", "third")
    return loss + sum(f(z, s[name]) for f, name in zip(_LOST, orders, strict=True))


START = jnp.array([0.0, 0, 0.3, 0, 1])


def _objective(**switches):
    return cf.Objective(_loss, jnp.array([list((_OFF | switches).values())]))


def _train(objective, **options):
    rate = cf.GradientDescent(1.0)
    return cf.train(objective, START, rate, STEPS, sharpness_every=2, **options)


def _predict(flow):
    def run(objective, **options):
        rate = cf.GradientDescent(1.0)
        return cf.predict(objective, START, rate, STEPS, flow=flow, **options)

    return run


RUN = dict(
    train=_train,
    fixed=_predict(cf.CentralFlow(substeps=2)),
    adaptive=_predict(cf.CentralFlow()),
    stable=_predict(cf.StableFlow()),
)

# For how long after T a run cannot know: one reports whole steps, and measures every
# other; the fixed steps are halves, in every other of which eigenvectors are new; the
# shortest adaptive step is 0.02, and up to two are made at that. The stable flow stops
# before, by up to a few of its shortest steps of 1e-5; but the clock z and the time are
# two sums of float32, whose roundings, of 1e-6 in each of some steps, differ.
LATE = dict(train=1, fixed=0.5, adaptive=0.041, stable=1e-5)
JUMP = dict(jump=T, coupling=0.0)

# What is switched on, in which run, the code, the time of failure at the earliest and
# at the latest, and what the message says of it besides.
CASES = [
    *(
        (dict(loss=T), run, "nonfinite_loss", T, T + LATE[run], "The loss is nan")
        for run in RUN
    ),
    *(
        (
            dict(gradient=T),
            run,
            "nonfinite_gradient",
            T,
            T + LATE[run],
            "gradient is nan",
        )
        for run in RUN
    ),
    *(
        (dict(hessian=T), run, "nonfinite_hessian", T, T + late, "vector is nan")
        for run, late in (("train", 2), ("fixed", 0.5), ("adaptive", 0.041))
    ),
    *(
        (dict(third=T), run, "nonfinite_third_derivative", T, T + late, "is nan")
        for run, late in (("fixed", 1), ("adaptive", 0.041))
    ),
    *(
        (dict(rotation=T), run, "eigensolver_failed", T, T + late, "a residual is")
        for run, late in (("train", 2), ("fixed", 1), ("adaptive", 0.041))
    ),
    # Without a third derivative nothing lowers the sharpness of 2.9. Ten optimizer
    # steps of that, and one step more, are too many. (The first step began before T.)
    *(
        (dict(JUMP), run, "sdcp_failed", T + 10 - dt, T + 10 + 2 * dt, "1 of the viol")
        for run, dt in (("fixed", 0.5), ("adaptive", 0.021))
    ),
    # A sharpness of 42: 20 times critical, so the square of 5 * 20 * 0.02 / 0.27, the
    # error of a step that finds such a violation in 0.02, is 55.
    (dict(JUMP, curvature=40.0), "adaptive", "dt_min_reached", T, T + 0.041, "is 54."),
    # u = 0 is reached at T + 0.3 / 100, and then any step is too long. (For having
    # stepped over T it is at T + 0.0028.)
    (dict(kink=T), "stable", "dt_min_reached", T + 2.7e-3, T + 3.1e-3, "shortest step"),
    # v' = 0.08 v^2 is infinite at 12.5, where the adaptive flow makes its last steps,
    # of 0.02 each, too few to follow it. In discrete steps it is later: `_recursion`.
    # Or, at the last measurement before that, the eigensolver ends in rounding errors:
    # the Hessian is 1e9 in one direction, and 1 in the others.
    (dict(blow_up=0.08), "train", "diverged", 18, 20, "weight of -"),
    (
        dict(blow_up=0.08),
        "fixed",
        "diverged",
        16.5,
        16.5,
        "weight of -inf at t = 16.5 ",
    ),
    (dict(blow_up=0.08), "adaptive", "diverged", 12.4, 13.0, "weight of -"),
    (dict(blow_up=0.08), "stable", "diverged", 12.5, 12.51, "weight of"),
]


def _recursion(dt):
    """When 0.08 v^3 / 3 is beyond float32, in explicit steps of v' = 0.08 v^2."""
    v, t = 1.0, 0.0
    while 0.08 * v**3 / 3 < float(np.finfo(np.float32).max):
        v, t = v + dt * 0.08 * v**2, t + dt
    return t


def test_when_the_discrete_runs_diverge():
    assert (_recursion(1), _recursion(0.5)) == (20, 16.5)


def _rows(trajectory):
    series = ("loss", "mean_loss", "grad_norm_sq", "mean_grad_norm_sq")
    return [getattr(trajectory, name) for name in ("times", *series)]


# What comes before is no warning's business: the error says it all.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("switches", "run", "code", "earliest", "latest", "text"),
    CASES,
    ids=[f"{code}-{run}" for _, run, code, *_ in CASES],
)
def test_failure(switches, run, code, earliest, latest, text, tmp_path, monkeypatch):
    with pytest.raises(cf.NumericalFailure) as info:
        RUN[run](_objective(**switches))
    failed, message = info.value.trajectory, str(info.value)
    assert failed.result == getattr(cf.RESULTS, code)
    early = 1e-4 if run == "stable" else 0
    assert earliest - early <= failed.failure_time <= latest
    last = failed.times[-1]
    assert text in message
    assert f"at t = {failed.failure_time:.7g}" in message
    assert f"(last finite loss {failed.loss[-1]:.4g} at t = {last:.7g})" in message
    assert "learning rate 1." in message
    # What came before is there, all of it and no more, as in a run that does not fail.
    assert failed.failure_time - 2.5 < last <= failed.failure_time
    np.testing.assert_array_equal(failed.times, np.arange(last + 1))
    for series in _rows(failed):
        assert len(series) == len(failed.times)
        assert np.all(np.isfinite(series))
    if "blow_up" not in switches:
        np.testing.assert_allclose(failed.loss[:12], 100 - np.arange(12.0), rtol=1e-3)
        # The clock of the last weights.
        assert last <= failed.model[0] + 1e-4 <= failed.failure_time + 2e-4
    assert np.all(np.isfinite(failed.model))
    assert np.all(np.isfinite(failed.weights))
    assert failed.stats["accepted_steps"] + failed.stats["rejected_steps"] < 200

    # In stretches of a single step it fails alike.
    monkeypatch.setattr(running, "_CHUNK_SECONDS", 0.0)
    returned = RUN[run](_objective(**switches), throw=False)
    failed.save(tmp_path / "failed.npz")
    loaded = cf.Trajectory.load(tmp_path / "failed.npz")
    for again in (returned, loaded):
        assert again.result == getattr(cf.RESULTS, code)
        for a, b in zip(_rows(failed), _rows(again), strict=True):
            np.testing.assert_array_equal(a, b)
        for name in ("failure_time", "failure_value"):
            np.testing.assert_array_equal(getattr(again, name), getattr(failed, name))
    assert text in str(loaded)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("run", RUN)
def test_without_a_switch_nothing_fails(run, tmp_path):
    trajectory = RUN[run](_objective())
    assert trajectory.result == cf.RESULTS.successful
    np.testing.assert_array_equal(trajectory.times, np.arange(STEPS + 1))
    assert np.isnan(trajectory.failure_time)
    assert np.isnan(trajectory.failure_value)
    trajectory.save(tmp_path / "run.npz")
    assert cf.Trajectory.load(tmp_path / "run.npz").result == cf.RESULTS.successful


@pytest.mark.parametrize(
    ("run", "switch", "code"),
    [
        ("train", "hessian", "nonfinite_hessian"),
        ("fixed", "hessian", "nonfinite_hessian"),
        ("adaptive", "hessian", "nonfinite_hessian"),
        ("train", "rotation", "eigensolver_failed"),
        ("fixed", "rotation", "eigensolver_failed"),
        ("adaptive", "rotation", "eigensolver_failed"),
        ("fixed", "third", "nonfinite_third_derivative"),
    ],
)
@pytest.mark.filterwarnings("ignore:The sharpness at the start")
def test_failure_at_the_start(run, switch, code):
    # Of loss and gradient it is a `ValueError`; the rest is not looked at before.
    failed = RUN[run](_objective(**{switch: -1.0}), throw=False)
    assert failed.result == getattr(cf.RESULTS, code)
    assert failed.failure_time == 0
    np.testing.assert_array_equal(failed.times, [0])
    for series in _rows(failed):
        assert np.all(np.isfinite(series))
    np.testing.assert_array_equal(failed.model, START)


def test_a_failed_prediction_can_be_continued_where_nothing_fails():
    failed = RUN["fixed"](_objective(gradient=T), throw=False)
    again = RUN["fixed"](_objective(), solver_state=failed.solver_state)
    assert again.result == cf.RESULTS.successful
    np.testing.assert_allclose(again.loss[0], 100 - 12, rtol=1e-3)
    still = RUN["fixed"](
        _objective(gradient=T), solver_state=failed.solver_state, throw=False
    )
    assert still.result == cf.RESULTS.nonfinite_gradient
    assert still.failure_time == 0.5


# Under `jit`.


@pytest.mark.parametrize(
    ("run", "switch", "code"),
    [
        ("train", "hessian", "nonfinite_hessian"),
        ("stable", "gradient", "nonfinite_gradient"),
        pytest.param(
            "fixed", "third", "nonfinite_third_derivative", marks=pytest.mark.slow
        ),
        pytest.param("adaptive", "loss", "nonfinite_loss", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_raised_under_jit(run, switch, code):
    @jax.jit
    def result(data):
        trajectory = RUN[run](cf.Objective(_loss, data))
        return trajectory.result, trajectory.failure_time

    found, time = result(_objective(**{switch: T}).data)
    assert found == getattr(cf.RESULTS, code)
    assert T - 1e-4 < time <= T + 2
    found, time = result(_objective().data)
    assert found == cf.RESULTS.successful
    assert np.isnan(time)


@pytest.mark.slow
def test_a_full_block_under_jit():
    # One row has no room for guards: it is full before the first step.
    @eqx.filter_jit
    def predict(data):
        run = _predict(cf.CentralFlow(substeps=2, block_size=1))
        return run(cf.Objective(_loss, data))

    full = predict(_objective().data)
    assert full.result == cf.RESULTS.block_full
    assert full.failure_time == 0
    assert full.stats["accepted_steps"] == 0
    assert full.failure_value == 1


# Limits.


@pytest.mark.parametrize(
    "run",
    [
        "stable",
        *(
            pytest.param(r, marks=pytest.mark.slow)
            for r in RUN
            if r in ("fixed", "adaptive")
        ),
    ],
)
def test_out_of_steps(run, tmp_path):
    # The stable flow's steps are 0.5, 5 and the rest; the first adaptive ones of the
    # central flow at most 0.5, 1.5 and 4.5 long.
    with pytest.raises(cf.NumericalFailure, match="`max_steps`") as info:
        RUN[run](_objective(), max_steps=2)
    out = info.value.trajectory
    assert out.result == cf.RESULTS.max_steps_reached
    assert out.stats["accepted_steps"] + out.stats["rejected_steps"] == 2
    assert 1 <= out.failure_time <= 5.5
    np.testing.assert_array_equal(out.times, np.arange(np.floor(out.failure_time) + 1))
    out.save(tmp_path / "out.npz")
    loaded = cf.Trajectory.load(tmp_path / "out.npz")
    assert loaded.result == cf.RESULTS.max_steps_reached


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "10"])
def test_a_wrong_limit(value):
    with pytest.raises(ValueError, match="`max_steps` must be a positive integer"):
        RUN["stable"](_objective(), max_steps=value)


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_the_limit_counts_rejected_steps(error):
    pid = diffrax.PIDController(rtol=0, atol=1e-2, norm=jnp.abs)
    controller, end = PausingController(pid), jnp.asarray(9.0)
    t0, t1 = jnp.asarray(1.0), jnp.asarray(1.5)
    _, state = controller.init(None, t0, end, t0, 0.5, None, None, 3)
    most = Pause(jnp.int32(5), jnp.int32(2), jnp.asarray(np.inf), end)
    paused = []
    for _ in range(2):
        keep, t0, t1, _, state, result = controller.adapt_step_size(
            t0, t1, t0, t0, most, jnp.asarray(error), 3, state
        )
        assert keep == (error == 0)
        paused.append(bool(result == diffrax.RESULTS.max_steps_reached))
    assert paused == [False, True]


@pytest.mark.parametrize("resolution", [0.0, 0.25])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_step_is_never_without_end(bad, resolution):
    """Whatever is said of what is ahead, and of the error, which is never NaN, the next
    step is finite, ends after it begins, and begins no earlier than the last."""
    pid = diffrax.PIDController(
        rtol=0, atol=1e-2, norm=lambda y: y.observables["error"], dtmin=0.02
    )
    controller = ForesightController(pid, resolution)
    y = lambda error, ahead: FlowState(
        jnp.ones(1),
        (),
        dict(error=jnp.asarray(error), approach=jnp.full((2, 2), ahead), work=Work()),
    )
    t0, t1 = jnp.asarray(1.0), jnp.asarray(1.5)
    _, state = controller.init(None, t0, 9.0, y(0.0, 0.0), 0.5, None, None, 3)
    for error in (0.0, 1e-3, np.inf):
        for _ in range(20):
            keep, t0, t1, _, state, _ = controller.adapt_step_size(
                t0, t1, y(0.0, 0.0), y(0.0, 0.0), None, y(error, bad), 3, state
            )
            assert np.isfinite(t1)
            assert t1 > t0 >= 1
        assert keep  # at the least length at last
