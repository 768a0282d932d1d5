"""A prediction held against the run: time averages, errors, a table."""

import dataclasses

import numpy as np
from jaxtyping import Float

from .checks import require_integer
from .sharding import on_host
from .trajectory import Trajectory, check_comparable


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How well a flow predicted a run, over the steps that both cover. All errors are
    fractions; NaN where there was nothing to compare.

    **Attributes:**

    - `loss_error`, `max_loss_error`: mean and maximum over time of
        |time-averaged run loss - predicted mean loss| / time-averaged run loss.
    - `grad_norm_error`: of the squared norm of the gradient, the mean over time of the
        error of its time-average, over its mean. (It may be nearly zero for a while.)
    - `sharpness_error`: mean over the measurements of the relative error of the largest
        eigenvalue.
    - `oscillation_error`: mean over the measurements of the error of the summed
        oscillation variances, over their mean.
    - `gradient_sq_error`: of the squared gradient at the recorded coordinates, the mean
        over time of the error of its time-average, over its own mean; then the mean
        over the coordinates.
    - `step_size_error`: the mean of the relative error of the effective step sizes 1/P
        at the recorded coordinates.
    - `trace_error`: of the trace of the oscillation covariance, the mean over time of
        the error of its time-average, over its mean.
    - `weight_distance`: distance between the final weights over the distance that the
        run travelled.
    - `window`: the width in steps of the averaging kernel.
    - `steps`: the number of optimizer steps compared.
    - `work_ratio`: gradient-equivalents of the prediction over gradients of the run.
    - `seconds_ratio`: wall time of the prediction over that of the run, compilation
        apart, if the run made no measurements.
    """

    loss_error: float
    max_loss_error: float
    grad_norm_error: float
    sharpness_error: float
    oscillation_error: float
    gradient_sq_error: float
    step_size_error: float
    trace_error: float
    weight_distance: float
    window: int
    steps: int
    work_ratio: float
    seconds_ratio: float

    def __str__(self) -> str:
        percent = lambda x: "not measured" if np.isnan(x) else f"{100 * x:.3g} %"
        rows = [
            ("loss error, mean", percent(self.loss_error)),
            ("loss error, largest", percent(self.max_loss_error)),
            ("squared gradient norm error, mean", percent(self.grad_norm_error)),
            ("top eigenvalue error, mean", percent(self.sharpness_error)),
            ("oscillation variance error, mean", percent(self.oscillation_error)),
            ("trace of covariance error, mean", percent(self.trace_error)),
            ("weight distance / distance travelled", percent(self.weight_distance)),
            ("work, prediction / run", f"{self.work_ratio:.3g}"),
        ]
        if not np.isnan(self.step_size_error):
            rows += [
                ("squared gradients error, mean", percent(self.gradient_sq_error)),
                ("effective step sizes error, mean", percent(self.step_size_error)),
            ]
        if not np.isnan(self.seconds_ratio):
            rows.append(("time, prediction / run", f"{self.seconds_ratio:.3g}"))
        width = max(len(name) for name, _ in rows)
        title = f"prediction against run, {self.steps} steps, window {self.window}"
        return "\n".join([title, *(f"  {name:<{width}}  {v:>12}" for name, v in rows)])


def compare(
    run: Trajectory, prediction: Trajectory, *, window: int | None = None
) -> Comparison:
    """Compare a prediction with the time-average of the run.

    Both sides are averaged with the same kernel, [`centralflow.time_average`][], so
    that averaging a curved loss is no error. A prediction that was reported at other
    times is interpolated, losses and gradient norms on a logarithmic scale.

    **Arguments:**

    - `run`: from [`centralflow.train`][]; or another prediction.
    - `prediction`: from [`centralflow.predict`][], of the same problem.
    - `window`: the width of the kernel in optimizer steps; by default a tenth of the
        run, but at least 2 and at most 50.

    **Returns:**

    A [`centralflow.Comparison`][].

    **Raises:**

    `ValueError` if one is a batch, if the two have less than three steps in common,
    different numbers of parameters, or recorded coordinates, or if the run was not
    reported at whole steps.
    """
    check_comparable(run=run, prediction=prediction)
    times = np.asarray(run.times, float)
    if np.any(times != np.round(times)):
        raise ValueError(
            "`run` must be reported at whole steps, as `train` does it, got times "
            f"{times[0]:g}, {times[1]:g}, ..., {times[-1]:g}."
        )
    low, high = float(prediction.times[0]), float(prediction.times[-1])
    common = (times >= low) & (times <= high)
    steps = int(common.sum()) - 1
    if steps < 2:
        raise ValueError(
            f"`run` covers steps {times[0]:g} to {times[-1]:g} and `prediction` "
            f"{low:g} to {high:g}: they have fewer than three steps in common."
        )
    window = default_window(steps) if window is None else window
    require_integer("window", window)
    asked = [x.coordinates for x in (run, prediction)]
    if all(np.size(x) and x is not None for x in asked) and not np.array_equal(*asked):
        raise ValueError(
            "`run` and `prediction` have recorded different `coordinates`: "
            f"{np.asarray(asked[0])} and {np.asarray(asked[1])}."
        )

    def relative_errors(series):
        observed = time_average(np.asarray(getattr(run, series), float)[common], window)
        predicted = at(prediction, series, times[common])
        predicted = time_average(predicted, window)
        # The ends are single samples of the oscillation, not averages.
        return _relative(predicted, observed)[1:-1]

    def averages(series):
        """Time-averages of the run and of the prediction, one row to a coordinate."""
        # The trace of a run is not known at its first step.
        rows = common & (times > 0)
        pair = (getattr(run, series), getattr(prediction, series))
        if any(x is None or np.size(x) == 0 for x in pair) or rows.sum() < 3:
            return np.full((2, 0, 1), np.nan)
        both = (np.asarray(pair[0], float)[rows], at(prediction, series, times[rows]))
        columns = [np.reshape(x, (rows.sum(), -1)).T for x in both]
        means = np.stack([[time_average(c, window) for c in x] for x in columns])
        return means[..., 1:-1]

    def share(series):
        observed, predicted = averages(series)
        errors = np.mean(np.abs(predicted - observed), axis=1)
        means = np.mean(np.abs(observed), axis=1)
        return _mean(errors[means > 0] / means[means > 0])

    loss_errors = relative_errors("mean_loss")
    measured = np.isfinite(np.asarray(run.sharpness)[:, 0]) & common
    sharpness = np.asarray(run.sharpness, float)[measured, 0]
    predicted_sharpness = at(prediction, "sharpness", times[measured])[:, 0]
    observed, predicted = variances(run, prediction)
    return Comparison(
        loss_error=_mean(loss_errors),
        max_loss_error=float(np.max(loss_errors, initial=-np.inf)),
        grad_norm_error=share("mean_grad_norm_sq"),
        sharpness_error=_mean(_relative(predicted_sharpness, sharpness)),
        oscillation_error=_ratio(
            _mean(np.abs(predicted.sum(1) - observed.sum(1))), _mean(observed.sum(1))
        ),
        gradient_sq_error=share("gradient_sq"),
        step_size_error=_mean(_relative(*averages("step_sizes")[::-1])),
        trace_error=share("trace_covariance"),
        weight_distance=_weight_distance(run, prediction),
        window=int(window),
        steps=steps,
        work_ratio=_ratio(prediction.gradient_equivalents, run.stats["gradients"]),
        seconds_ratio=(
            _ratio(prediction.stats["seconds"], run.stats["seconds"])
            if run.stats["hvps"] == 0
            else float("nan")
        ),
    )


def default_window(steps: int) -> int:
    """The width of the averaging kernel for a run of so many steps."""
    return int(np.clip(steps // 10, 2, 50))


def time_average(
    values: Float[np.ndarray, " T"], window: int
) -> Float[np.ndarray, " T"]:
    """The centred time-average of a series, one value for each optimizer step.

    The weights at distance j are those of a Hann window, 1 + cos(pi j / (h + 1)) for
    |j| <= h, normalized. Such a window removes an oscillation of period two exactly
    for every h >= 1 and leaves straight lines as they are. h is `window // 2` and, near
    the ends, the distance to the end: the window stays centred there, where cutting one
    side off would shift the average in time. The two end values are not averaged.

    **Arguments:**

    - `values`: `[T]`, at consecutive steps.
    - `window`: the width in steps.

    **Returns:**

    `[T]`.

    **Raises:**

    `ValueError` for arguments that make no sense.
    """
    require_integer("window", window)
    message = "`values` must be a series of numbers [T], got "
    try:
        values = np.asarray(values, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{message}{values!r}.") from error
    if values.ndim != 1:
        raise ValueError(f"{message}an array of shape {values.shape}.")
    T, full = values.size, min(window // 2, (values.size - 1) // 2)
    average = values.copy()
    for h in range(1, full + 1):
        j = np.arange(-h, h + 1)
        weights = 1 + np.cos(np.pi * j / (h + 1))
        weights /= weights.sum()
        if h < full:
            average[h] = weights @ values[: 2 * h + 1]
            average[T - 1 - h] = weights @ values[T - 1 - 2 * h :]
        else:
            average[h : T - h] = np.convolve(values, weights, "valid")
    return average


def at(
    trajectory: Trajectory, series: str, times: Float[np.ndarray, " S"]
) -> Float[np.ndarray, "S ..."]:
    """A series of a trajectory at other times: interpolated linearly, and losses and
    gradient norms linearly in their logarithm where they are positive."""
    known = np.asarray(trajectory.times, float)
    values = np.asarray(getattr(trajectory, series), float)
    if values.ndim == 2:
        columns = [np.interp(times, known, column) for column in values.T]
        return np.stack(columns, axis=1)
    if np.all(values > 0):
        return np.exp(np.interp(times, known, np.log(values)))
    return np.interp(times, known, values)


def variances(
    run: Trajectory, prediction: Trajectory
) -> tuple[Float[np.ndarray, "M k"], Float[np.ndarray, "M K"]]:
    """The oscillation variances that the run's measurements found, each an average over
    the steps since the one before, and the same averages of the prediction. If the run
    is a prediction itself, they are those at its times."""
    observed = np.asarray(run.oscillation, float)
    rows = np.flatnonzero(np.isfinite(observed[:, 0]))
    times = np.asarray(run.times, float)
    none = np.full((0, 1), np.nan)
    if rows.size == 0:
        return none, none
    # The first average of a run covers the steps since the start.
    every = max(int(rows[0]), 1)
    covered = times[rows] <= float(prediction.times[-1])
    covered &= times[rows - every + 1] >= float(prediction.times[0])
    rows = rows[covered]
    if rows.size == 0:
        return none, none
    predicted = np.stack(
        [
            at(prediction, "oscillation", times[r - every + 1 : r + 1]).mean(0)
            for r in rows
        ]
    )
    return observed[rows], predicted


def _weight_distance(run: Trajectory, prediction: Trajectory) -> float:
    if float(run.weight_times[-1]) != float(prediction.weight_times[-1]):
        return float("nan")
    w0, w1, w = (
        on_host(x).astype(float)
        for x in (run.weights[0], run.weights[-1], prediction.weights[-1])
    )
    return _ratio(np.linalg.norm(w1 - w), np.linalg.norm(w1 - w0))


def _relative(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Relative errors, where there is something to be relative to."""
    compared = np.isfinite(observed) & (observed != 0)
    return np.abs(predicted - observed)[compared] / np.abs(observed)[compared]


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if values.size else float("nan")


def _ratio(a, b) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(float(a), float(b)))
