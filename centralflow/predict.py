"""The prediction of a run: a flow, integrated."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .checkpoint import Checkpoint, settings_of
from .checks import require_integer, require_positive
from .flows import AbstractFlow, CentralFlow
from .flows.base import FlowSolverState
from .flows.joints import joined
from .integrate import Problem, integrate, integrate_at_once, solver_state_of
from .objective import FlatObjective, Objective, is_traced
from .optimizers import AbstractOptimizer
from .running import (
    Clock,
    check_coordinates,
    check_metrics,
    check_start,
    check_times,
    show_progress,
    warn_if_unconverged,
)
from .sharding import Processes, sharded_like, spread_like
from .trajectory import Trajectory, finish


def predict(
    objective: Objective,
    model: PyTree,
    optimizer: AbstractOptimizer,
    steps: int,
    *,
    flow: AbstractFlow | None = None,
    optimizer_state: PyTree = None,
    solver_state: FlowSolverState | None = None,
    times: Iterable[Any] | None = None,
    metrics: dict[str, Callable] | None = None,
    coordinates: Iterable[Any] | None = None,
    weight_times: Iterable[Any] | None = None,
    rtol: float | None = None,
    progress: bool | None = None,
    max_steps: int | None = None,
    throw: bool = True,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
) -> Trajectory:
    """Predict a run of the optimizer without making its steps.

    **Arguments:**

    - `objective`, `model`, `optimizer`, `steps`, `optimizer_state`: as of
        [`centralflow.train`][].
    - `flow`: what to integrate: [`centralflow.CentralFlow`][], the default, or
        [`centralflow.StableFlow`][], [`centralflow.RodFlow`][],
        [`centralflow.EdgeFlow`][].
    - `solver_state`: that of an earlier prediction with the same objective, optimizer
        and flow, to go on from where it ended instead of from `model` and
        `optimizer_state`. Times and `steps` are counted from there.
    - `times`: the times to report, increasing, in optimizer steps, within
        [0, `steps`]; by default 0, 1, ..., `steps`. (Each long step of the central flow
        tells how what oscillations add went on from the one before; that is reported
        if a time in both is.)
    - `metrics`: functions h of the model, by name. The central flow reports their
        predicted time-averages `E[h] = h + <hess h, Sigma> / 2`.
    - `coordinates`: indices of the flat weights, of `objective.flatten`, at which to
        report the predicted time-average of the squared gradient and the step size 1/P.
    - `weight_times`: times at which to keep the weights, besides 0 and `steps`.
    - `rtol`: the relative tolerance of flows with an adaptive step size.
    - `progress`: show a progress bar; by default if the session is interactive.
    - `max_steps`: the most steps of the flow, rejected ones too, after which the
        prediction ends with `max_steps_reached`. By default as many as it takes: each
        step has a least length, and there are but a few rejected ones to each.
    - `throw`: raise [`centralflow.NumericalFailure`][] if the integration fails.
        Otherwise the trajectory up to there is returned, and its `result` says so.
    - `checkpoint`, `checkpoint_every`: as of [`centralflow.train`][]. The file is
        written at the end of the step of the flow that gets there: no step is cut for
        it, and the numbers do not depend on it.

    **Returns:**

    A [`centralflow.Trajectory`][]. On Ctrl-C too, with a warning, as of
    [`centralflow.train`][]: `weight_times[-1]` is how far it came. Under `jax.jit` and
    `jax.vmap` nothing can be raised, warned of, or enlarged: look at `result`, and give
    `CentralFlow` a `block_size` that suffices.

    **Raises:**

    `ValueError` for arguments that make no sense; [`centralflow.NumericalFailure`][];
    `OSError` if the checkpoint cannot be written.
    A warning if the sharpness is above critical, by more than 2 %, at the start.
    """
    flow = CentralFlow() if flow is None else flow
    if not isinstance(flow, AbstractFlow):
        raise ValueError(
            f"`flow` must be a flow such as `CentralFlow()`, got {flow!r}."
        )
    if rtol is not None:
        require_positive("rtol", rtol, 1)
    if max_steps is not None:
        require_integer("max_steps", max_steps)
    flat, weights, optimizer_state = check_start(
        objective, model, optimizer, steps, optimizer_state
    )
    metrics = check_metrics(metrics, flat, weights)
    coordinates = jnp.asarray(check_coordinates(coordinates, weights.size))
    times = check_times("times", range(steps + 1) if times is None else times, steps)
    kept = (
        [] if weight_times is None else check_times("weight_times", weight_times, steps)
    )
    kept = np.unique([0, *kept, steps])
    traced = is_traced((flat, weights, optimizer, optimizer_state))
    if solver_state is not None:
        _check_solver_state(solver_state, weights, optimizer_state)
        _check_observables(solver_state, flat, weights, metrics, coordinates)
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
            function="predict",
            flow=flow,
            solver_state=solver_state,
            metrics=list(metrics),
            coordinates=coordinates,
            times=times,
            weight_times=kept,
            rtol=rtol,
            max_steps=max_steps,
        ),
    )
    as_times = lambda x: jnp.asarray(x, weights.dtype)
    rtol = flow.tolerance(rtol)
    rtol = None if rtol is None else as_times(rtol)
    if solver_state is not None:
        flow = flow.large_enough(solver_state.solver)
    problem = Problem(flow, flat, optimizer, metrics, coordinates, rtol)
    # The end is always among the times, so that there is one.
    reported = as_times(np.union1d(times, [steps])), as_times(kept)
    start, end, clock = (
        (weights, optimizer_state, solver_state),
        as_times(steps),
        Clock(),
    )
    if traced:
        now, series, snapshots, failure = integrate_at_once(
            problem, *start, end, *reported, max_steps
        )
    else:
        show = show_progress(progress)
        now, series, snapshots, failure = integrate(
            problem, *start, end, *reported, max_steps, file, clock, show
        )
    series = jax.tree.map(lambda x: x[: times.size], joined(series))
    series_times = series.pop("t")
    work = now.earlier + now.work
    if not traced and not failure.failed:
        warn_if_unconverged(work.unconverged)
    unknown = jnp.full((series_times.size, 1), jnp.nan, weights.dtype)
    trajectory = Trajectory(
        times=series_times,
        loss=series["loss"],
        mean_loss=series["mean_loss"],
        grad_norm_sq=series["grad_norm_sq"],
        mean_grad_norm_sq=series["mean_grad_norm_sq"],
        sharpness=series.get("sharpness", unknown),
        oscillation=series.get("oscillation", unknown),
        metrics=series["metrics"],
        weight_times=snapshots["t"],
        weights=spread_like(now.y.weights, snapshots["weights"]),
        model=sharded_like(flat.model(now.y.weights), model),
        optimizer_state=jax.tree.map(
            lambda before, here: jnp.where(failure.failed, here, before),
            now.before,
            now.y.optimizer_state,
        ),
        critical_sharpness=optimizer.critical_sharpness,
        result=failure.result,
        coordinates=coordinates,
        gradient_sq=series.get("gradient_sq"),
        step_sizes=series.get("step_sizes"),
        trace_covariance=series.get("trace_covariance"),
        failure_time=failure.time,
        failure_value=failure.value,
        solver_state=solver_state_of(problem, now),
        stats=dict(
            gradients=_whole(work.gradients) + 1,  # for the optimizer's initial state
            hvps=_whole(work.hvps),
            third_derivatives=_whole(work.third_derivatives),
            unconverged=_whole(work.unconverged),
            eigen_residual=work.eigen_residual,
            accepted_steps=now.accepted,
            rejected_steps=now.rejected,
            seconds=clock.seconds,
            compile_seconds=clock.compile_seconds,
        ),
    )
    return trajectory if traced else finish(trajectory, optimizer, throw)


def _whole(count: Float[Array, ""]) -> Int[Array, ""]:
    return jnp.round(count).astype(jnp.int32)


def _check_solver_state(
    solver_state: Any, weights: Array, optimizer_state: PyTree
) -> None:
    if not isinstance(solver_state, FlowSolverState):
        raise ValueError(
            "`solver_state` must be that of an earlier prediction, got "
            f"{type(solver_state).__name__}."
        )
    y, shapes = solver_state.y, lambda *x: jax.tree.map(lambda x: (x.shape, x.dtype), x)
    found, wanted = (
        shapes(y.weights, y.optimizer_state),
        shapes(weights, optimizer_state),
    )
    if found != wanted:
        raise ValueError(
            "`solver_state` does not belong to this model and optimizer: it has "
            f"weights and optimizer state of shapes {found}, not {wanted}."
        )


def _check_observables(
    solver_state: FlowSolverState,
    flat: FlatObjective,
    weights: Array,
    metrics: dict[str, Callable],
    coordinates: Array,
) -> None:
    if not solver_state.y.observables:
        return
    shapes = lambda tree: {k: x.shape for k, x in tree.items()}
    known = solver_state.y.observables["smooth"]
    found = shapes(known["metrics"]), known["gradient_sq"].shape
    wanted = (
        shapes(eqx.filter_eval_shape(flat.evaluate, metrics, weights)),
        coordinates.shape,
    )
    if found != wanted:
        raise ValueError(
            "`solver_state` must be that of a prediction with the same `metrics` and "
            f"as many `coordinates`: it has {found}, not {wanted}."
        )
