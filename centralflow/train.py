"""The discrete optimizer, run and recorded."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from tqdm.auto import tqdm

from .checkpoint import Checkpoint, settings_of
from .checks import require_integer
from .failures import (
    Failure,
    choose,
    eigen_failure,
    first_of,
    no_failure,
    or_divergence,
    or_nothing,
    slope_failure,
    when,
)
from .measure import GUARDS, eigenpairs, second_difference
from .objective import FlatObjective, Objective, is_traced
from .optimizers import AbstractOptimizer
from .results import RESULTS
from .running import (
    Clock,
    Pace,
    check_coordinates,
    check_metrics,
    check_start,
    check_times,
    show_progress,
    warn_if_unconverged,
)
from .sharding import Processes, is_first_process, sharded_like, spread_like
from .trajectory import Trajectory, finish

_RESIDUAL = 1e-2  # over the largest eigenvalue


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

    settings = _Settings(
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
    state = clock(_init, settings, weights, optimizer_state, kept.size)
    if traced:
        state, interrupted = (
            _advance(settings, state, kept, jnp.int32(steps + 1)),
            False,
        )
    else:
        show = show_progress(progress)
        state, interrupted = _run(settings, state, kept, file, clock, show)

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


class _Settings(eqx.Module):
    flat: FlatObjective
    optimizer: AbstractOptimizer
    metrics: dict[str, Callable]
    coordinates: Int[Array, " C"]
    steps: int = eqx.field(static=True)
    every: int | None = eqx.field(static=True)
    count: int = eqx.field(static=True)


# What of the state has vectors as long as the weights, and is spread as they are.
_LONG = (
    "weights",
    "optimizer_state",
    "previous",
    "previous_state",
    "kept",
    "eigenvectors",
)


class _State(eqx.Module):
    step: Int[Array, ""]
    weights: Float[Array, " n"]
    optimizer_state: PyTree
    previous: Float[Array, " n"]
    previous_state: PyTree
    series: dict[str, PyTree[Array]]  # a row for each step
    kept: Float[Array, "S n"]
    failure: Failure
    broken: Bool[Array, ""]  # whether it failed in the loss, and not in a measurement
    # The measurements, a row for each, and what they go on from.
    sharpness: Float[Array, "M K"]
    oscillation: Float[Array, "M K"]
    eigenvectors: Float[Array, "k n"]
    covariance: Float[Array, "k k"]
    hvps: Int[Array, ""]
    unconverged: Int[Array, ""]


def _run(
    settings: _Settings,
    state: _State,
    kept: Int[Array, " S"],
    file: Checkpoint,
    clock: Clock,
    show: bool,
) -> tuple[_State, bool]:
    """Make all steps, but those that are in the file; and whether that was interrupted.

    How they are divided into calls changes nothing: it is one program.
    """
    saved, pace, end = file.read(), Pace(file.processes), settings.steps + 1
    if saved is not None:
        header, arrays = saved
        restored = file.restore("state", state, arrays)
        fields = {x.name: getattr(restored, x.name) for x in dataclasses.fields(_State)}
        fields |= spread_like(state.weights, {name: fields[name] for name in _LONG})
        state = _State(**jax.tree.map(jnp.asarray, fields))
        clock.add(header)
    runs = lambda state: int(state.step) < end and not bool(state.failure.failed)
    save = lambda step: file.write(step, clock.header(), dict(state=state))
    try:
        hidden = not (show and is_first_process())
        with tqdm(total=settings.steps, disable=hidden, desc="train") as bar:
            while runs(state):
                step = int(state.step)
                stop = int(min(step + pace.steps, file.stop(step), end))
                state = clock(_advance, settings, state, kept, jnp.int32(stop))
                pace.learn(stop - step, clock.last)
                step = int(state.step)
                bar.update(min(step, settings.steps) - bar.n)
                if file.due(step) or not runs(state):
                    save(step)
    except KeyboardInterrupt:
        # (Several processes are not interrupted at the same step.)
        if int(state.step) == 0 or file.processes.several:
            raise
        save(int(state.step))
        return state, runs(state)
    return state, False


@eqx.filter_jit
def _init(
    settings: _Settings, weights: Array, optimizer_state: PyTree, kept: int
) -> _State:
    s, n, dtype = settings, weights.size, weights.dtype
    one = lambda w: dict(
        loss=s.flat.loss(w),
        grad_norm_sq=w @ w,  # of the gradient's shape
        gradient_sq=w[s.coordinates],
        step_sizes=w[s.coordinates],
        trace_covariance=w @ w,
        metrics=s.flat.evaluate(s.metrics, w),
    )
    series = jax.tree.map(
        lambda x: jnp.zeros((s.steps + 1, *x.shape), x.dtype),
        jax.eval_shape(one, weights),
    )
    k = min(s.count + GUARDS, n)
    measurements = 0 if s.every is None else s.steps // s.every + 1
    none = jnp.full((measurements, s.count), jnp.nan, dtype)
    return _State(
        step=jnp.int32(0),
        weights=weights,
        optimizer_state=optimizer_state,
        previous=weights,
        previous_state=optimizer_state,
        series=series,
        kept=jnp.zeros((kept, n), dtype),
        failure=no_failure(),
        broken=jnp.array(False),
        sharpness=none,
        oscillation=none,
        eigenvectors=jr.normal(jr.key(0), (k, n), dtype),
        covariance=jnp.zeros((k, k), dtype),
        hvps=jnp.int32(0),
        unconverged=jnp.int32(0),
    )


@eqx.filter_jit
def _advance(
    settings: _Settings, state: _State, kept: Int[Array, " S"], stop: Int[Array, ""]
) -> _State:
    """Step until `stop` rows are recorded, or the run fails."""
    return jax.lax.while_loop(
        lambda state: (state.step < stop) & ~state.failure.failed,
        lambda state: _step(settings, state, kept),
        state,
    )


def _step(settings: _Settings, state: _State, kept: Int[Array, " S"]) -> _State:
    """Record the iterate at `state.step` and, unless it is the last, leave it."""
    s, t, w = settings, state.step, state.weights
    loss, gradient = s.flat.value_and_grad(w)
    new_w, new_s = s.optimizer.update(w, state.optimizer_state, gradient)
    P = s.optimizer.preconditioner(new_s)
    curve = jnp.where(t == 0, 0, second_difference(state.previous, w, new_w))
    record = dict(
        loss=loss,
        grad_norm_sq=gradient @ gradient,
        gradient_sq=gradient[s.coordinates] ** 2,
        step_sizes=jnp.broadcast_to(1 / P, w.shape)[s.coordinates],
        trace_covariance=jnp.where(t == 0, jnp.nan, curve @ curve),
        metrics=s.flat.evaluate(s.metrics, w),
    )
    series = jax.tree.map(lambda x, row: x.at[t].set(row), state.series, record)
    failure = slope_failure(w, loss, gradient)
    norm = record["grad_norm_sq"]
    failure = first_of(failure, when(~jnp.isfinite(norm), RESULTS.diverged, norm))
    broken = failure.failed

    if s.every is not None:
        a = state.eigenvectors @ (P * -curve)
        state = eqx.tree_at(
            lambda x: x.covariance, state, state.covariance + jnp.outer(a, a)
        )
        state = jax.lax.cond(
            (t % s.every == 0) & ~broken,
            lambda state: _measure(s, state, w + curve, P),
            lambda state: state,
            state,
        )
        failure = first_of(failure, state.failure)

    # The last iterate is recorded and not left, and so is one that could not be
    # measured; a run whose loss broke off keeps its last finite one as the previous.
    moves = (t < s.steps) & ~failure.failed
    here, before = (w, state.optimizer_state), (state.previous, state.previous_state)
    weights, optimizer_state = choose(moves, (new_w, new_s), here)
    previous, previous_state = choose(broken, before, here)
    return _State(
        step=t + (~broken).astype(jnp.int32),
        weights=weights,
        optimizer_state=optimizer_state,
        previous=previous,
        previous_state=previous_state,
        series=series,
        kept=jnp.where((kept == t)[:, None], w, state.kept),
        failure=failure.at(t),
        broken=broken,
        sharpness=state.sharpness,
        oscillation=state.oscillation,
        eigenvectors=state.eigenvectors,
        covariance=state.covariance,
        hvps=state.hvps,
        unconverged=state.unconverged,
    )


def _measure(
    s: _Settings, state: _State, midpoint: Float[Array, " n"], P: Any
) -> _State:
    """The top eigenpairs of P^-1 H at the midpoint, and the mean of the oscillation's
    covariance since the last measurement."""
    k = state.eigenvectors.shape[0]
    key = jr.fold_in(jr.key(1), state.step)
    pairs = eigenpairs(s.flat, midpoint, P, state.eigenvectors, s.count, _RESIDUAL, key)
    row = state.step // s.every
    variances = jnp.linalg.eigvalsh(state.covariance)[::-1] / s.every
    rows = lambda x: jnp.full(s.count, jnp.nan, x.dtype).at[:k].set(x[: s.count])
    failure = eigen_failure(
        pairs.values,
        pairs.residuals,
        jnp.arange(k) < s.count,
        s.optimizer.critical_sharpness,
        0.0,
    )
    return eqx.tree_at(
        lambda x: (
            x.sharpness,
            x.oscillation,
            x.eigenvectors,
            x.covariance,
            x.hvps,
            x.unconverged,
            x.failure,
        ),
        state,
        (
            state.sharpness.at[row].set(rows(pairs.values)),
            state.oscillation.at[row].set(
                jnp.where(row == 0, jnp.nan, rows(variances))
            ),
            pairs.vectors,
            jnp.zeros_like(state.covariance),
            state.hvps + pairs.products,
            state.unconverged + ~pairs.converged,
            failure,
        ),
    )


def _at_measurements(
    measured: Float[Array, "M K"], every: int | None, steps: int
) -> Float[Array, "T K"]:
    """A row for each step, NaN where nothing was measured."""
    series = jnp.full((steps + 1, measured.shape[1]), jnp.nan, measured.dtype)
    return series if every is None else series.at[::every].set(measured)
