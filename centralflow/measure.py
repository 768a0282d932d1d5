"""What is measured of a discrete run: midpoints, and the eigenpairs of P^-1 H there."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .checks import require_integer, require_positive
from .eigen import top_eigenpairs
from .objective import FlatObjective, Objective, is_traced
from .optimizers import AbstractOptimizer, Diagonal
from .running import check_start

# Eigenvectors tracked beyond those asked for.
GUARDS = 2
_SWEEPS = 200


def second_difference(
    before: Float[Array, "... n"],
    here: Float[Array, "... n"],
    after: Float[Array, "... n"],
) -> Float[Array, "... n"]:
    """(w_{t+1} - 2 w_t + w_{t-1}) / 4: zero on the linear part of a path, and -delta_t
    on an oscillation w_t = w + delta_t of period two."""
    return (after - 2 * here + before) / 4


def midpoints(weights: Float[Array | np.ndarray, "T n"]) -> Float[Array, "S n"]:
    """The second-order midpoints of a discrete run,

        (2 w_t + w_{t+1} + w_{t-1}) / 4,    t = 1, ..., T - 2,

    where an oscillation of period two cancels and a straight path stays as it is.

    **Arguments:**

    - `weights`: `[T, n]`, the weights at consecutive steps, T >= 3, such as the
        `weights` of `train(..., weight_times=range(steps + 1))`.

    **Returns:**

    `[T - 2, n]`.

    **Raises:**

    `ValueError` if there are fewer than three.
    """
    message = "`weights` must be those of three or more consecutive steps, [T, n], got "
    try:
        weights = jnp.asarray(weights)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{message}{weights!r}.") from error
    if weights.ndim != 2 or weights.shape[0] < 3:
        raise ValueError(f"{message}an array of shape {weights.shape}.")
    here = weights[1:-1]
    return here + second_difference(weights[:-2], here, weights[2:])


class Sharpness(eqx.Module):
    """The top eigenpairs of P^-1 H at one point.

    - `values`: `[k]`, descending.
    - `vectors`: `[k, n]`, the eigenvectors u_i as rows, with u_i' P u_j = 1 if i = j,
        else 0.
    - `residuals`: `[k]`, |P^-1/2 (H - value P) u|, which bounds the distance of each
        value to the spectrum.
    - `products`: the number of Hessian-vector products.
    - `converged`: whether the residuals are within the tolerance.
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k n"]
    residuals: Float[Array, " k"]
    products: Int[Array, ""]
    converged: Bool[Array, ""]


def sharpness(
    objective: Objective,
    model: PyTree,
    optimizer: AbstractOptimizer,
    optimizer_state: PyTree,
    *,
    count: int = 1,
    tolerance: float = 1e-3,
) -> Sharpness:
    """The largest eigenvalues of P^-1 H, the sharpness in the units of the optimizer,
    and their eigenvectors. The optimizer oscillates where one is above its
    `critical_sharpness`.

    **Arguments:**

    - `objective`, `optimizer`: as of [`centralflow.train`][].
    - `model`: where to measure. With `weights, flat = objective.flatten(model)`, the
        model of other weights `w [n]`, such as [`centralflow.midpoints`][], is
        `flat.model(w)`.
    - `optimizer_state`: the state that makes the step, into which the gradient of that
        step has entered: `optimizer.update_state(run.optimizer_state, gradient)`.
    - `count`: how many eigenvalues.
    - `tolerance`: the residual norm of each eigenpair over the largest eigenvalue. The
        error of an eigenvalue is of second order in it.

    **Returns:**

    A [`centralflow.measure.Sharpness`][].

    **Raises:**

    `ValueError` for arguments that make no sense.
    """
    require_integer("count", count)
    require_positive("tolerance", tolerance, 1)
    flat, weights, state = check_start(objective, model, optimizer, 1, optimizer_state)
    if count > weights.size:
        raise ValueError(
            f"`count` is {count}, but `model` has {weights.size} parameters."
        )
    P = optimizer.preconditioner(state)
    if not is_traced(P) and not bool(jnp.all((P > 0) & jnp.isfinite(P))):
        raise ValueError(
            "`optimizer_state` gives a preconditioner that is not positive and finite. "
            "If no gradient has entered it yet, let it take in the one of its step, "
            "`optimizer.update_state(state, gradient)`."
        )
    start = jnp.zeros((min(count + GUARDS, weights.size), weights.size), weights.dtype)
    return _sharpness(flat, weights, optimizer, state, start, int(count), tolerance)


@eqx.filter_jit
def _sharpness(
    flat: FlatObjective,
    weights: Float[Array, " n"],
    optimizer: AbstractOptimizer,
    state: PyTree,
    start: Float[Array, "k n"],
    count: int,
    tolerance: Any,
) -> Sharpness:
    P = optimizer.preconditioner(state)
    found = eigenpairs(flat, weights, P, start, count, tolerance, jr.key(0))
    first = lambda x: x[:count]
    return Sharpness(
        first(found.values),
        first(found.vectors),
        first(found.residuals),
        found.products,
        found.converged,
    )


def eigenpairs(
    flat: FlatObjective,
    weights: Float[Array, " n"],
    P: Diagonal,
    start: Float[Array, "k n"],
    wanted: int,
    tolerance: Any,
    key: PRNGKeyArray,
) -> Sharpness:
    """All k eigenpairs of P^-1 H found from the guesses `start`, of which the first
    `wanted` have converged."""
    root = jnp.sqrt(P)
    k = start.shape[0]
    pairs = top_eigenpairs(
        flat.preconditioned_hessian(weights, P),
        start * root,
        k,
        min(wanted, k),
        tolerance=jnp.asarray(tolerance, weights.dtype),
        max_sweeps=_SWEEPS,
        key=key,
    )
    return Sharpness(
        pairs.values,
        pairs.vectors / root,
        pairs.residuals,
        pairs.products,
        pairs.converged,
    )
