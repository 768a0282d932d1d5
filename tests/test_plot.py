"""Figures show what the trajectories hold, whatever is missing in them."""

import io

import jax.numpy as jnp
import numpy as np
import pytest

from centralflow import plot
from centralflow.compare import default_window, time_average
from centralflow.results import RESULTS
from centralflow.trajectory import Trajectory

STEPS, MEASURED = 60, slice(10, None, 10)


def trajectory(steps=STEPS, *, weight_times=None, shift=0.0, metrics=None, **series):
    times = np.arange(steps + 1.0)
    loss = np.exp(-times / 30)
    kept = np.array([0.0, steps] if weight_times is None else weight_times)
    missing = np.full((times.size, 1), np.nan)
    defaults = dict(
        times=times,
        loss=loss,
        mean_loss=loss,
        grad_norm_sq=loss,
        mean_grad_norm_sq=loss,
        sharpness=missing,
        oscillation=missing,
        weight_times=kept,
        weights=np.stack([kept, np.full(kept.size, shift)], axis=1),
    )
    return Trajectory(
        **{k: jnp.asarray(v, jnp.float32) for k, v in (defaults | series).items()},
        metrics={k: jnp.asarray(v) for k, v in (metrics or {}).items()},
        model=None,
        optimizer_state=None,
        critical_sharpness=2.0,
        result=RESULTS.successful,
        stats={},
    )


def measured_run(**kwargs):
    sharpness = np.full((STEPS + 1, 2), np.nan)
    sharpness[MEASURED] = [2.1, 1.7]
    oscillation = np.full((STEPS + 1, 2), np.nan)
    oscillation[MEASURED] = [2e-3, 1e-3]
    loss = np.exp(-np.arange(STEPS + 1) / 30) * (
        1 + 0.3 * (-1.0) ** np.arange(STEPS + 1)
    )
    options = dict(sharpness=sharpness, oscillation=oscillation, loss=loss)
    return trajectory(weight_times=[0, 20, 40, STEPS], **(options | kwargs))


def prediction(steps=STEPS, **kwargs):
    sharpness = np.tile([2.0, 1.8, np.nan], (steps + 1, 1))
    oscillation = np.tile([4e-3, 0.0, 0.0], (steps + 1, 1))
    oscillation[:5] = 0
    options = dict(
        sharpness=sharpness,
        oscillation=oscillation,
        mean_loss=1.1 * np.exp(-np.arange(steps + 1) / 30),
        weight_times=[0, 20, steps],
        shift=0.5,
    )
    return trajectory(steps, **(options | kwargs))


def panels(figure):
    with io.BytesIO() as file:
        figure.savefig(file, dpi=50)
        assert file.tell() > 5_000
    return figure.axes


def labelled(axes):
    return {line.get_label(): line for line in axes.lines}


def points(line):
    x, y = (np.asarray(v, float) for v in line.get_data())
    return x[np.isfinite(y)], y[np.isfinite(y)]


def averaged(run, window):
    return time_average(np.asarray(run.loss, float), window)


def test_losses():
    run, predicted, stable = measured_run(), prediction(), trajectory(shift=1.0)
    axes = panels(plot.comparison(run, predicted, stable=stable))[0]
    lines = labelled(axes)
    assert axes.get_yscale() == "log"
    assert set(lines) == {"run", "run, averaged", "prediction", "stable flow"}
    for name, times, values in (
        ("run", run.times, run.loss),
        ("prediction", predicted.times, predicted.mean_loss),
        ("stable flow", stable.times, stable.loss),
        ("run, averaged", run.times, averaged(run, default_window(STEPS))),
    ):
        np.testing.assert_array_equal(lines[name].get_xdata(), times)
        np.testing.assert_allclose(lines[name].get_ydata(), values, rtol=1e-6)


def test_window():
    run = measured_run()
    axes = panels(plot.comparison(run, prediction(), window=20))[0]
    average = labelled(axes)["run, averaged"].get_ydata()
    np.testing.assert_allclose(average, averaged(run, 20))


def test_eigenvalues():
    run, predicted = measured_run(), prediction()
    axes = panels(plot.comparison(run, predicted))[1]
    assert list(labelled(axes)["critical: 2"].get_ydata()) == [2, 2]
    curves = [line for line in axes.lines if line.get_linestyle() == "-"]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    # The third eigenvalue is never tracked.
    assert len(curves) == len(dots) == 2
    for mode in range(2):
        np.testing.assert_array_equal(
            curves[mode].get_ydata(), predicted.sharpness[:, mode]
        )
        x, y = points(dots[mode])
        np.testing.assert_array_equal(x, run.times[MEASURED])
        np.testing.assert_array_equal(y, run.sharpness[MEASURED, mode])
        assert curves[mode].get_color() == dots[mode].get_color()


def test_oscillations():
    run, predicted = measured_run(), prediction()
    axes = panels(plot.comparison(run, predicted))[2]
    lines = labelled(axes)
    assert axes.get_yscale() == "log"
    assert set(lines) == {"predicted", "predicted sum", "measured sum"}
    x, y = points(lines["predicted"])
    np.testing.assert_array_equal(x, predicted.times[5:])
    np.testing.assert_array_equal(y, predicted.oscillation[5:, 0])
    x, y = points(lines["measured sum"])
    np.testing.assert_array_equal(x, run.times[MEASURED])
    np.testing.assert_allclose(y, 3e-3, rtol=1e-6)


def test_round_off_is_no_oscillation():
    oscillation = np.tile([4e-3, 1e-12, 0.0], (STEPS + 1, 1))
    axes = panels(plot.comparison(measured_run(), prediction(oscillation=oscillation)))[
        2
    ]
    assert axes.get_ylim()[0] > 1e-6


def test_distances():
    run, predicted, stable = measured_run(), prediction(), trajectory(shift=1.0)
    axes = panels(plot.comparison(run, predicted, stable=stable))[3]
    lines = labelled(axes)
    for name, times, distances in (
        ("to their start", [0, 20, 40, 60], [0, 20, 40, 60]),
        ("to prediction", [0, 20, 60], [0.5, 0.5, 0.5]),
        ("to stable flow", [0, 60], [1, 1]),
    ):
        np.testing.assert_array_equal(lines[name].get_xdata(), times)
        np.testing.assert_allclose(lines[name].get_ydata(), distances)


def test_nothing_measured():
    axes = panels(plot.comparison(trajectory(), trajectory(shift=0.1)))
    assert set(labelled(axes[1])) == {"critical: 2"}
    assert not axes[2].lines
    assert set(labelled(axes[3])) == {"to their start", "to prediction"}


def test_measurements_without_predicted_oscillation():
    axes = panels(plot.comparison(measured_run(), trajectory(shift=0.1)))
    assert set(labelled(axes[2])) == {"measured sum"}


@pytest.mark.parametrize(
    ("run", "predicted"),
    [
        pytest.param(measured_run(), prediction(25), id="short prediction"),
        pytest.param(trajectory(25), prediction(), id="short run"),
        pytest.param(trajectory(1), prediction(1), id="one step"),
        pytest.param(
            trajectory(0, weight_times=[0]), prediction(), id="failed at the first step"
        ),
        pytest.param(
            measured_run(loss=np.r_[np.ones(30), np.zeros(31)]),
            prediction(mean_loss=np.r_[np.ones(30), np.zeros(31)]),
            id="loss reaches zero",
        ),
        pytest.param(
            measured_run(loss=np.zeros(61)),
            prediction(mean_loss=np.zeros(61)),
            id="loss is zero",
        ),
        pytest.param(
            measured_run(loss=np.ones(61)),
            prediction(mean_loss=np.ones(61)),
            id="loss is constant",
        ),
        pytest.param(
            measured_run(loss=np.geomspace(1, 1e30, 61)),
            prediction(),
            id="loss explodes",
        ),
    ],
)
def test_degenerate_trajectories(run, predicted):
    axes = panels(plot.comparison(run, predicted, stable=predicted))
    loss = labelled(axes[0])["run"].get_ydata()
    assert not np.any(np.asarray(loss) <= 0)


def test_panels_share_the_steps():
    figure = plot.comparison(measured_run(), prediction(25))
    assert len({axes.get_xlim() for axes in panels(figure)}) == 1


def test_loss():
    run, predicted = measured_run(), prediction()
    (axes,) = panels(plot.loss(run, predicted, labels=["GD", "central flow"]))
    lines = labelled(axes)
    assert list(lines) == ["GD", "central flow"]
    np.testing.assert_allclose(lines["central flow"].get_ydata(), predicted.mean_loss)
    (axes,) = panels(plot.loss(run))
    assert axes.get_legend() is None


def test_curves_that_coincide_are_all_seen():
    (axes,) = panels(plot.loss(*[trajectory()] * 6))
    widths = [line.get_linewidth() for line in axes.get_lines()]
    assert np.all(np.diff(widths[1:]) < 0)
    assert widths[0] >= widths[1]


def test_metrics():
    times = np.arange(STEPS + 1.0)
    outputs = np.stack([times, -times], axis=1)
    outputs[1::2] = np.nan
    run = trajectory(metrics=dict(accuracy=times / STEPS, outputs=outputs))
    flow = trajectory(metrics=dict(outputs=2 * outputs, test=times))
    figure = plot.metrics(run, flow, labels=["run", "flow"])
    first, second, third = panels(figure)
    titles = [axes.get_title(loc="left") for axes in (first, second, third)]
    assert titles == ["accuracy", "outputs", "test"]
    (line,) = first.get_lines()
    np.testing.assert_allclose(line.get_ydata(), times / STEPS, rtol=1e-6)
    assert len(second.get_lines()) == 4  # two entries of two trajectories
    for line, sign in zip(second.get_lines(), (1, -1, 2, -2), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), times[::2])
        np.testing.assert_array_equal(line.get_ydata(), sign * times[::2])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["run", "flow"]
    figure.savefig(io.BytesIO())


def test_metrics_rejects():
    with pytest.raises(ValueError, match="`trajectories`"):
        plot.metrics()
    with pytest.raises(ValueError, match="no metrics"):
        plot.metrics(trajectory())
    with pytest.raises(ValueError, match="`labels`"):
        plot.metrics(trajectory(), labels=["one", "two"])


def test_loss_rejects():
    with pytest.raises(ValueError, match="`trajectories`"):
        plot.loss()
    with pytest.raises(ValueError, match="`labels`"):
        plot.loss(trajectory(), labels=["one", "two"])
