"""What a numerical failure is, and how its cause is told."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .results import RESULTS
from .sharding import on_host

# A loss that is lost after it has grown so many times was lost to divergence.
_GROWN = 1e3
# The share of an eigenvalue that a residual may not be.
_UNCERTAIN = 0.5
# How far ahead to look for the cause of a failure, in optimizer steps: from the least
# step of any flow to several of the longest of these.
_AHEAD = 1e-4 * 4.0 ** np.arange(6)


class Failure(eqx.Module):
    """Why a run went no further, at what time, and the number that shows it. With
    `result` successful there was none, and time and value mean nothing."""

    result: RESULTS
    time: Float[Array, ""]
    value: Float[Array, ""]

    @property
    def failed(self) -> Bool[Array, ""]:
        return self.result != RESULTS.successful

    def at(self, time: Any) -> "Failure":
        return Failure(self.result, _real(time), self.value)


def when(failed: Any, result: RESULTS, value: Any = jnp.nan) -> Failure:
    """The failure `result` if it did fail."""
    result = RESULTS.where(jnp.asarray(failed), result, RESULTS.successful)
    return Failure(result, _real(jnp.nan), _real(value))


def no_failure() -> Failure:
    return when(False, RESULTS.successful)


def first_of(*failures: Failure) -> Failure:
    """The first one that is a failure."""
    *others, out = failures
    for failure in reversed(others):
        out = choose(failure.failed, failure, out)
    return out


def choose(condition: Bool[Array, ""], a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), a, b)


def largest(tree: PyTree) -> Float[Array, ""]:
    """The largest modulus: NaN if an entry is."""
    sizes = [jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack([_real(size) for size in sizes]), initial=0)


def slope_failure(
    weights: Float[Array, " n"], loss: Float[Array, ""], gradient: Float[Array, " n"]
) -> Failure:
    """What is not finite of the weights, and of the loss and its gradient there. An
    infinite loss is too large for its dtype: divergence."""
    lost = lambda x: ~jnp.isfinite(x)
    size, slope = largest(weights), largest(gradient)
    return first_of(
        when(jnp.isinf(loss), RESULTS.diverged, loss),
        when(lost(size), RESULTS.diverged, size),
        when(lost(loss), RESULTS.nonfinite_loss, loss),
        when(lost(slope), RESULTS.nonfinite_gradient, slope),
    )


def eigen_failure(
    values: Float[Array, " k"],
    residuals: Float[Array, " k"],
    known: Bool[Array, " k"],
    critical_sharpness: Any,
    tolerance: Any,
) -> Failure:
    """Whether the `known` ones among eigenvalues of P^-1 H, of which there are as many
    as are not -inf, are not. An eigenvalue is within the residual from its Ritz value:
    if that is half of the largest, or of the critical one, and more than was asked for,
    then not even the first digit is known, nor whether the eigenvalue is critical."""
    exists = ~jnp.isneginf(values)
    size = largest(jnp.where(exists, values, 0))
    scale = jnp.maximum(size, critical_sharpness)
    residual = largest(jnp.where(known & exists, residuals, 0)) / scale
    uncertain = residual >= jnp.maximum(_UNCERTAIN, tolerance)
    return first_of(
        when(~jnp.isfinite(size), RESULTS.nonfinite_hessian, size),
        when(uncertain, RESULTS.eigensolver_failed, residual),
    )


def look_ahead(
    slope: Callable[[PyTree], tuple[Array, Array]],
    weights: Float[Array, " n"],
    rate: Float[Array, " n"],
    failure: Failure,
) -> Failure:
    """A flow that cannot be continued from `weights`, where it moves at `rate`, and
    knows no better why: is a loss or a gradient a little ahead not finite? `slope`
    returns both."""
    unclear = failure.result == RESULTS.diverged
    unclear = unclear | (failure.result == RESULTS.dt_min_reached)

    def look(distance: Array) -> tuple[Failure, Array]:
        there = weights + distance * rate
        found = slope_failure(there, *slope(there))
        moves = jnp.isfinite(largest(there))
        found = choose(moves, found, no_failure())
        return found, found.failed

    def search() -> Failure:
        all_found, failed = jax.lax.map(look, jnp.asarray(_AHEAD, weights.dtype))
        found = jax.tree.map(lambda x: x[jnp.argmax(failed)], all_found)
        return choose(found.failed, found.at(failure.time), failure)

    return jax.lax.cond(unclear, search, lambda: failure)


def or_divergence(
    failure: Failure, start: Float[Array, ""], last: Float[Array, ""]
) -> Failure:
    """Call it divergence if the loss had risen from `start` so far that this is why it,
    or its gradient, or the next step, was lost."""
    codes = (
        RESULTS.nonfinite_loss,
        RESULTS.nonfinite_gradient,
        RESULTS.dt_min_reached,
        RESULTS.eigensolver_failed,  # of a Hessian as large as the loss
    )
    could = jnp.any(jnp.stack([failure.result == code for code in codes]))
    grown = jnp.abs(last) > _GROWN * jnp.abs(start)
    result = RESULTS.where(could & grown, RESULTS.diverged, failure.result)
    value = jnp.where(jnp.isfinite(failure.value), _real(last), failure.value)
    value = jnp.where(could & grown, value, failure.value)
    return Failure(result, failure.time, value)


def or_nothing(failure: Failure) -> Failure:
    """The failure, without time and value if there was none."""
    return choose(failure.failed, failure, no_failure())


def series_failure(series: dict[str, PyTree[Array]]) -> Failure:
    """Of reported times, the first at which a loss or a squared gradient norm is not
    finite. Those that were not reached are not finite themselves."""
    rows = jnp.stack([_real(series[name]) for name in LOSSES])
    bad = ~jnp.isfinite(rows) & jnp.isfinite(series["t"])
    time = jnp.argmax(jnp.any(bad, axis=0))
    row = jnp.argmax(bad[:, time])
    value = rows[row, time]
    code = RESULTS.where(
        jnp.isinf(value),
        RESULTS.diverged,
        RESULTS.where(row < 2, RESULTS.nonfinite_loss, RESULTS.nonfinite_gradient),
    )
    return when(jnp.any(bad), code, value).at(series["t"][time])


def explain(
    seen: Failure,
    objective: Any,
    term: diffrax.AbstractTerm,
    first_loss: Float[Array, ""],
    t1: Array,
    solution: diffrax.Solution,
) -> Failure:
    """Whether the integration of a flow to t1 failed, when, and why, given what its
    solver has `seen`. (The first loss is that of the run, not that of this stretch of
    it: where stretches begin must not matter.)"""
    series, (time, y) = solution.ys["series"], solution.ys["end"]
    time, y = jax.tree.map(lambda x: x[0], (time, y))
    # A block that fills up in the very last step does no harm.
    event = seen.result == RESULTS.event_occurred
    size = series["sharpness"].shape[1] if "sharpness" in series else jnp.nan
    full = when(event & (time < t1), RESULTS.block_full, size)
    failure = choose(event, full, seen)
    failure = choose(jnp.isnan(failure.time), failure.at(time), failure)

    def explained() -> Failure:
        rate = term.vf(time, y, None).weights
        found = look_ahead(objective.value_and_grad, y.weights, rate, failure)
        return or_divergence(found, first_loss, objective.loss(y.weights))

    failure = jax.lax.cond(failure.failed, explained, lambda: failure)
    return or_nothing(first_of(failure, series_failure(series)))


# The series without which a row of a trajectory is no row.
LOSSES = ("loss", "mean_loss", "grad_norm_sq", "mean_grad_norm_sq")


def leading_finite(*series: Any) -> int:
    """How many rows there are before the first one that is not finite."""
    good = True
    for x in series:
        x = jnp.asarray(x)
        rest = tuple(range(1, x.ndim))
        good = good & on_host(jnp.all(jnp.isfinite(x), axis=rest))
    return int(np.sum(np.cumprod(good)))


def _real(x: Any) -> Array:
    return jnp.asarray(x, jnp.result_type(float))
