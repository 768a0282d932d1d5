"""The stationary preconditioner: what an adaptive optimizer would settle on if its
weights stayed where they are and it went on oscillating."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PyTree

from .checks import require_integer, require_positive
from .measure import GUARDS, eigenpairs
from .objective import FlatObjective, Objective
from .optimizers import AbstractOptimizer, Diagonal
from .precision import full_precision
from .running import check_start


class StationaryPreconditioner(eqx.Module):
    """What [`centralflow.stationary_preconditioner`][] returns. (r is the rank, n the
    number of parameters.)

    - `preconditioner`: the diagonal of P, `[n]` or a scalar.
    - `state`: the optimizer state that has it.
    - `factors`: `[r, n]`, the rows f_i of the oscillation covariance Sigma = sum_i
        f_i f_i'.
    - `sharpness`: `[2]`, the largest eigenvalues of P^-1 H.
    - `complementarity`: how far Sigma is from acting only where the constraint is
        tight: the P^-1-norm of (H - kappa P) Sigma^1/2 over that of the mean gradients,
        `sqrt(<g * g, P^-1> + <H Sigma H, P^-1>)`.
    - `violation`: by how much the largest eigenvalue exceeds kappa, over kappa, or 0.
    - `iterations`, `products`: how many there were, of the latter Hessian-vector ones.
    - `converged`: whether the complementarity and the violation are within the
        tolerance. If only the violation is not, the rank was too small.
    """

    preconditioner: Diagonal
    state: PyTree[Array]
    factors: Float[Array, "r n"]
    sharpness: Float[Array, " k"]
    complementarity: Float[Array, ""]
    violation: Float[Array, ""]
    iterations: Int[Array, ""]
    products: Int[Array, ""]
    converged: Bool[Array, ""]


def stationary_preconditioner(
    objective: Objective,
    model: PyTree,
    optimizer: AbstractOptimizer,
    optimizer_state: PyTree = None,
    *,
    rank: int = 8,
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
) -> StationaryPreconditioner:
    """The preconditioner at which the optimizer's state is stationary at fixed weights,

        state_rate(s, g, g * g + diag(H Sigma H)) = 0,
        0 <= Sigma  perpendicular to  kappa P(s) - H >= 0.

    For RMSProp it solves a convex program: minimize over diagonal P

        tr(P) + eta^-2 <g * g, P^-1>   subject to   H <= kappa P

    (with eps = 0), whose multiplier is Z = (kappa / eta^2) Sigma. Where P is a number,
    it is P = max(P(g * g), lambda_max(H) / kappa): for Scalar RMSProp sqrt(nu) + eps =
    max(|g| + eps, eta lambda_max(H) / kappa). Any optimizer whose state relaxes has
    one; the learning rate is that of `optimizer_state`.

    The method needs products with H only. With Sigma = F F', F of `rank` columns, the
    equations say that P is that of the state stationary for the second moments g * g +
    rowsums (H F)^2, and that H F = kappa P F. They are iterated as they stand, but for
    a shift c,

        F <- P^-1 (H + c P) F / (kappa + c),

    a power method whose matrix depends on F. For RMSProp, H >= 0 and c = 0 this is the
    maximization of a minorant of the dual,

        <Z, H> + (2 / eta) sum_i |g_i| sqrt(1 - kappa Z_ii)   over Z >= 0,

    in which `<Z, H>`, convex in F, is linearized: it ascends. Eigenvalues of P^-1 H
    below -kappa would grow; c is 0.6 times the lowest that F shows, if it is negative.

    **Arguments:**

    - `objective`, `model`, `optimizer`: as of [`centralflow.train`][]; the weights are
        those of `model`.
    - `optimizer_state`: gives the time at which a schedule is evaluated; by default
        that of the first step.
    - `rank`: at least the number of eigenvalues that are critical at the stationary P.
    - `tolerance`: of the complementarity and of the violation.
    - `max_iterations`: of `rank` Hessian-vector products each.

    **Returns:**

    A [`centralflow.stationary.StationaryPreconditioner`][]; look at its `converged`.

    **Raises:**

    `ValueError` for arguments that make no sense.

    ??? cite "References"

        The stationary preconditioner: J. Cohen et al., arXiv 2410.24206. The iteration,
        for any convex function that is to be maximized:

        ```bibtex
        @article{journee2010generalized,
            author={Journée, Michel and Nesterov, Yurii and Richtárik, Peter and
                    Sepulchre, Rodolphe},
            title={Generalized power method for sparse principal component analysis},
            journal={Journal of Machine Learning Research},
            volume={11}, pages={517--553}, year={2010},
        }
        ```
    """
    require_integer("rank", rank)
    require_integer("max_iterations", max_iterations)
    require_positive("tolerance", tolerance, 1)
    flat, weights, state = check_start(objective, model, optimizer, 1, optimizer_state)
    return _solve(
        flat, weights, optimizer, state, min(rank, weights.size), tolerance,
        jnp.asarray(max_iterations),
    )  # fmt: skip


class _Iterate(eqx.Module):
    factors: Float[Array, "r n"]
    state: PyTree[Array]
    shift: Float[Array, ""]
    residual: Float[Array, ""]
    iterations: Int[Array, ""]


@eqx.filter_jit
def _solve(
    flat: FlatObjective,
    w: Float[Array, " n"],
    optimizer: AbstractOptimizer,
    state: PyTree,
    rank: int,
    tolerance: float,
    max_iterations: Int[Array, ""],
) -> StationaryPreconditioner:
    gradient = flat.grad(w)
    kappa = optimizer.critical_sharpness

    def iterate(previous: _Iterate) -> _Iterate:
        F = previous.factors
        HF = flat.hvps(w, F, rank)
        moments = gradient**2 + jnp.sum(HF**2, axis=0)
        new = optimizer.stationary_state(previous.state, gradient, moments)
        P = optimizer.preconditioner(new)
        # P changes, and the largest it has been may be far too large.
        shift = jnp.maximum(0.9 * previous.shift, -0.6 * _lowest(F, HF, P * F))
        return _Iterate(
            (HF / P + shift * F) / (kappa + shift),
            new,
            shift,
            _residual(HF, kappa * P * F, gradient, P),
            previous.iterations + 1,
        )

    # The iteration finds the scale of F by itself.
    state = optimizer.update_state(state, gradient)
    scale = optimizer.preconditioner(state)
    F = jr.normal(jr.key(0), (rank, w.size), w.dtype) / scale
    zero = jnp.zeros((), w.dtype)
    init = _Iterate(F, state, zero, zero + jnp.inf, jnp.int32(0))
    # It converges to more than the tolerance at little cost, and P is of second order.
    last = jax.lax.while_loop(
        lambda x: (x.residual > 0.1 * tolerance) & (x.iterations < max_iterations),
        iterate,
        init,
    )
    P = optimizer.preconditioner(last.state)
    wanted = min(2, w.size)
    k = min(wanted + GUARDS, w.size)
    start = last.factors[:k]
    start = jnp.zeros((k, w.size), w.dtype).at[: start.shape[0]].set(start)
    top = eigenpairs(flat, w, P, start, wanted, 0.1 * tolerance, jr.key(1))
    violation = jnp.maximum(top.values[0] / kappa - 1, 0)
    return StationaryPreconditioner(
        preconditioner=P,
        state=last.state,
        factors=last.factors,
        sharpness=top.values[:wanted],
        complementarity=last.residual,
        violation=violation,
        iterations=last.iterations,
        products=last.iterations * rank + top.products,
        converged=(last.residual <= tolerance)
        & (violation <= tolerance)
        & top.converged,
    )


@full_precision
def _lowest(
    F: Float[Array, "r n"], HF: Float[Array, "r n"], PF: Float[Array, "r n"]
) -> Float[Array, ""]:
    """The lowest eigenvalue of P^-1 H in the space of the rows of F, or zero."""
    g, Q = jnp.linalg.eigh(F @ PF.T)
    known = g > 1e3 * jnp.finfo(g.dtype).eps * g[-1]
    W = jnp.where(known, Q / jnp.sqrt(jnp.where(known, g, 1)), 0)
    H = W.T @ (F @ HF.T) @ W
    return jnp.minimum(jnp.linalg.eigvalsh((H + H.T) / 2)[0], 0)


@full_precision
def _residual(
    HF: Float[Array, "r n"], PF: Float[Array, "r n"], g: Float[Array, " n"], P: Diagonal
) -> Float[Array, ""]:
    norm_sq = lambda x: jnp.sum(x**2 / P)
    return jnp.sqrt(norm_sq(HF - PF) / (norm_sq(HF) + norm_sq(g)))
