"""What a numerical failure is, how its cause is told, and what is said of it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .results import RESULTS, name_of

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
    state: PyTree[Array], loss: Float[Array, ""], gradient: Float[Array, " n"]
) -> Failure:
    """What is not finite of the weights and the optimizer `state`, and of the loss and
    its gradient there. An infinite loss is too large for its dtype: divergence."""
    lost = lambda x: ~jnp.isfinite(x)
    size, slope = largest(state), largest(gradient)
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
    codes = (RESULTS.nonfinite_loss, RESULTS.nonfinite_gradient, RESULTS.dt_min_reached)
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
    finite."""
    rows = jnp.stack([_real(series[name]) for name in LOSSES])
    bad = ~jnp.isfinite(rows)
    time = jnp.argmax(jnp.any(bad, axis=0))
    row = jnp.argmax(bad[:, time])
    value = rows[row, time]
    code = RESULTS.where(
        jnp.isinf(value),
        RESULTS.diverged,
        RESULTS.where(row < 2, RESULTS.nonfinite_loss, RESULTS.nonfinite_gradient),
    )
    return when(jnp.any(bad), code, value).at(series["t"][time])


# The series without which a row of a trajectory is no row.
LOSSES = ("loss", "mean_loss", "grad_norm_sq", "mean_grad_norm_sq")


def leading_finite(*series: Any) -> int:
    """How many rows there are before the first one that is not finite."""
    good = True
    for x in series:
        x = np.asarray(x)
        good = good & np.all(np.isfinite(x.reshape(len(x), -1)), axis=1)
    return int(np.sum(np.cumprod(good)))


# What is said.

_SEEN = {
    "diverged": "The run diverged: a loss or a weight of {value} at t = {time}",
    "nonfinite_loss": "The loss is {value} at t = {time}",
    "nonfinite_gradient": (
        "The gradient is {value} at t = {time}, where the loss is finite"
    ),
    "nonfinite_hessian": (
        "A product of the Hessian and a vector is {value} at t = {time}, where the "
        "loss and its gradient are finite"
    ),
    "nonfinite_third_derivative": (
        "A third derivative of the loss is {value} at t = {time}, where the first and "
        "second are finite"
    ),
    "eigensolver_failed": (
        "The eigensolver failed at t = {time}: a residual is {value} of the largest "
        "eigenvalue, or of the critical one"
    ),
    "sdcp_failed": (
        "No oscillation was found that holds the sharpness at its critical value, at "
        "t = {time}: {value} of the violation is left"
    ),
    "block_full": (
        "At t = {time} more eigenvalues became critical than the block of {value} "
        "eigenvectors can hold"
    ),
    "dt_min_reached": "Not even the shortest step was right, at t = {time}",
    "max_steps_reached": (
        "All steps of `max_steps` were made at t = {time}: {accepted_steps} accepted "
        "and {rejected_steps} rejected"
    ),
}
_DO = {
    "diverged": "Lower the learning rate, or start from a better place.",
    "nonfinite_loss": "Look in `loss_fn` for logarithms, roots, divisions and `exp`.",
    "nonfinite_gradient": (
        "Look in `loss_fn` for functions without a derivative, such as `sqrt` at 0, "
        "behind a `jnp.where` too."
    ),
    "nonfinite_hessian": (
        "Look in `loss_fn` for functions without a second derivative, such as norms "
        "at 0, behind a `jnp.where` too."
    ),
    "nonfinite_third_derivative": (
        "Look in `loss_fn` for functions without a third derivative; smooth them."
    ),
    "eigensolver_failed": (
        "Check that the derivatives of `loss_fn` are those of a function, if it has a "
        "`custom_jvp` or `custom_vjp`; or try float64."
    ),
    "sdcp_failed": (
        "The optimizer diverges where the sharpness does not fall when it oscillates: "
        "lower the learning rate, or make some real steps first."
    ),
    "block_full": "Increase `block_size`.",
    "dt_min_reached": (
        "Is the loss smooth? Make some real steps first, or use "
        "`CentralFlow(substeps=4)`, which does not judge its steps."
    ),
    "max_steps_reached": "Increase `max_steps`, or `rtol`.",
}


def describe(trajectory: Any) -> str:
    """What became of a run that failed: the time, and the numbers."""
    name = name_of(trajectory.result)
    if name not in _SEEN or trajectory.failure_time is None:
        return RESULTS[trajectory.result]
    last, loss = (float(x[-1]) for x in (trajectory.times, trajectory.loss))
    seen = _SEEN[name].format(
        time=f"{float(trajectory.failure_time):.7g}",
        value=f"{float(trajectory.failure_value):.4g}",
        **trajectory.stats,
    )
    if name == "dt_min_reached" and not np.isnan(trajectory.failure_value):
        seen += f": its relative error is {float(trajectory.failure_value):.4g}"
    return f"{seen} (last finite loss {loss:.4g} at t = {last:.7g})"


def message(trajectory: Any, optimizer: Any) -> str:
    """The same, with the learning rate there and what to do."""
    name = name_of(trajectory.result)
    rate = optimizer.learning_rate
    if callable(rate):
        rate = rate(optimizer.updates(trajectory.optimizer_state))
    return (
        f"{describe(trajectory)}; learning rate {float(rate):.4g}. "
        f"{_DO.get(name, '')} Everything up to there is in the `trajectory` attribute "
        "of this exception; `throw=False` returns it."
    )


def _real(x: Any) -> Array:
    return jnp.asarray(x, jnp.result_type(float))
