"""The discrete optimizer, run and recorded."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .checkpoint import Checkpoint, settings_of
from .checks import require_integer
from .failures import or_divergence, or_nothing
from .iterate import Settings, advance, init, run
from .objective import Objective, is_traced
from .optimizers import AbstractOptimizer
from .results import RESULTS
from .running import (
    Clock,
    check_coordinates,
    check_metrics,
    check_start,
    check_times,
    show_progress,
    warn_if_unconverged,
)
from .sharding import Processes, sharded_like
from .trajectory import Trajectory, finish


def train(
    objective: Objective,
    model: PyTree,
    optimizer: AbstractOptimizer,
    steps: int,
    *,
    optimizer_state: PyTree = None,
    sharpness_every: int | None = None,
    sharpness_count: int = 1,
    metrics: dict[str, Callable] | None = None,
    coordinates: Iterable[Any] | None = None,
    weight_times: Iterable[Any] | None = None,
    progress: bool | None = None,
    throw: bool = True,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
) -> Trajectory:
    """Run the optimizer on the full data set.

    **Arguments:**

    - `objective`: the loss, a [`centralflow.Objective`][].
    - `model`: any PyTree; its inexact-array leaves are trained.
    - `optimizer`: a [`centralflow.AbstractOptimizer`][].
    - `steps`: how many steps to make.
    - `optimizer_state`: where to start from; by default `optimizer.init`.
    - `sharpness_every`: measure the top eigenvalues of P^-1 H, at the second-order
        midpoints, and the variances of the oscillation, every so many steps. An even
        number of ten or more averages the variances well. By default never.
    - `sharpness_count`: how many eigenvalues.
    - `metrics`: functions of the model to record at every step, by name.
    - `coordinates`: indices of the flat weights, of `objective.flatten`, at which to
        record the squared gradient and the step size 1/P at every step.
    - `weight_times`: integer times at which to keep the weights, besides 0 and `steps`.
    - `progress`: show a progress bar; by default if the session is interactive.
    - `throw`: raise [`centralflow.NumericalFailure`][] if the run fails, for having
        diverged or because a measurement is not finite. Otherwise the trajectory up to
        there is returned, and its `result` says so.
    - `checkpoint`: the path of a file from which the same call goes on if the process
        that made it has ended, to the same numbers. A finished run is read from it. The
        file is replaced as a whole, and refused if it is that of another run.
    - `checkpoint_every`: write it every so many steps; by default every half minute.

    **Returns:**

    A [`centralflow.Trajectory`][] with `times` 0, 1, ..., `steps`. On Ctrl-C it is
    returned too, up to there, with the `result` `interrupted` and the warning
    [`centralflow.RunInterrupted`][], whatever `throw` is; only before the first step is
    the `KeyboardInterrupt` raised.

    **Raises:**

    `ValueError` for arguments that make no sense; [`centralflow.NumericalFailure`][];
    `OSError` if the checkpoint cannot be written.
    """
    flat, weights, optimizer_state = check_start(
        objective, model, optimizer, steps, optimizer_state
    )
    metrics = check_metrics(metrics, flat, weights)
    coordinates = jnp.asarray(check_coordinates(coordinates, weights.size))
    require_integer("sharpness_count", sharpness_count)
    if sharpness_every is not None:
        require_integer("sharpness_every", sharpness_every)
    kept = (
        [] if weight_times is None else check_times("weight_times", weight_times, steps)
    )
    kept = np.unique([0, *kept, steps])
    if np.any(kept != np.round(kept)):
        raise ValueError(f"`weight_times` must be integers for `train`, got {kept}.")

    settings = Settings(
        flat,
        optimizer,
        metrics,
        coordinates,
        int(steps),
        sharpness_every,
        int(sharpness_count),
    )
    traced = is_traced((flat, weights, optimizer, optimizer_state))
    file = Checkpoint(
        checkpoint,
        checkpoint_every,
        traced,
        Processes((flat, weights, optimizer, optimizer_state)),
        lambda: settings_of(
            flat,
            weights,
            optimizer,
            optimizer_state,
            steps,
            function="train",
            sharpness_every=sharpness_every,
            sharpness_count=sharpness_count,
            metrics=list(metrics),
            coordinates=coordinates,
            weight_times=kept,
        ),
    )
    clock, kept = Clock(), jnp.asarray(kept, jnp.int32)
    state = clock(init, settings, weights, optimizer_state, kept.size)
    if traced:
        state, interrupted = (
            advance(settings, state, kept, jnp.int32(steps + 1)),
            False,
        )
    else:
        show = show_progress(progress)
        state, interrupted = run(settings, state, kept, file, clock, show)

    end, kept_end = steps + 1, kept.size
    if not traced and (state.failure.failed or interrupted):
        end = max(int(state.step), 1)
        kept_end = int(np.sum(np.asarray(kept) < end))
    kept, kept_weights = kept[:kept_end], state.kept[:kept_end]
    if interrupted and kept[-1] != end - 1:
        kept = jnp.append(kept, end - 1)
        kept_weights = jnp.vstack([kept_weights, state.previous])
    series = jax.tree.map(lambda x: x[:end], state.series)
    dtype = series["loss"].dtype
    last = jax.tree.map(
        lambda a, b: jnp.where(state.broken | interrupted, a, b),
        (state.previous, state.previous_state),
        (state.weights, state.optimizer_state),
    )
    if not traced and not state.failure.failed:
        warn_if_unconverged(state.unconverged)
    losses = state.series["loss"]
    failure = or_divergence(state.failure, losses[0], losses[state.step - 1])
    failure = or_nothing(failure)
    trajectory = Trajectory(
        times=jnp.arange(end, dtype=dtype),
        loss=series["loss"],
        mean_loss=series["loss"],
        grad_norm_sq=series["grad_norm_sq"],
        mean_grad_norm_sq=series["grad_norm_sq"],
        sharpness=_at_measurements(state.sharpness, sharpness_every, steps)[:end],
        oscillation=_at_measurements(state.oscillation, sharpness_every, steps)[:end],
        metrics=series["metrics"],
        weight_times=kept.astype(dtype),
        weights=kept_weights,
        model=sharded_like(flat.model(last[0]), model),
        optimizer_state=last[1],
        critical_sharpness=optimizer.critical_sharpness,
        result=RESULTS.interrupted if interrupted else failure.result,
        coordinates=coordinates,
        gradient_sq=series["gradient_sq"],
        step_sizes=series["step_sizes"],
        trace_covariance=series["trace_covariance"],
        failure_time=failure.time,
        failure_value=failure.value,
        stats=dict(
            gradients=state.step + state.broken,
            hvps=state.hvps,
            third_derivatives=0,
            unconverged=state.unconverged,
            accepted_steps=state.step - ~state.broken,
            rejected_steps=0,
            seconds=clock.seconds,
            compile_seconds=clock.compile_seconds,
        ),
    )
    return trajectory if traced else finish(trajectory, optimizer, throw)


def _at_measurements(
    measured: Float[Array, "M K"], every: int | None, steps: int
) -> Float[Array, "T K"]:
    """A row for each step, NaN where nothing was measured."""
    series = jnp.full((steps + 1, measured.shape[1]), jnp.nan, measured.dtype)
    return series if every is None else series.at[::every].set(measured)
