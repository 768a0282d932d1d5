"""The integration of a flow, in stretches that one program makes, as if it were one."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from tqdm.auto import tqdm

from .checkpoint import Checkpoint
from .failures import LOSSES, Failure, choose, explain, leading_finite, no_failure, when
from .flows import AbstractFlow, FlowState
from .flows.base import FlowSolverState, Work
from .objective import FlatObjective
from .optimizers import AbstractOptimizer
from .results import RESULTS, name_of, result_of
from .running import Clock, Pace
from .sharding import is_first_process, on_host, spread_like
from .solvers import Pause, PausingController, PausingState

_NO_LIMIT = 2**31 - 1  # steps

Rows = dict[str, PyTree[Array | np.ndarray]]  # series, or weights, by `t`


class Problem(eqx.Module):
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

    def controller(self) -> PausingController:
        return PausingController(self.flow.stepsize(self.rtol)[0])


class Progress(eqx.Module):
    """Where an integration is: all that its next step depends on, and the work."""

    time: Float[Array, ""]
    y: FlowState
    solver: Any
    controller: PausingState
    before: PyTree[Array]  # the optimizer state one step before the end, once there
    first_loss: Float[Array, ""]  # whose growth is called divergence
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]
    reports: Int[Array, ""]
    # With each size of block the solver begins anew, and so does its account.
    begun: Any  # the scalars of its state then
    work: Work  # since then
    earlier: Work


def integrate(
    problem: Problem,
    weights: Float[Array, " n"],
    optimizer_state: PyTree,
    solver_state: FlowSolverState | None,
    end: Float[Array, ""],
    times: Float[Array, " T"],
    kept: Float[Array, " S"],
    max_steps: int | None,
    file: Checkpoint,
    clock: Clock,
    show: bool,
) -> tuple[Progress, Rows, Rows, Failure]:
    """Integrate to the end, from where the file is, if there is one.

    **Returns:**

    Where it ended; series at `times` and weights at `kept`, as far as it came; and how.
    """
    start = weights, optimizer_state, solver_state, end
    series, snapshots, enlarged, paused, failure = [], [], 0, True, no_failure()
    saved = file.read()
    if saved is None:
        now, first = _begin(problem, *start, clock)
        first = jax.tree.map(on_host, first)
    else:
        header, arrays = saved
        enlarged, paused = header["enlarged"], header["paused"]
        failure = when(True, result_of(header["result"]), header["failure_value"])
        failure = failure.at(header["failure_time"])
        clock.add(header)
        for _ in range(enlarged):
            problem = _enlarge(problem)
        now, first = _structure(problem, *start)
        now = spread_like(weights, file.restore("now", now, arrays))
        now = jax.tree.map(jnp.asarray, now)
        whole = file.restore("rows", first, arrays, shapes=False)
        first = jax.tree.map(lambda x: x[:1].copy(), whole)
        rest = jax.tree.map(lambda x: x[1:], whole)
        series, snapshots = map(_saved, rest)
        del saved, arrays, whole, rest  # as large as all that is integrated

    def save():
        if file.path is None:
            return
        header = clock.header() | dict(
            enlarged=enlarged,
            paused=paused,
            result=name_of(failure.result),
            failure_time=float(failure.time),
            failure_value=float(failure.value),
        )
        rows = _join([first[0], *series]), _join([first[1], *snapshots])
        file.write(float(now.time), header, dict(now=now, rows=rows))

    runs = lambda: paused or bool(failure.result == RESULTS.block_full)
    made = lambda: int(now.accepted + now.rejected)
    pace, hidden = Pace(file.processes), not (show and is_first_process())
    try:
        with tqdm(total=round(float(end)), disable=hidden, desc="predict") as bar:
            while runs():
                if not paused:
                    # More eigenvalues became critical than the block can hold: go on
                    # with a larger one, whose shapes need a new program.
                    now, problem, enlarged, paused, failure = (
                        *_enlarged(problem, now, end, clock),
                        enlarged + 1,
                        True,
                        no_failure(),
                    )
                left = _NO_LIMIT if max_steps is None else max_steps - made()
                if left <= 0:
                    failure = _out_of_steps(now, max_steps)
                    paused = False
                    save()
                    break
                step = int(now.controller.steps)
                pause = Pause(
                    jnp.int32(step + pace.steps),
                    jnp.int32(min(step + left, _NO_LIMIT)),
                    jnp.asarray(file.stop(float(now.time)), end.dtype),
                    end,
                )
                rest = _after(times, series), _after(kept, snapshots)
                part = clock(_integrate, problem, now, *rest, pause)
                # One assignment, which no interrupt can cut in two.
                rows_of = series + _saved(part[1]), snapshots + _saved(part[2])
                now, (series, snapshots), failure, paused = (
                    part[0],
                    rows_of,
                    part[3],
                    bool(part[4]),
                )
                del part  # which has what came before a larger block
                pace.learn(int(now.controller.steps) - step, clock.last)
                bar.update(min(round(float(now.time)), bar.total) - bar.n)
                if file.due(float(now.time)) or not runs():
                    save()
    except KeyboardInterrupt:
        # (Several processes are not interrupted at the same step.)
        if now.accepted == 0 or file.processes.several:
            raise
        save()
        if runs():
            failure = when(True, RESULTS.interrupted).at(now.time)
            last = dict(t=now.time[None], weights=now.y.weights[None])
            snapshots = [*snapshots, last]
    # Not a single step may have been made.
    return now, _join(series or [first[0]]), _join(snapshots or [first[1]]), failure


def integrate_at_once(
    problem: Problem,
    weights: Float[Array, " n"],
    optimizer_state: PyTree,
    solver_state: FlowSolverState | None,
    end: Float[Array, ""],
    times: Float[Array, " T"],
    kept: Float[Array, " S"],
    max_steps: int | None,
) -> tuple[Progress, Rows, Rows, Failure]:
    """The same while JAX traces it: without pauses, a file, or a larger block."""
    now, _ = _begin(problem, weights, optimizer_state, solver_state, end, None)
    most = _NO_LIMIT if max_steps is None else max_steps
    never = jnp.int32(_NO_LIMIT), jnp.full_like(end, jnp.inf)
    limit = Pause(never[0], jnp.int32(most), never[1], end)
    now, series, snapshots, failure, out = _integrate(problem, now, times, kept, limit)
    failure = choose(out, _out_of_steps(now, most), failure)
    return now, series, snapshots, failure


def _out_of_steps(now: Progress, max_steps: int) -> Failure:
    return when(True, RESULTS.max_steps_reached, max_steps).at(now.time)


def solver_state_of(problem: Problem, now: Progress) -> FlowSolverState:
    """What to go on from with another problem, or another size of block."""
    dt = problem.flow.proposed_step(now.controller.inner)
    return FlowSolverState(now.y, now.solver, dt)


def _begin(
    problem: Problem,
    weights: Array,
    optimizer_state: PyTree,
    solver_state: FlowSolverState | None,
    end: Float[Array, ""],
    clock: Clock | None,
) -> tuple[Progress, tuple[Rows, Rows]]:
    """Where the integration begins, with the rows there."""
    call = clock or (lambda fn, *args: fn(*args))
    zero = jnp.zeros_like(end)
    if solver_state is not None:
        return call(_start, problem, solver_state.y, solver_state, zero, end)
    y = call(_first, problem, weights, optimizer_state)
    if clock is not None:
        problem.flow.check(problem.optimizer, y)
    now, rows = call(_start, problem, y, None, zero, end)
    if clock is not None:
        _warn_if_unstable(now.y, problem.optimizer)
    return now, rows


def _structure(problem: Problem, *start: Any) -> tuple[PyTree, PyTree]:
    """That of what `_begin` returns."""
    return eqx.filter_eval_shape(lambda: _begin(problem, *start, None))


def _enlarge(problem: Problem) -> Problem:
    return dataclasses.replace(problem, flow=problem.flow.enlarge())


def _enlarged(
    problem: Problem, now: Progress, end: Float[Array, ""], clock: Clock
) -> tuple[Progress, Problem]:
    """Where to go on with a larger block, and with which."""
    state, problem = solver_state_of(problem, now), _enlarge(problem)
    larger, _ = clock(_start, problem, now.y, state, now.time, end)
    larger = dataclasses.replace(
        larger,
        before=now.before,
        first_loss=now.first_loss,
        accepted=now.accepted,
        rejected=now.rejected,
        reports=now.reports,
        earlier=now.earlier + now.work,
    )
    return larger, problem


@eqx.filter_jit
def _first(problem: Problem, weights: Array, optimizer_state: PyTree) -> FlowState:
    objective, optimizer = problem.objective, problem.optimizer
    return problem.flow.first(objective, optimizer, weights, optimizer_state)


@eqx.filter_jit
def _start(
    problem: Problem,
    y: FlowState,
    previous: FlowSolverState | None,
    t0: Float[Array, ""],
    t1: Float[Array, ""],
) -> tuple[Progress, tuple[Rows, Rows]]:
    flow, term, solver = problem.flow, problem.term(), problem.flow.solver()
    solver_state, dt = (
        (None, None) if previous is None else (previous.solver, previous.dt)
    )
    y, state = flow.start(term, y, solver_state)
    dt = jnp.asarray(flow.stepsize(problem.rtol)[1] if dt is None else dt, t0.dtype)
    if state is None:
        state = solver.init(term, t0, t0 + dt, y, None)
    _, controller_state = problem.controller().init(
        term, t0, t1, y, dt, None, solver.func, solver.error_order(term)
    )
    observed = flow.observe(term, t0, y)
    none = jnp.int32(0)
    now = Progress(
        time=t0,
        y=y,
        solver=state,
        controller=controller_state,
        before=y.optimizer_state,
        first_loss=observed["loss"],
        accepted=none,
        rejected=none,
        reports=none,
        begun=eqx.filter(state, lambda x: eqx.is_array(x) and x.ndim == 0),
        work=Work(),
        earlier=Work(),
    )
    # Arrays whose type does not depend on what made them: the same program takes them.
    now = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), now)
    rows = dict(t=t0, **observed), dict(t=t0, weights=y.weights)
    return now, jax.tree.map(lambda x: x[None], rows)


@eqx.filter_jit
def _integrate(
    problem: Problem,
    now: Progress,
    times: Float[Array, " T"],
    kept: Float[Array, " S"],
    pause: Pause,
) -> tuple[Progress, Rows, Rows, Failure, Bool[Array, ""]]:
    """Integrate until a pause, if there is one: the last value. Rows that were not
    reached have no finite `t`."""
    flow, term, t0, t1 = problem.flow, problem.term(), now.time, pause.end
    # What the discrete optimizer has before it takes in its gradient at t1, a flow that
    # takes it in has at t1 - 1. A NaN is a time that never comes.
    last = t1 - flow.delay
    before = jnp.where(last > t0, last, jnp.nan)[None]
    observe = lambda t, y, args: dict(t=t, **flow.observe(term, t, y))
    snapshot = lambda t, y, args: dict(t=t, weights=y.weights)
    solution = diffrax.diffeqsolve(
        term,
        flow.solver(),
        t0,
        t1,
        now.controller.dt,
        now.y,
        pause,
        solver_state=now.solver,
        controller_state=now.controller,
        saveat=diffrax.SaveAt(
            subs=dict(
                series=diffrax.SubSaveAt(ts=times, fn=observe),
                snapshots=diffrax.SubSaveAt(ts=kept, fn=snapshot),
                before=diffrax.SubSaveAt(
                    ts=before, fn=lambda t, y, args: (t, y.optimizer_state)
                ),
                end=diffrax.SubSaveAt(t1=True, fn=lambda t, y, args: (t, y)),
            ),
            solver_state=True,
            controller_state=True,
        ),
        stepsize_controller=problem.controller(),
        event=flow.event(),
        adjoint=diffrax.ForwardMode(),
        max_steps=None,
        throw=False,
    )
    row = lambda name: jax.tree.map(lambda x: x[0], solution.ys[name])
    (time, y), (t_before, before) = row("end"), row("before")
    paused = solution.result == diffrax.RESULTS.max_steps_reached
    seen = choose(paused, no_failure(), flow.failure(solution))
    failure = explain(seen, problem.objective, term, now.first_loss, t1, solution)
    paused = paused & ~failure.failed
    series, snapshots = solution.ys["series"], solution.ys["snapshots"]
    reached = jnp.isfinite(series["t"])
    # The account is of the whole integration, that of Diffrax of this stretch.
    controller, reports = solution.controller_state, now.reports + jnp.sum(reached)
    account = dataclasses.replace(
        solution,
        controller_state=controller.inner,
        stats=solution.stats | dict(num_steps=controller.steps),
    )
    new = Progress(
        time=time,
        y=y,
        solver=solution.solver_state,
        controller=controller,
        before=jax.tree.map(
            lambda x, old: jnp.where(jnp.isfinite(t_before), x, old), before, now.before
        ),
        accepted=now.accepted + solution.stats["num_accepted_steps"],
        rejected=now.rejected + solution.stats["num_rejected_steps"],
        reports=reports,
        first_loss=now.first_loss,
        begun=now.begun,
        work=flow.work(now.begun, account, reports),
        earlier=now.earlier,
    )
    new = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, now)
    return new, series, snapshots, failure, paused


def _after(times: Float[Array, " T"], rows: list[Rows]) -> Float[Array, " T"]:
    """The times that are not among the rows, and as many NaN, which never come: the
    shape is always the same, and with it the program."""
    done = sum(len(x["t"]) for x in rows)
    return jnp.asarray(
        np.append(on_host(times)[done:], np.full(done, np.nan)), times.dtype
    )


def _saved(rows: Rows) -> list[Rows]:
    """The rows that were reached, up to the first that is not finite."""
    names = ("t", *LOSSES) if "loss" in rows else ("t", "weights")
    count = leading_finite(*(rows[name] for name in names))
    # Copies: a slice would keep the memory of the rows that were not reached.
    return [jax.tree.map(lambda x: on_host(x)[:count].copy(), rows)] if count else []


def _join(parts: list[Rows]) -> Rows:
    """One below another. The last has the largest block."""
    return jax.tree_util.tree_map_with_path(_concatenated, *parts)


# The series with a column for each row of the block, and what there is where it has
# not yet so many.
_MISSING = {
    "sharpness": np.nan,
    "oscillation": 0,
    "joint/rise/oscillation": 0,
}


def _concatenated(path: Any, *blocks: Array | np.ndarray) -> Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in _MISSING:
        wide = lambda x: [(0, 0), (0, blocks[-1].shape[1] - x.shape[1])]
        blocks = [np.pad(x, wide(x), constant_values=_MISSING[name]) for x in blocks]
    return jnp.asarray(np.concatenate(blocks))


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
            stacklevel=5,
        )
