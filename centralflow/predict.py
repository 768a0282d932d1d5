"""The prediction of a run: a flow, integrated."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .checks import require_positive
from .failures import LOSSES, Failure, explain, leading_finite
from .flows import AbstractFlow, CentralFlow, FlowState
from .flows.base import FlowSolverState, Work
from .objective import FlatObjective, Objective, is_traced
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
from .sharding import is_first_process, sharded_like
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
        [0, `steps`]; by default 0, 1, ..., `steps`.
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

    **Returns:**

    A [`centralflow.Trajectory`][]. Under `jax.jit` and `jax.vmap` nothing can be
    raised, warned of, or enlarged: look at `result`, and give `CentralFlow` a
    `block_size` that suffices.

    **Raises:**

    `ValueError` for arguments that make no sense; [`centralflow.NumericalFailure`][].
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
    show = show_progress(progress) and not traced and jax.process_count() == 1
    meter = diffrax.TqdmProgressMeter() if show else diffrax.NoProgressMeter()

    clock, as_times = Clock(), lambda x: jnp.asarray(x, weights.dtype)
    rtol = flow.tolerance(rtol)
    rtol = None if rtol is None else as_times(rtol)
    previous, parts, reached = solver_state, [], -1.0
    if previous is not None:
        _check_solver_state(previous, weights, optimizer_state)
        _check_observables(previous, flat, weights, metrics, coordinates)
        flow = flow.large_enough(previous.solver)
    while True:
        problem = _Problem(flow, flat, optimizer, metrics, coordinates, rtol)
        if previous is None:
            y = clock(_first, problem, weights, optimizer_state)
            if not traced:
                flow.check(optimizer, y)
            state = clock(_start, problem, y, None)
            if not traced:
                _warn_if_unstable(state.y, optimizer)
        else:
            state = clock(_start, problem, previous.y, previous)
        part = clock(
            _integrate,
            problem,
            state,
            as_times(max(reached, 0.0)),
            as_times(steps),
            # The end is always among the times, so that there is one.
            as_times(np.union1d(times[times > reached], [steps])),
            as_times(kept[kept > reached]),
            meter,
            max_steps,
        )
        parts.append(part)
        previous = part.state
        if traced or part.failure.result != RESULTS.block_full:
            break
        # More eigenvalues became critical than the block can hold: go on with a larger
        # one, whose shapes need a new program.
        reached, flow = float(part.time), flow.enlarge()
        if max_steps is not None:
            max_steps = max(max_steps - int(part.accepted + part.rejected), 1)

    failure = parts[-1].failure
    work = sum((part.work for part in parts[1:]), parts[0].work)
    series, snapshots = _join(parts, traced)
    series = jax.tree.map(lambda x: x[: times.size], series)
    series_times = series.pop("t")
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
        weights=snapshots["weights"],
        model=sharded_like(flat.model(previous.y.weights), model),
        optimizer_state=parts[-1].optimizer_state,
        critical_sharpness=optimizer.critical_sharpness,
        result=failure.result,
        coordinates=coordinates,
        gradient_sq=series.get("gradient_sq"),
        step_sizes=series.get("step_sizes"),
        trace_covariance=series.get("trace_covariance"),
        failure_time=failure.time,
        failure_value=failure.value,
        solver_state=previous,
        stats=dict(
            gradients=_whole(work.gradients) + 1,  # for the optimizer's initial state
            hvps=_whole(work.hvps),
            third_derivatives=_whole(work.third_derivatives),
            unconverged=_whole(work.unconverged),
            eigen_residual=work.eigen_residual,
            accepted_steps=sum(part.accepted for part in parts),
            rejected_steps=sum(part.rejected for part in parts),
            seconds=clock.seconds,
            compile_seconds=clock.compile_seconds,
        ),
    )
    return trajectory if traced else finish(trajectory, optimizer, throw)


class _Problem(eqx.Module):
    flow: AbstractFlow
    objective: FlatObjective
    optimizer: AbstractOptimizer
    metrics: dict[str, Callable]
    coordinates: Int[Array, " C"]
    rtol: Float[Array, ""] | None

    def term(self) -> diffrax.AbstractTerm:
        return self.flow.term(
            self.objective, self.optimizer, self.metrics, self.coordinates, self.rtol
        )


class _Part(eqx.Module):
    """A stretch of an integration with one size of block."""

    series: dict[str, PyTree[Array]]
    snapshots: dict[str, Array]
    start: dict[str, PyTree[Array]]  # one row of each
    first: dict[str, Array]
    state: FlowSolverState
    optimizer_state: PyTree[Array]  # before the gradient at the end
    time: Float[Array, ""]
    failure: Failure
    work: Work
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]


@eqx.filter_jit
def _first(problem: _Problem, weights: Array, optimizer_state: PyTree) -> FlowState:
    objective, optimizer = problem.objective, problem.optimizer
    return problem.flow.first(objective, optimizer, weights, optimizer_state)


@eqx.filter_jit
def _start(
    problem: _Problem, y: FlowState, previous: FlowSolverState | None
) -> FlowSolverState:
    solver, dt = (None, None) if previous is None else (previous.solver, previous.dt)
    return FlowSolverState(*problem.flow.start(problem.term(), y, solver), dt)


@eqx.filter_jit
def _integrate(
    problem: _Problem,
    state: FlowSolverState,
    t0: Array,
    t1: Array,
    times: Float[Array, " T"],
    kept: Float[Array, " S"],
    meter: diffrax.AbstractProgressMeter,
    max_steps: int | None,
) -> _Part:
    flow, term = problem.flow, problem.term()
    controller, dt0 = flow.stepsize(problem.rtol)
    # What the discrete optimizer has before it takes in its gradient at t1, a flow that
    # takes it in has at t1 - 1.
    before = jnp.maximum(t1 - flow.delay, t0)[None]
    observe = lambda t, y, args: dict(t=t, **flow.observe(term, t, y))
    snapshot = lambda t, y, args: dict(t=t, weights=y.weights)
    solution = diffrax.diffeqsolve(
        term,
        flow.solver(),
        t0,
        t1,
        dt0 if state.dt is None else state.dt,
        state.y,
        solver_state=state.solver,
        saveat=diffrax.SaveAt(
            subs=dict(
                series=diffrax.SubSaveAt(ts=times, fn=observe),
                snapshots=diffrax.SubSaveAt(ts=kept, fn=snapshot),
                start=diffrax.SubSaveAt(t0=True, fn=observe),
                first=diffrax.SubSaveAt(t0=True, fn=snapshot),
                before=diffrax.SubSaveAt(
                    ts=before, fn=lambda t, y, args: y.optimizer_state
                ),
                end=diffrax.SubSaveAt(t1=True, fn=lambda t, y, args: (t, y)),
            ),
            solver_state=True,
            controller_state=True,
        ),
        stepsize_controller=controller,
        event=flow.event(),
        adjoint=diffrax.ForwardMode(),
        max_steps=max_steps,
        throw=False,
        progress_meter=meter,
    )
    time, y = jax.tree.map(lambda x: x[0], solution.ys["end"])
    failure = explain(
        flow.failure(solution),
        problem.objective,
        term,
        state.y,
        t1,
        solution,
        max_steps,
    )
    optimizer_state = jax.tree.map(
        lambda before, end: jnp.where(failure.failed, end, before[0]),
        solution.ys["before"],
        y.optimizer_state,
    )
    return _Part(
        series=solution.ys["series"],
        snapshots=solution.ys["snapshots"],
        start=solution.ys["start"],
        first=solution.ys["first"],
        state=FlowSolverState(y, solution.solver_state, flow.proposed_step(solution)),
        optimizer_state=optimizer_state,
        time=time,
        failure=failure,
        work=flow.work(state.solver, solution, times.size),
        accepted=solution.stats["num_accepted_steps"],
        rejected=solution.stats["num_rejected_steps"],
    )


def _join(parts: list[_Part], traced: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The series and the snapshots of all parts, one after another."""
    series, snapshots = [p.series for p in parts], [p.snapshots for p in parts]
    if not traced:
        # What a part did not reach is infinite or NaN, and comes last.
        series = [_leading(s, [s[name] for name in LOSSES]) for s in series]
        snapshots = [_leading(s, [s["weights"]]) for s in snapshots]
        if len(series[0]["t"]) == 0:  # not a single step could be made
            series[0], snapshots[0] = parts[0].start, parts[0].first
    if len(parts) > 1:  # the last has the largest block
        width = series[-1]["sharpness"].shape[1]
        for s in series:
            s["sharpness"] = _pad(s["sharpness"], width, jnp.nan)
            s["oscillation"] = _pad(s["oscillation"], width, 0.0)
    concatenate = lambda trees: jax.tree.map(lambda *x: jnp.concatenate(x), *trees)
    return concatenate(series), concatenate(snapshots)


def _whole(count: Float[Array, ""]) -> Int[Array, ""]:
    return jnp.round(count).astype(jnp.int32)


def _leading(tree: dict[str, Any], finite: list[Array]) -> dict[str, Any]:
    rows = leading_finite(*finite)
    return jax.tree.map(lambda x: x[:rows], tree)


def _pad(x: Float[Array, "T k"], width: int, value: float) -> Float[Array, "T K"]:
    return jnp.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)


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


def _warn_if_unstable(y: FlowState, optimizer: AbstractOptimizer) -> None:
    if not y.observables:
        return
    sharpness = float(y.observables["smooth"]["sharpness"][0])
    critical = float(optimizer.critical_sharpness)
    # An iterate at the edge is a little above it or below.
    if sharpness > 1.02 * critical and is_first_process():
        warnings.warn(
            f"The sharpness at the start, {sharpness:.4g}, is above the critical "
            f"{critical:.4g}: the optimizer itself is unstable there, and no central "
            "flow describes its first steps. Make a few steps with "
            "`warm = train(...)` and predict from `warm.model` and "
            "`warm.optimizer_state`, or lower the learning rate.",
            stacklevel=3,
        )
