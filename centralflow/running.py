"""What `train` and `predict` share: checks of their arguments, progress, the clock."""

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .objective import FlatObjective, Objective, is_traced
from .optimizers import AbstractOptimizer
from .optimizers.base import check_schedule


def check_start(
    objective: Objective,
    model: PyTree,
    optimizer: AbstractOptimizer,
    steps: int,
    optimizer_state: PyTree,
) -> tuple[FlatObjective, Float[Array, " n"], PyTree]:
    """The flat objective, the weights and the optimizer state, once they make sense."""
    if not isinstance(objective, Objective):
        raise ValueError(
            "`objective` must be a `centralflow.Objective`, got "
            f"{type(objective).__name__}: wrap the loss and the data in "
            "`Objective(loss_fn, data)`."
        )
    if not isinstance(optimizer, AbstractOptimizer):
        raise ValueError(
            "`optimizer` must be a `centralflow.AbstractOptimizer` such as "
            f"`GradientDescent(0.1)`, got {type(optimizer).__name__}."
        )
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or steps < 1:
        raise ValueError(f"`steps` must be a positive integer, got {steps!r}.")
    weights, flat = objective.flatten(model)
    loss = eqx.filter_eval_shape(flat.loss, weights)
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape != ():
        raise ValueError(
            "`loss_fn` must return a scalar, the mean over the examples of the batch; "
            f"it returned {jax.tree.map(lambda x: x.shape, loss)}."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"`loss_fn` must return a real number, got {loss.dtype}.")
    check_schedule(optimizer.learning_rate, int(steps))
    like = eqx.filter_eval_shape(optimizer.init, weights)
    if optimizer_state is None:
        optimizer_state = optimizer.init(weights)
    elif _shapes(optimizer_state) != _shapes(like):
        raise ValueError(
            f"`optimizer_state` does not belong to this optimizer and model: it has "
            f"the arrays {_shapes(optimizer_state)}, not {_shapes(like)}."
        )
    if not is_traced((objective, weights, optimizer, optimizer_state)):
        value = float(_loss(flat, weights))
        if not np.isfinite(value):
            raise ValueError(
                f"`loss_fn` returned {value} at the initial `model`: the loss must be "
                "finite at the start. Look for NaN or infinity in the data and the "
                "parameters."
            )
    return flat, weights, optimizer_state


def check_times(name: str, times: Iterable[Any], steps: int) -> Float[np.ndarray, " T"]:
    """`times` as a float64 array, once they make sense."""
    try:
        times = np.asarray(times, float)
    except (TypeError, ValueError) as error:
        message = f"`{name}` must be a list of numbers, got {times!r}."
        raise ValueError(message) from error
    if times.ndim != 1 or times.size == 0:
        raise ValueError(
            f"`{name}` must be a non-empty list of times, got shape {times.shape}."
        )
    if not np.all(np.isfinite(times)) or np.any(np.diff(times) <= 0):
        raise ValueError(
            f"`{name}` must be finite and strictly increasing, got {times}."
        )
    if times[0] < 0 or times[-1] > steps:
        raise ValueError(
            f"`{name}` must lie in [0, steps] = [0, {steps}], got {times[0]:g} to "
            f"{times[-1]:g}."
        )
    return times


def check_metrics(
    metrics: dict[str, Callable] | None, objective: FlatObjective, weights: Array
) -> dict[str, Callable]:
    """`metrics` as a dictionary, once they make sense."""
    metrics = {} if metrics is None else metrics
    if not isinstance(metrics, dict):
        raise ValueError(
            "`metrics` must be a dictionary from names to functions of the model, got "
            f"{type(metrics).__name__}."
        )
    for name, fn in metrics.items():
        if not isinstance(name, str) or not callable(fn):
            raise ValueError(
                f"`metrics` must map names to functions of the model, got {name!r}: "
                f"{fn!r}."
            )
        try:
            value = eqx.filter_eval_shape(objective.evaluate, {name: fn}, weights)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`metrics`: {name!r} must be a function of the model that returns one "
                f"number or array; calling it failed with: {error}"
            ) from error
        if not jnp.issubdtype(value[name].dtype, jnp.number):
            raise ValueError(
                f"`metrics`: {name!r} must return numbers, got {value[name].dtype}."
            )
    return metrics


def show_progress(progress: bool | None) -> bool:
    """By default progress is shown where somebody may be looking at it."""
    if progress is None:
        return sys.stderr.isatty() or "ipykernel" in sys.modules
    return progress


def warn_if_unconverged(count: Any) -> None:
    """Say that an inner solver stopped short of its tolerance."""
    if int(count):
        warnings.warn(
            "An eigensolver or a complementarity problem did not converge "
            f"{int(count)} times (`stats['unconverged']`): the eigenvalues may be "
            "inaccurate there.",
            stacklevel=3,
        )


class Clock:
    """Times calls of jitted functions, compilation apart from execution."""

    def __init__(self):
        self.seconds = 0.0
        self.compile_seconds = 0.0

    def __call__(self, fn: Callable, *args: Any) -> Any:
        if is_traced(args):
            return fn(*args)
        start = time.perf_counter()
        _last_compilation.clear()
        out = jax.block_until_ready(fn(*args))
        end = time.perf_counter()
        # A call traces, lowers, compiles and then runs: it ran from the end of the
        # last compilation on.
        ran = max([start, *_last_compilation])
        self.compile_seconds += ran - start
        self.seconds += end - ran
        return out


_last_compilation: list[float] = []


def _listen(event: str, duration: float, **kwargs: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _last_compilation.append(time.perf_counter())


jax.monitoring.register_event_duration_secs_listener(_listen)


@eqx.filter_jit
def _loss(flat: FlatObjective, weights: Float[Array, " n"]) -> Float[Array, ""]:
    return flat.loss(weights)


def _shapes(tree: PyTree) -> Any:
    return jax.tree.map(lambda x: tuple(getattr(x, "shape", (type(x),))), tree)
