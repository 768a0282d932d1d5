"""Figures of runs and their predictions. Nothing else here imports matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .compare import default_window, time_average
from .trajectory import Trajectory, check_comparable, check_single

# M. Okabe and K. Ito's colours, which colour-blind readers can tell apart.
_RUN, _PREDICTION, _STABLE, _GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000")


def comparison(
    run: Trajectory,
    prediction: Trajectory,
    *,
    stable: Trajectory | None = None,
    window: int | None = None,
) -> Figure:
    """A run and its prediction: loss, eigenvalues, oscillations, weights.

    **Arguments:**

    - `run`: from [`centralflow.train`][].
    - `prediction`: from [`centralflow.predict`][], of the same problem.
    - `stable`: the prediction of the [`centralflow.StableFlow`][], to hold against it.
    - `window`: the width in steps of [`centralflow.time_average`][] for the run's loss;
        by default as of [`centralflow.compare`][].

    **Returns:**

    A `matplotlib.figure.Figure` of four panels; its `savefig` writes it to a file.

    **Raises:**

    `ValueError` if one is no trajectory, a batch, or of a model of another size, or if
    `window` is not a positive integer.
    """
    given = {} if stable is None else dict(stable=stable)
    check_comparable(run, prediction=prediction, **given)
    figure = Figure(figsize=(7.6, 6.0), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.08)
    (a, b), (c, d) = figure.subplots(2, 2, sharex=True)
    _losses(a, run, prediction, stable, window)
    _finish(a, "training loss")
    _head(a, "(a) Training loss")
    _eigenvalues(b, run, prediction)
    _finish(b, "eigenvalue")
    _head(b, "(b) Top eigenvalues of $P^{-1}H$")
    _oscillations(c, run, prediction)
    _finish(c, "variance in the $P$-norm")
    _head(c, "(c) Oscillation variances")
    _distances(d, run, prediction, stable)
    _finish(d, "Euclidean distance")
    _head(d, "(d) Distance of the run's weights")
    for axes in (c, d):
        axes.set_xlabel("optimizer step", fontsize=9)
    return figure


def loss(*trajectories: Trajectory, labels: Sequence[str] | None = None) -> Figure:
    """The losses of runs, and the predicted time-averages of those of flows.

    **Arguments:**

    - `trajectories`: from [`centralflow.train`][] or [`centralflow.predict`][].
    - `labels`: their names.

    **Returns:**

    A `matplotlib.figure.Figure`; its `savefig` writes it to a file.

    **Raises:**

    `ValueError` if there are no trajectories, batches of them, or more or fewer labels.
    """
    styles = _styles(trajectories, labels)
    figure = Figure(figsize=(4.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for trajectory, style in zip(trajectories, styles, strict=True):
        times = np.asarray(trajectory.times)
        axes.plot(times, _positive(trajectory.mean_loss), **style)
    _log(axes)
    _finish(axes, "training loss")
    axes.set_xlabel("optimizer step", fontsize=9)
    if labels is not None:
        axes.legend(fontsize=8, frameon=False)
    return figure


def metrics(*trajectories: Trajectory, labels: Sequence[str] | None = None) -> Figure:
    """The metrics of runs, and the predicted time-averages of those of flows: a panel
    for each, with a curve for each of its entries. The times at which one is not known
    are left out.

    **Arguments:**

    - `trajectories`: from [`centralflow.train`][] or [`centralflow.predict`][], with
        `metrics`; not all have to have the same.
    - `labels`: their names.

    **Returns:**

    A `matplotlib.figure.Figure`; its `savefig` writes it to a file.

    **Raises:**

    `ValueError` if there are no trajectories, batches of them, or more or fewer labels,
    or no metrics.
    """
    styles = _styles(trajectories, labels)
    names = list(dict.fromkeys(name for x in trajectories for name in x.metrics))
    if not names:
        raise ValueError(
            "`trajectories` have no metrics: give `train` and `predict` the argument "
            "`metrics`."
        )
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (3.4 * columns + 0.6, 2.5 * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for trajectory, style in zip(trajectories, styles, strict=True):
            if name in trajectory.metrics:
                times = np.asarray(trajectory.times)
                values = np.asarray(trajectory.metrics[name], float)
                values = values.reshape(times.size, -1)
                known = np.isfinite(values).all(axis=1)
                # Of the curves of one trajectory, the first names it.
                lines = axes.plot(times[known], values[known], **style)
                for line in lines[1:]:
                    line.set_label(None)
        _finish(axes, "")
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
    for axes in panels[len(names) :]:
        axes.remove()
    if labels is not None:
        found = dict(
            pair[::-1]
            for axes in figure.axes
            for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        )
        figure.legend(
            found.values(),
            found.keys(),
            loc="outside upper left",
            ncols=len(found),
            fontsize=8,
            frameon=False,
        )
    return figure


def _styles(
    trajectories: Sequence[Trajectory], labels: Sequence[str] | None
) -> list[dict[str, Any]]:
    """How to draw each, once all are trajectories and named: the later, the thinner, so
    that all are seen where they coincide."""
    if not trajectories:
        raise ValueError("`trajectories` must not be empty.")
    for i, trajectory in enumerate(trajectories):
        check_single(f"trajectories[{i}]", trajectory)
    named = isinstance(labels, Sequence) and len(labels) == len(trajectories)
    if labels is not None and not named:
        raise ValueError(
            f"`labels` must name all {len(trajectories)} trajectories, got {labels!r}."
        )
    colours = (_RUN, _PREDICTION, _STABLE, *_OTHERS)
    last = len(trajectories) - 1
    return [
        dict(
            color=colours[i % len(colours)],
            linewidth=min(0.9 + 0.55 * (last - i), 4.0),
            label=None if labels is None else labels[i],
        )
        for i in range(last + 1)
    ]


def _losses(
    axes: Axes,
    run: Trajectory,
    prediction: Trajectory,
    stable: Trajectory | None,
    window: int | None,
) -> None:
    times = np.asarray(run.times)
    if window is None:
        common = (times >= prediction.times[0]) & (times <= prediction.times[-1])
        window = default_window(int(common.sum()) - 1)
    average = time_average(np.asarray(run.loss), window)
    axes.plot(times, _positive(run.loss), color=_RUN, lw=0.7, alpha=0.4, label="run")
    axes.plot(
        times, _positive(average), color=_RUN, lw=2.5, alpha=0.7, label="run, averaged"
    )
    if stable is not None:
        _curve(axes, stable.times, _positive(stable.loss), _STABLE, "stable flow")
    _curve(
        axes,
        prediction.times,
        _positive(prediction.mean_loss),
        _PREDICTION,
        "prediction",
        linestyle=(0, (3, 1.2)),
    )
    _log(axes)


def _eigenvalues(axes: Axes, run: Trajectory, prediction: Trajectory) -> None:
    _modes(axes, prediction.times, prediction.sharpness, "-", "predicted")
    _modes(axes, run.times, run.sharpness, "o", "measured")
    critical = float(prediction.critical_sharpness)
    axes.axhline(
        critical, color="black", lw=0.8, ls=":", label=f"critical: {critical:g}"
    )


def _oscillations(axes: Axes, run: Trajectory, prediction: Trajectory) -> None:
    # Over the few steps of one measurement an oscillation keeps its direction: its
    # covariance has nearly rank one there, whatever the rank of the predicted average.
    # The sums can be held against each other, the single variances cannot.
    predicted, observed = (np.asarray(x.oscillation, float) for x in (prediction, run))
    total, observed = np.nansum(predicted, axis=1), np.nansum(observed, axis=1)
    # Three decades; the rest of a logarithmic axis would be round-off.
    floor = 1e-3 * float(np.max(total if np.any(total > 0) else observed))
    _modes(axes, prediction.times, _above(predicted, floor), "-", "predicted")
    for times, values, style, label in (
        (prediction.times, total, "-", "predicted sum"),
        (run.times, observed, "o", "measured sum"),
    ):
        rows = values > floor
        if np.any(rows):
            values = np.where(rows, values, np.nan)
            options = dict(color=_PREDICTION, lw=1.5, ms=3.5, mew=0, label=label)
            axes.plot(np.asarray(times), values, style, **options)
    _log(axes)
    if not axes.lines:
        axes.text(0.5, 0.5, "none", ha="center", fontsize=8, transform=axes.transAxes)
        axes.set_yticks([])


def _distances(
    axes: Axes, run: Trajectory, prediction: Trajectory, stable: Trajectory | None
) -> None:
    weights = np.asarray(run.weights, float)
    travelled = np.linalg.norm(weights - weights[0], axis=1)
    _curve(axes, run.weight_times, travelled, _GREY, "to their start")
    for other, colour, label in (
        (stable, _STABLE, "to stable flow"),
        (prediction, _PREDICTION, "to prediction"),
    ):
        if other is not None:
            times, i, j = np.intersect1d(
                run.weight_times, other.weight_times, return_indices=True
            )
            apart = np.linalg.norm(weights[i] - np.asarray(other.weights)[j], axis=1)
            _curve(axes, times, apart, colour, label)
    axes.set_ylim(bottom=0)


def _curve(
    axes: Axes,
    times: ArrayLike,
    values: ArrayLike,
    colour: str,
    label: str,
    **style: Any,
) -> None:
    marker = "o" if np.size(times) < 10 else ""
    style = dict(lw=1.5, marker=marker, ms=3, color=colour, label=label) | style
    axes.plot(np.asarray(times), np.asarray(values), **style)


def _modes(
    axes: Axes, times: ArrayLike, values: ArrayLike, style: str, label: str
) -> None:
    """A curve or dots for each eigenvalue that is known, the first the darkest."""
    times, values = np.asarray(times), np.asarray(values, float)
    for mode in range(values.shape[1]):
        rows = np.isfinite(values[:, mode])
        if np.any(rows):
            # A curve is broken where a value is missing; dots leave it out.
            rows = rows | (style == "-")
            colour = colormaps["viridis"](min(0.16 * mode, 0.9))
            options = dict(color=colour, label=label, lw=1.2, ms=3, mew=0)
            axes.plot(times[rows], values[rows, mode], style, **options)
            label = ""


def _above(values: ArrayLike, floor: float) -> Float[np.ndarray, "..."]:
    values = np.asarray(values, float)
    return np.where(np.isfinite(values) & (values > floor), values, np.nan)


def _positive(values: ArrayLike) -> Float[np.ndarray, "..."]:
    return _above(values, 0.0)


def _log(axes: Axes) -> None:
    """A logarithmic scale, if there is anything to show on it."""
    values = [np.asarray(line.get_ydata(), float) for line in axes.lines]
    if not any(np.any(np.isfinite(v)) for v in values):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 200 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, ylabel: str) -> None:
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _head(axes: Axes, title: str) -> None:
    """The title and below it, where it covers no data, the legend."""
    labelled = len(axes.get_legend_handles_labels()[0])
    axes.set_title(title, loc="left", fontsize=10, pad=20 if labelled else 6)
    if labelled:
        legend = axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=labelled,
            fontsize=8,
            frameon=False,
            borderaxespad=0.2,
            borderpad=0,
            handlelength=1.5,
            handletextpad=0.4,
            columnspacing=0.9,
        )
        # The title has made room for it.
        legend.set_in_layout(False)
