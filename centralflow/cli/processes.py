"""The processes of a run, advanced block by block, and what is logged of them."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..flows import StableFlow
from ..measure import GUARDS, eigenpairs, second_difference
from ..objective import FlatObjective
from ..predict import predict
from ..results import RESULTS
from ..running import warn_if_unconverged
from ..train import train
from ..trajectory import Trajectory
from .options import Settings
from .problem import Problem

Rows = dict[str, np.ndarray]  # series, a row for each of `steps`
_RESIDUAL = 1e-2  # of an eigenpair, over the largest eigenvalue, as in `train`
_WORK = (
    "gradients",
    "hvps",
    "third_derivatives",
    "unconverged",
    "accepted_steps",
    "rejected_steps",
    "seconds",
    "compile_seconds",
)


class Block(NamedTuple):
    """What a process did in one block, `steps` counted from its start.

    - `state`: where it goes on from: a PyTree of arrays.
    - `weights`: `[S, n]`, at the logged steps.
    - `tables`: series by the name of their table; `""` is that of the logged steps.
    - `failed`: if it did not reach the end, why.
    """

    state: PyTree
    weights: Float[np.ndarray, "S n"]
    tables: dict[str, Rows]
    failed: str | None


def initial_state(weights: Array, optimizer_state: PyTree) -> PyTree:
    """Of all processes that have not advanced."""
    return dict(weights=weights, optimizer_state=optimizer_state)


def logged_steps(settings: Settings, steps: int) -> np.ndarray:
    """Of a block, the first and the last among them."""
    return np.union1d(np.arange(0, steps, settings.log_every), [steps])


def no_rows(problem: Problem, process: str) -> Rows:
    """What is logged of every process, before the first step."""
    shapes = eqx.filter_eval_shape(
        problem.flat.evaluate, problem.plain, problem.weights
    )
    series = ("loss", "grad_norm_sq")
    if process in ("central", "stable"):
        series += ("mean_loss", "mean_grad_norm_sq")
    shapes = {name: x.shape for name, x in shapes.items()} | dict.fromkeys(series, ())
    dtype = problem.weights.dtype
    rows = {name: np.zeros((0, *shape), dtype) for name, shape in shapes.items()}
    return dict(steps=np.arange(0)) | rows


def advance(
    process: str, problem: Problem, settings: Settings, state: PyTree, steps: int
) -> dict[str, Block]:
    """Make a block of `steps` steps: of the discrete run, with its midpoints."""
    state = jax.tree.map(jnp.asarray, state)
    if process == "discrete":
        return _advance_run(problem, settings, state, steps)
    return {process: _advance_flow(process, problem, settings, state, steps)}


def _advance_run(
    problem: Problem, settings: Settings, state: PyTree, steps: int
) -> dict[str, Block]:
    wanted = logged_steps(settings, steps)
    midpoints = "midpoint" in settings.processes.split(",")
    kept = wanted
    if midpoints:
        kept = np.unique(np.concatenate([wanted - 1, wanted, wanted + 1]))
        kept = kept[(kept >= 0) & (kept <= steps)]
    run = train(
        problem.objective,
        problem.flat.model(state["weights"]),
        problem.optimizer,
        steps,
        optimizer_state=state["optimizer_state"],
        sharpness_every=(
            settings.eigenvalues_every if _measures(settings, "midpoint") else None
        ),
        sharpness_count=max(settings.eigenvalues, 1),
        coordinates=_coordinates(problem, settings, "discrete"),
        weight_times=kept.tolist(),
        progress=False,
        throw=False,
    )
    kept, weights = np.asarray(run.weight_times).astype(int), np.asarray(run.weights)
    rows = wanted[wanted <= run.times[-1]]
    at = lambda times: weights[np.minimum(np.searchsorted(kept, times), len(kept) - 1)]
    last, _ = problem.flat.objective.flatten(run.model)
    new = dict(weights=last, optimizer_state=run.optimizer_state)
    end, every = _end(run), _series(run, "discrete")
    here = at(rows)
    series = dict(
        steps=rows,
        loss=every["loss"][rows],
        grad_norm_sq=every["grad_norm_sq"][rows],
        trace_covariance=every["trace_covariance"][rows],
        sharpness=np.asarray(run.sharpness)[rows],
        oscillation=np.asarray(run.oscillation)[rows],
        **_evaluate(problem.plain, problem.flat, here),
    )
    if _measures(settings, "discrete"):
        sizes = np.asarray(run.step_sizes)[rows]
        series["iterate_sharpness"] = _sharpness(problem, settings, rows, here, sizes)
    tables = {"": series, "every_step": every, "work": _work(run)}
    blocks = dict(discrete=Block(new, here, tables, end))
    if midpoints:
        # The midpoint at the end takes one step more. At the first step, and where the
        # run breaks off, there is none: the iterate stands for it.
        kept = np.append(kept, steps + 1)
        weights = np.vstack([weights, _next(problem, new)])
        around = (at(np.maximum(rows - 1, 0)), here, at(rows + 1))
        curve = np.array(second_difference(*map(jnp.asarray, around)))
        curve[rows == 0] = 0
        if end is not None:
            curve[-1] = 0
        points = here + curve
        functions = problem.plain | {"": _Slope(problem.flat)}
        values = _evaluate(functions, problem.flat, points)
        series = dict(steps=rows, sharpness=series["sharpness"]) | values
        blocks["midpoint"] = Block({}, points, {"": series}, None)
    return blocks


def _advance_flow(
    process: str, problem: Problem, settings: Settings, state: PyTree, steps: int
) -> Block:
    wanted = logged_steps(settings, steps)
    # At every step, as the discrete run that it is compared with. Between its own steps
    # the central flow is interpolated, at no cost; the stable flow takes a gradient,
    # one more to the six of each of its steps.
    times = range(steps + 1)
    prediction = _predict(process, problem, settings, state, times, wanted)
    weights = np.asarray(prediction.weights)
    kept = np.round(np.asarray(prediction.weight_times)).astype(int)
    every = _series(prediction, process)
    rows = np.flatnonzero(np.isin(every["steps"], kept))
    weights = weights[: rows.size]
    series = {name: values[rows] for name, values in every.items()}
    series |= {f"mean_{k}": np.asarray(v)[rows] for k, v in prediction.metrics.items()}
    series |= _evaluate(problem.plain, problem.flat, weights)
    if _measures(settings, process):
        sizes, steps = np.asarray(prediction.step_sizes)[rows], series["steps"]
        series["sharpness"] = _sharpness(problem, settings, steps, weights, sizes)
    tables = {"": series, "every_step": every, "work": _work(prediction)}
    return Block(_flow_state(problem, prediction), weights, tables, _end(prediction))


def _predict(
    process: str,
    problem: Problem,
    settings: Settings,
    state: PyTree,
    times: Iterable[Any],
    kept: Iterable[Any],
) -> Trajectory:
    times, kept = [int(t) for t in times], [int(t) for t in kept]
    central = process == "central"
    return predict(
        problem.objective,
        problem.flat.model(state["weights"]),
        problem.optimizer,
        times[-1],
        flow=problem.flow if central else StableFlow(),
        optimizer_state=state["optimizer_state"],
        solver_state=state.get("solver_state"),
        times=times,
        metrics=problem.predicted if central else None,
        coordinates=_coordinates(problem, settings, process),
        weight_times=kept,
        rtol=settings.rtol if central else None,
        progress=False,
        throw=False,
    )


# The eigenvalues of P^-1 H, where the library does not measure them.


def _measures(settings: Settings, name: str) -> bool:
    return settings.eigenvalues > 0 and name in settings.eigenvalues_of.split(",")


def _coordinates(problem: Problem, settings: Settings, process: str) -> np.ndarray:
    """Those at which the step sizes 1/P are recorded to be all of P."""
    if not _measures(settings, process):
        return np.arange(0)
    state = eqx.filter_eval_shape(problem.optimizer.init, problem.weights)
    P = eqx.filter_eval_shape(problem.optimizer.preconditioner, state)
    return np.arange(P.size)  # one if P is a number


def _sharpness(
    problem: Problem,
    settings: Settings,
    steps: np.ndarray,
    weights: np.ndarray,
    step_sizes: np.ndarray,
) -> np.ndarray:
    """`[S, K]`, the top eigenvalues at the steps that are to be measured, NaN at the
    others."""
    rows = np.flatnonzero(steps % settings.eigenvalues_every == 0)
    values = np.full((len(steps), settings.eigenvalues), np.nan, weights.dtype)
    if rows.size:
        points, P = jnp.asarray(weights[rows]), jnp.asarray(1 / step_sizes[rows])
        found, converged = _spectra(problem.flat, points, P, settings.eigenvalues)
        values[rows, : found.shape[1]] = found
        warn_if_unconverged(np.sum(~np.asarray(converged)))
    return values


@eqx.filter_jit
def _spectra(
    flat: FlatObjective,
    weights: Float[Array, "S n"],
    P: Float[Array, "S m"],
    count: int,
) -> tuple[Float[Array, "S k"], Array]:
    k = min(count + GUARDS, weights.shape[1])

    def measure(vectors, row):
        w, P, key = row
        found = eigenpairs(flat, w, P, vectors, count, _RESIDUAL, key)
        return found.vectors, (found.values[:count], found.converged)

    P = P[:, 0] if P.shape[1] == 1 else P
    start = jr.normal(jr.key(0), (k, weights.shape[1]), weights.dtype)
    rows = weights, P, jr.split(jr.key(1), len(weights))
    return jax.lax.scan(measure, start, rows)[1]


# Where a prediction ended, and how to go on from there.


def _flow_state(problem: Problem, prediction: Trajectory) -> PyTree:
    last, _ = problem.flat.objective.flatten(prediction.model)
    return dict(
        weights=last,
        optimizer_state=prediction.optimizer_state,
        solver_state=prediction.solver_state,
    )


def state_like(problem: Problem, settings: Settings, process: str, step: int) -> PyTree:
    """A state of the process at a checkpoint, with which to read a saved one: the
    structure is the same, shapes need not be."""

    def make(weights):
        state = initial_state(weights, problem.optimizer.init(weights))
        if step == 0 or process == "discrete":
            return state
        once = (0, 1), (0, 1)
        prediction = _predict(process, problem, settings, state, *once)
        return _flow_state(problem, prediction)

    return eqx.filter_eval_shape(make, problem.weights)


def _series(trajectory: Trajectory, process: str) -> Rows:
    """What is known at all reported times."""
    names = ("loss", "grad_norm_sq", "trace_covariance")
    if process != "discrete":
        names += ("mean_loss", "mean_grad_norm_sq")
    if process == "central":
        names += ("sharpness", "oscillation")
    series = {name: np.asarray(getattr(trajectory, name)) for name in names}
    return dict(steps=np.round(np.asarray(trajectory.times)).astype(int), **series)


def _work(trajectory: Trajectory) -> Rows:
    """One row for the block."""
    work = {name: np.asarray(trajectory.stats[name])[None] for name in _WORK}
    return dict(steps=np.round(np.asarray(trajectory.times[-1:])).astype(int), **work)


def _end(trajectory: Trajectory) -> str | None:
    successful = trajectory.result == RESULTS.successful
    return None if successful else RESULTS[trajectory.result]


class _Slope(eqx.Module):
    """Loss and squared gradient norm."""

    flat: FlatObjective

    def __call__(self, model: PyTree) -> Float[Array, "2"]:
        weights, flat = self.flat.objective.flatten(model)
        loss, gradient = flat.value_and_grad(weights)
        return jnp.stack([loss, gradient @ gradient])


def _evaluate(
    functions: dict[str, Callable], flat: FlatObjective, weights: np.ndarray
) -> Rows:
    values = _map(functions, flat, jnp.asarray(weights))
    values = {name: np.asarray(value) for name, value in values.items()}
    if "" in values:
        values["loss"], values["grad_norm_sq"] = values.pop("").T
    return values


@eqx.filter_jit
def _map(
    functions: dict[str, Callable], flat: FlatObjective, weights: Float[Array, "S n"]
) -> dict[str, Array]:
    return jax.lax.map(lambda w: flat.evaluate(functions, w), weights)


@eqx.filter_jit
def _step(optimizer, flat, weights, state):
    return optimizer.update(weights, state, flat.grad(weights))[0]


def _next(problem: Problem, state: PyTree) -> np.ndarray:
    args = (problem.optimizer, problem.flat, *state.values())
    return np.asarray(_step(*args))
