"""What a run returns, discrete or continuous, and how it is saved."""

import os
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from .checks import as_path
from .files import by_path, check_folder, read_arrays, write_arrays
from .messages import describe, message
from .results import RESULTS, name_of, result_of
from .sharding import is_first_process, on_host

_SERIES = (
    "times",
    "loss",
    "mean_loss",
    "grad_norm_sq",
    "mean_grad_norm_sq",
    "sharpness",
    "oscillation",
    "weight_times",
    "weights",
)
_ADDITIONAL = (
    "coordinates",
    "gradient_sq",
    "step_sizes",
    "trace_covariance",
    "failure_time",
    "failure_value",
)


class Trajectory(eqx.Module):
    """A run of an optimizer, or of a flow that predicts one.

    **Attributes:** (T reported times, K tracked eigenvalues, n parameters, C of which
    were asked for)

    - `times`: `[T]`, in optimizer steps from the start of this run.
    - `loss`: `[T]`, the loss at the iterate.
    - `mean_loss`: `[T]`. Of a flow: the predicted time-average of the optimizer's loss.
        Of a discrete run: `loss`.
    - `grad_norm_sq`, `mean_grad_norm_sq`: `[T]`, the same for the squared norm of the
        gradient.
    - `sharpness`: `[T, K]`, the top eigenvalues of P^-1 H, descending; NaN where not
        tracked. Of a discrete run they are measured at the second-order midpoints
        (2 w_t + w_{t+1} + w_{t-1}) / 4, where most of the oscillation cancels.
    - `oscillation`: `[T, K]`, the variances of the oscillation: eigenvalues of its
        covariance in the tracked eigenspace in the P-inner product, descending. Of a
        discrete run they are averages over the steps since the previous measurement.
    - `metrics`: user-defined series, each `[T, ...]`.
    - `weight_times`, `weights`: `[S]` and `[S, n]`, the flattened weights at a few
        times, the first and the last among them.
    - `model`, `optimizer_state`: at the end, before the gradient there is taken in:
        what is needed to go on with `train` or `predict`.
    - `critical_sharpness`: where the optimizer's sharpness is pinned.
    - `result`: how the run ended, one of [`centralflow.RESULTS`][].
    - `stats`: `gradients`, `hvps`, `third_derivatives`, each a number of evaluations on
        the full data set; `unconverged`, how often an inner solver stopped short of its
        tolerance; `eigen_residual`, the largest residual norm of an eigenpair, over the
        largest eigenvalue; `accepted_steps`, `rejected_steps`; `seconds` of execution
        and `compile_seconds` apart.
    - `coordinates`: `[C]`, the indices of the parameters that were asked for.
    - `gradient_sq`: `[T, C]`, their squared gradient; of a flow, its predicted
        time-average E[g * g].
    - `step_sizes`: `[T, C]`, their effective step size, the diagonal of P^-1.
    - `trace_covariance`: `[T]`, of a flow, the trace of the oscillation covariance
        Sigma, in the Euclidean inner product. Of a discrete run, the squared distance
        of the iterate from the second-order midpoint, whose time-average it is; NaN at
        the first step. Each of these four is `None` in trajectories that lack it.
    - `failure_time`, `failure_value`: of a run that failed, the time at which it did,
        and the number that shows it: the loss, the largest entry of what is not finite,
        the residual, and so on. NaN if it did not.
    - `solver_state`: of a flow, what `predict` needs to go on as if it had not
        stopped. It is not saved.
    """

    times: Float[Array, " T"]
    loss: Float[Array, " T"]
    mean_loss: Float[Array, " T"]
    grad_norm_sq: Float[Array, " T"]
    mean_grad_norm_sq: Float[Array, " T"]
    sharpness: Float[Array, "T K"]
    oscillation: Float[Array, "T K"]
    metrics: dict[str, Array]
    weight_times: Float[Array, " S"]
    weights: Float[Array, "S n"]
    model: PyTree
    optimizer_state: PyTree
    critical_sharpness: Any
    result: Any
    stats: dict[str, Any]
    coordinates: Int[Array, " C"] | None = None
    gradient_sq: Float[Array, "T C"] | None = None
    step_sizes: Float[Array, "T C"] | None = None
    trace_covariance: Float[Array, " T"] | None = None
    failure_time: Float[Array, ""] | None = None
    failure_value: Float[Array, ""] | None = None
    solver_state: Any = None

    @property
    def gradient_equivalents(self) -> Any:
        """The work as a number of gradients: a Hessian-vector product counts 2 and a
        third derivative 4."""
        s = self.stats
        return s["gradients"] + 2 * s["hvps"] + 4 * s["third_derivatives"]

    def save(self, path: str | os.PathLike) -> None:
        """Write the trajectory to one `.npz` file of plain arrays, atomically. Of
        several processes all must call this, and the first writes.

        **Arguments:**

        - `path`: the file. Its folder must exist.

        **Raises:**

        `FileNotFoundError` if the folder does not exist, `IsADirectoryError` if `path`
        is one; `ValueError` for a batch.
        """
        path = check_folder("path", as_path(path))
        check_single("trajectory", self)
        arrays = {
            name: on_host(getattr(self, name))
            for name in (*_SERIES, *_ADDITIONAL)
            if getattr(self, name) is not None
        }
        for i, series in enumerate(self.metrics.values()):
            arrays[f"metrics{i}"] = on_host(series)
        for name in ("model", "optimizer_state"):
            tree = eqx.filter(getattr(self, name), eqx.is_array)
            arrays |= by_path(name, tree)
        header = dict(
            metrics=list(self.metrics),
            critical_sharpness=float(self.critical_sharpness),
            result=name_of(self.result),
            stats={k: np.asarray(v).item() for k, v in self.stats.items()},
        )
        if is_first_process():
            write_arrays(path, "trajectory", header, arrays)

    @staticmethod
    def load(
        path: str | os.PathLike, *, model: PyTree = None, optimizer_state: PyTree = None
    ) -> "Trajectory":
        """Read what [`centralflow.Trajectory.save`][] wrote. Nothing in the file is
        executed; an error says which version of the package wrote it.

        **Arguments:**

        - `path`: the file.
        - `model`, `optimizer_state`: objects of the structure that was saved, whose
            arrays are replaced. Without them the arrays come back in a dictionary from
            their paths.

        **Raises:**

        `FileNotFoundError` if there is no such file; `ValueError` if it is not a
        trajectory or does not fit `model` or `optimizer_state`.
        """
        header, arrays = read_arrays("path", as_path(path), "trajectory")
        try:
            fields = _read(header, arrays)
        except Exception as error:  # a file that fits can be wrong in many ways
            raise ValueError(
                f"`path`: {os.fspath(path)!r}, written by centralflow "
                f"{header.get('version', 'of unknown version')}, is not a trajectory "
                f"({type(error).__name__}: {error})."
            ) from error
        return Trajectory(
            **fields,
            model=_fill("model", model, arrays),
            optimizer_state=_fill("optimizer_state", optimizer_state, arrays),
        )

    def __str__(self) -> str:
        if self.times.ndim != 1:
            return repr(self)
        end = "" if self.result == RESULTS.successful else f"\n  {describe(self)}"
        work = ", ".join(f"{k} {_short(v)}" for k, v in self.stats.items())
        return (
            f"Trajectory over steps {float(self.times[0]):g} to "
            f"{float(self.times[-1]):g}{end}\n"
            f"  loss {float(self.loss[0]):.4g} -> {float(self.loss[-1]):.4g}\n  {work}"
        )


class RunInterrupted(UserWarning):
    """A run ended early because of Ctrl-C. To let that end a script too, make it an
    error: `warnings.simplefilter("error", centralflow.RunInterrupted)`."""


class NumericalFailure(RuntimeError):
    """A run that did not reach its end. What it had computed is in `trajectory`."""

    def __init__(self, message: str, trajectory: Trajectory):
        super().__init__(message)
        self.trajectory = trajectory


def finish(trajectory: Trajectory, optimizer: Any, throw: bool) -> Trajectory:
    """Raise if the run failed and `throw`; otherwise return it as it is, with a warning
    if it was interrupted."""
    if trajectory.result == RESULTS.interrupted:
        warnings.warn(
            f"{RESULTS[trajectory.result]} What it had computed, up to step "
            f"{float(trajectory.times[-1]):g}, is returned.",
            RunInterrupted,
            stacklevel=3,
        )
        return trajectory
    if throw and trajectory.result != RESULTS.successful:
        raise NumericalFailure(message(trajectory, optimizer), trajectory)
    return trajectory


def check_single(name: str, trajectory: Any) -> None:
    """Raise `ValueError` unless `trajectory` is one trajectory, no batch of them."""
    if not isinstance(trajectory, Trajectory):
        raise ValueError(f"`{name}` must be a Trajectory, got {trajectory!r}.")
    if trajectory.times.ndim != 1:
        raise ValueError(
            f"`{name}` must be one trajectory, not a batch of trajectories as made by "
            "`jax.vmap`: take one with `jax.tree.map(lambda x: x[i], trajectories)`."
        )


def check_comparable(run: Any, **others: Any) -> None:
    """Raise `ValueError` unless all are trajectories of models of one size."""
    check_single("run", run)
    for name, other in others.items():
        check_single(name, other)
        sizes = [x.weights.shape[1] for x in (run, other)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"`run` has {sizes[0]} parameters and `{name}` {sizes[1]}: they belong "
                "to different models."
            )


def _read(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a trajectory but for its PyTrees, removed from `arrays`."""
    fields = {
        name: jnp.asarray(arrays.pop(name))
        for name in (*_SERIES, *_ADDITIONAL)
        if name in _SERIES or name in arrays
    }
    metrics = {
        name: jnp.asarray(arrays.pop(f"metrics{i}"))
        for i, name in enumerate(header["metrics"])
    }
    other = ("weight_times", "weights", "coordinates")
    series = [x for name, x in fields.items() if x.ndim and name not in other]
    if len({len(x) for x in [*series, *metrics.values()]}) > 1:
        raise ValueError("its series differ in length")
    return fields | dict(
        metrics=metrics,
        critical_sharpness=header["critical_sharpness"],
        result=result_of(header["result"]),
        stats=dict(header["stats"]),
    )


def _fill(name: str, like: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
    saved = {k.removeprefix(name): v for k, v in arrays.items() if k.startswith(name)}
    if like is None:
        return {key: jnp.asarray(value) for key, value in saved.items()}
    dynamic, static = eqx.partition(like, eqx.is_array)
    paths, treedef = jax.tree_util.tree_flatten_with_path(dynamic)
    wanted = {jax.tree_util.keystr(key): leaf.shape for key, leaf in paths}
    found = {key: value.shape for key, value in saved.items()}
    if wanted != found:
        raise ValueError(
            f"`{name}` does not fit the file: it has arrays {wanted}, the file {found}."
        )
    leaves = [jnp.asarray(saved[jax.tree_util.keystr(key)]) for key, _ in paths]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), static)


def _short(value: Any) -> str:
    return f"{np.asarray(value).item():.4g}"
