"""What is said of a run that failed: when, the numbers, and what to do about it."""

from typing import Any

import numpy as np

from .results import RESULTS, name_of

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
