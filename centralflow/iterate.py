"""The iterates of the optimizer, recorded, in stretches that one program makes."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PyTree
from tqdm.auto import tqdm

from .checkpoint import Checkpoint
from .failures import (
    Failure,
    choose,
    eigen_failure,
    first_of,
    no_failure,
    slope_failure,
    when,
)
from .measure import GUARDS, eigenpairs, second_difference
from .objective import FlatObjective
from .optimizers import AbstractOptimizer
from .optimizers.base import Diagonal
from .results import RESULTS
from .running import Clock, Pace
from .sharding import is_first_process, spread_like

_RESIDUAL = 1e-2  # over the largest eigenvalue


class Settings(eqx.Module):
    """What is iterated, and what of it is recorded: the sharpness of `count`
    eigenvectors every `every` steps."""

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


class State(eqx.Module):
    """Where the iteration is, and what was recorded so far."""

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


def run(
    settings: Settings,
    state: State,
    kept: Int[Array, " S"],
    file: Checkpoint,
    clock: Clock,
    show: bool,
) -> tuple[State, bool]:
    """Make all steps, but those that are in the file; and whether that was interrupted.

    How they are divided into calls changes nothing: it is one program.
    """
    saved, pace, end = file.read(), Pace(file.processes), settings.steps + 1
    if saved is not None:
        header, arrays = saved
        restored = file.restore("state", state, arrays)
        fields = {x.name: getattr(restored, x.name) for x in dataclasses.fields(State)}
        fields |= spread_like(state.weights, {name: fields[name] for name in _LONG})
        state = State(**jax.tree.map(jnp.asarray, fields))
        clock.add(header)
    runs = lambda state: int(state.step) < end and not bool(state.failure.failed)
    save = lambda step: file.write(step, clock.header(), dict(state=state))
    try:
        hidden = not (show and is_first_process())
        with tqdm(total=settings.steps, disable=hidden, desc="train") as bar:
            while runs(state):
                step = int(state.step)
                stop = int(min(step + pace.steps, file.stop(step), end))
                state = clock(advance, settings, state, kept, jnp.int32(stop))
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
def init(
    settings: Settings, weights: Array, optimizer_state: PyTree, kept: int
) -> State:
    """The state before the first step, with room for all records."""
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
    return State(
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
def advance(
    settings: Settings, state: State, kept: Int[Array, " S"], stop: Int[Array, ""]
) -> State:
    """Step until `stop` rows are recorded, or the run fails."""
    return jax.lax.while_loop(
        lambda state: (state.step < stop) & ~state.failure.failed,
        lambda state: _step(settings, state, kept),
        state,
    )


def _step(settings: Settings, state: State, kept: Int[Array, " S"]) -> State:
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
    return State(
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
    s: Settings, state: State, midpoint: Float[Array, " n"], P: Diagonal
) -> State:
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
