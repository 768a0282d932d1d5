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
from jaxtyping import Array, Float, Int, PyTree

from .checks import require_integer
from .objective import FlatObjective, Objective, is_traced
from .optimizers import AbstractOptimizer
from .optimizers.base import check_schedule
from .sharding import Processes, automatic, is_first_process, on_host

_CHUNK_SECONDS = 0.5


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
    require_integer("steps", steps)
    weights, flat = objective.flatten(model)
    optimizer_state = automatic(optimizer_state)
    at_once = Objective(objective.loss_fn, objective.data)
    loss = eqx.filter_eval_shape(at_once.flatten(model)[1].loss, weights)
    if not isinstance(loss, jax.ShapeDtypeStruct) or loss.shape != ():
        raise ValueError(
            "`loss_fn` must return a scalar array, the mean over the examples of the "
            f"batch; it returned {_arrays(loss)}."
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise ValueError(f"`loss_fn` must return a real number, got {loss.dtype}.")
    like = eqx.filter_eval_shape(optimizer.init, weights)
    for x in jax.tree.leaves(like):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                "`optimizer` must have a state of floating-point arrays, counts among "
                f"them, for a flow changes all of it continuously; its `init` returned "
                f"one of {x.dtype}."
            )
    if optimizer_state is None:
        optimizer_state = optimizer.init(weights)
    elif _arrays(optimizer_state) != _arrays(like):
        raise ValueError(
            f"`optimizer_state` does not belong to this optimizer and model: it has "
            f"the arrays {_arrays(optimizer_state)}, not {_arrays(like)}."
        )
    traced = is_traced((objective, weights, optimizer, optimizer_state))
    first = 0 if traced else optimizer.updates(optimizer_state)
    if not first >= 0:
        raise ValueError(
            f"`optimizer_state` is that of {float(first):g} updates; there must be "
            "none or more."
        )
    check_schedule(optimizer.learning_rate, first, int(steps))
    P = eqx.filter_eval_shape(optimizer.preconditioner, like)
    if getattr(P, "shape", None) not in ((), weights.shape):
        raise ValueError(
            "`optimizer` must have a `preconditioner` that is a scalar array or one of "
            f"the weights' shape {weights.shape}; it returned {_arrays(P)}."
        )
    if not traced:
        values = probe(flat, weights, optimizer, optimizer_state)
        _check_values(*map(on_host, values))
    return flat, weights, optimizer_state


def _check_values(loss: np.ndarray, gradient: np.ndarray, P: np.ndarray) -> None:
    """Raise unless loss, gradient and preconditioner are those of a possible step."""
    for name, value in (("", loss), ("'s gradient", gradient)):
        bad = value[~np.isfinite(value)]
        if bad.size:
            raise ValueError(
                f"`loss_fn`{name} is {bad.flat[0]} at the initial `model`: it must be "
                "finite at the start. Look for NaN or infinity in the data and the "
                "parameters, and for functions such as the root with no derivative "
                "there."
            )
    P = np.broadcast_to(P, gradient.shape)
    dead = np.flatnonzero(P == 0)
    if dead.size:
        raise ValueError(
            f"`optimizer` divides by zero at {dead.size} of {P.size} parameters, the "
            f"first at index {dead[0]} of the flat weights: their squared gradient has "
            "been exactly zero so far, and so is the preconditioner. Give `optimizer` "
            "a positive `eps`, such as 1e-8, or make these parameters constants of "
            "`model`."
        )
    bad = np.flatnonzero(~((P > 0) & np.isfinite(P)))
    if bad.size:
        raise ValueError(
            f"`optimizer_state` gives the preconditioner {P[bad[0]]} at index {bad[0]} "
            "of the flat weights; it must be positive and finite. Look for negative "
            "second moments and NaN in `optimizer_state`."
        )


def check_coordinates(coordinates: Any, size: int) -> Int[np.ndarray, " C"]:
    """`coordinates` as an array, once they are indices of the flat weights."""
    if coordinates is None:
        return np.zeros(0, np.int32)
    try:
        indices = np.asarray(coordinates)
        whole = indices.size == 0 or np.issubdtype(indices.dtype, np.integer)
    except (TypeError, ValueError):
        indices, whole = None, False
    if not whole or indices.ndim != 1:
        raise ValueError(
            "`coordinates` must be a list of indices of the flat weights, integers, "
            f"got {coordinates!r}."
        )
    outside = indices[(indices < 0) | (indices >= size)]
    if outside.size:
        raise ValueError(
            f"`coordinates` must lie in [0, {size}), the number of parameters, got "
            f"{outside[0]}."
        )
    return indices.astype(np.int32)


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
        except Exception as error:  # any that a user's function can raise
            raise ValueError(
                f"`metrics`: {name!r} must be a function of the model that returns one "
                f"number or array; calling it failed with: {type(error).__name__}: "
                f"{error}"
            ) from error
        kinds = jnp.floating, jnp.integer
        if not any(jnp.issubdtype(value[name].dtype, kind) for kind in kinds):
            raise ValueError(
                f"`metrics`: {name!r} must return real numbers, got "
                f"{value[name].dtype}."
            )
    return metrics


def show_progress(progress: bool | None) -> bool:
    """By default progress is shown where somebody may be looking at it."""
    if progress is None:
        return sys.stderr.isatty() or "ipykernel" in sys.modules
    return bool(progress)


def warn_if_unconverged(count: Any) -> None:
    """Say that an inner solver stopped short of its tolerance."""
    if int(count) and is_first_process():
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
        self.last = 0.0  # of the last call, without compilation

    def header(self) -> dict[str, float]:
        """What to write down of it."""
        return dict(seconds=self.seconds, compile_seconds=self.compile_seconds)

    def add(self, header: dict[str, Any]) -> None:
        """Go on from what was written down."""
        self.seconds += header["seconds"]
        self.compile_seconds += header["compile_seconds"]

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
        self.last = end - ran
        self.seconds += self.last
        return out


class Pace:
    """How many steps to hand over to compiled code at once: as many as take about half
    a second, for that is how long an interrupt may have to wait."""

    def __init__(self, processes: Processes):
        self.steps, self._processes = 1, processes

    def learn(self, steps: int, seconds: float) -> None:
        """So many steps took so long."""
        count = steps * _CHUNK_SECONDS / max(seconds, 1e-6)
        count = int(np.clip(count, 1, 16 * self.steps))
        # Several processes must all run the same programs.
        self.steps = self._processes.first(count)


_last_compilation: list[float] = []


def _listen(event: str, duration: float, **kwargs: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _last_compilation.append(time.perf_counter())


jax.monitoring.register_event_duration_secs_listener(_listen)


@eqx.filter_jit
def probe(
    flat: FlatObjective,
    weights: Float[Array, " n"],
    optimizer: AbstractOptimizer,
    optimizer_state: PyTree,
) -> tuple[Array, Array, Array]:
    """Loss, gradient and preconditioner of the first step."""
    loss, gradient = flat.value_and_grad(weights)
    state = optimizer.update_state(optimizer_state, gradient)
    return loss, gradient, optimizer.preconditioner(state)


def _arrays(tree: PyTree) -> Any:
    describe = lambda x: f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)
    return jax.tree.map(describe, tree)
