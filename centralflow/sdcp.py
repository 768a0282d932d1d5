"""Semidefinite complementarity problems: find `X ⪰ 0` with `A + B[X] ⪰ 0`, `⟂ X`."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .precision import full_precision


class SDCPSolution(eqx.Module):
    """What [`centralflow.sdcp.solve_sdcp`][] returns.

    **Arguments:**

    - `X`: the solution: symmetric, positive semidefinite up to rounding, and exactly
        zero on the rows that are not in use.
    - `slack`: `S = A + B[X]`, recomputed from `X`; zero on the rows not in use.
    - `residual`: the largest of `-λ_min(X)/‖X‖`, `-λ_min(S)/σ` and `|⟨X, S⟩|/(‖X‖σ)`,
        with `σ = ‖A‖ + ‖B[X]‖`. The norms are Frobenius norms, taken after the diagonal
        congruence and the scaling that normalise the problem, so that this does not
        depend on the units of `A`, of `B`, or of any one row.
    - `steps`: the number of matrices factorised.
    - `converged`: whether `residual` is at most `rtol`, and `X` is small enough for the
        rounding of `B` not to matter more than that.
    """

    X: Float[Array, "k k"]
    slack: Float[Array, "k k"]
    residual: Float[Array, ""]
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


# A symmetric matrix is a vector in the orthonormal basis of `svec`, so that
# self-adjoint maps are symmetric matrices. With `vec` they would be as well, at `k²`
# rather than `m = k(k+1)/2` unknowns: six times the work of a factorisation.


def _basis(k: int, dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, cols = np.triu_indices(k)
    return rows, cols, np.where(rows == cols, 1, np.sqrt(2)).astype(dtype)


def _svec(M: Float[Array, "k k"]) -> Float[Array, " m"]:
    rows, cols, weight = _basis(M.shape[0], M.dtype)
    return weight * M[rows, cols]


def _smat(v: Float[Array, " m"]) -> Float[Array, "k k"]:
    k = (int(np.sqrt(8 * v.size + 1)) - 1) // 2
    rows, cols, weight = _basis(k, v.dtype)
    index = np.zeros((k, k), int)
    index[rows, cols] = index[cols, rows] = np.arange(v.size)
    return (v / weight)[index]


def _congruence(G: Float[Array, "k k"]) -> Float[Array, "m m"]:
    """The matrix of `M ↦ G M Gᵀ`."""
    rows, cols, weight = _basis(G.shape[0], G.dtype)
    P, Q = G[rows], G[cols]
    K = P[:, rows] * Q[:, cols] + P[:, cols] * Q[:, rows]
    return weight[:, None] * weight / 2 * K


def _inverse(M: Float[Array, "m m"]) -> Callable:
    """Solves with one positive definite matrix, factorised once."""
    operator = lx.MatrixLinearOperator((M + M.T) / 2, lx.positive_semidefinite_tag)
    solver = lx.Cholesky()
    state = solver.init(operator, {})

    def solve(v):
        # `throw=False`: a breakdown is NaN, and NaN ends the loops below.
        return lx.linear_solve(operator, v, solver, state=state, throw=False).value

    return solve


class _Problem(eqx.Module):
    """`A` and `B`, normalised, the latter as a matrix."""

    A: Float[Array, "k k"]
    B: Float[Array, "m m"]

    def __call__(self, X: Float[Array, "k k"]) -> Float[Array, "k k"]:
        return _smat(self.B @ _svec(X))


# Newton's method on one equation. Complementary `X` and `S` commute, so that they are
# the positive and the negative part of one matrix `Z = X - S`, and the problem is
# F(Z) = A + B[Z₊] - (-Z)₊ = 0. It is semismooth, and if `B` is positive definite then
# its generalised Jacobians are nonsingular, whether or not complementarity is strict:
# quadratic convergence, to rounding. (An interior-point method then gets no closer than
# the square root of its gap.)


class _Newton(eqx.Module):
    Z: Float[Array, "k k"]
    U: Float[Array, "k k"]
    z: Float[Array, " k"]
    F: Float[Array, "k k"]
    error: Float[Array, ""]
    steps: Int[Array, ""]

    @property
    def X(self) -> Float[Array, "k k"]:
        return (self.U * jnp.maximum(self.z, 0)) @ self.U.T


def _evaluate(problem: _Problem, Z: Float[Array, "k k"], steps) -> _Newton:
    z, U = jnp.linalg.eigh(Z)
    X = (U * jnp.maximum(z, 0)) @ U.T
    BX = problem(X)
    F = problem.A + BX - (X - Z)
    norm = jnp.linalg.norm
    return _Newton(Z, U, z, F, norm(F) / (norm(problem.A) + norm(BX)), steps)


def _newton(problem: _Problem, init: _Newton, atol: float, max_steps: int) -> _Newton:
    k = problem.A.shape[0]
    rows, cols, _ = _basis(k, problem.A.dtype)
    # A proximal term, which picks a step when `B` is singular on the face of `X`. It is
    # about the rounding of the matrix it is added to: what converges is not slowed.
    prox = 256 * k * float(jnp.finfo(problem.A.dtype).eps)

    def cond(state):
        return (state.error > atol) & (state.steps < max_steps)

    def body(state):
        U, z = state.U, state.z
        # In the eigenbasis of Z the derivative of Z₊ multiplies by Ω_ij, the divided
        # difference of max(·, 0); it is 1 or 0 without rounding when the signs agree.
        # Newton's equation is B[Ω∘H] + (1 - Ω)∘H = -F. Its matrix is not symmetric;
        # that of V = Ω^½∘H is, and H = Ω^½∘V - F - B[Ω^½∘V] needs no division by Ω.
        x, y = z[rows], z[cols]
        total = jnp.abs(x) + jnp.abs(y)
        omega = (jnp.maximum(x, 0) + jnp.maximum(y, 0)) / jnp.where(total, total, 1)
        root = jnp.sqrt(omega)
        K = _congruence(U)
        B = K.T @ problem.B @ K
        F = _svec(U.T @ state.F @ U)
        inverse = _inverse(root[:, None] * B * root + jnp.diag(1 - omega + prox))
        V = -root * inverse(root * F)
        H = V - F - B @ V
        return _evaluate(problem, state.Z + U @ _smat(H) @ U.T, state.steps + 1)

    return jax.lax.while_loop(cond, body, init)


# Nothing makes Newton's method converge from afar, nor where `B` is singular on the
# face of `X`; an interior-point method does. (Damping needs a merit function, and
# ½‖F‖² may be stationary where F is not zero, when `B` is singular.)
#
# Its iterates are X = G Λ Gᵀ and S = G⁻ᵀ Λ G⁻¹: the Nesterov-Todd scaling by G turns
# both into the diagonal matrix Λ. Only G and Λ are kept. `X` and `S` would lose their
# small eigenvalues, of the size of the gap, to rounding, and have no Cholesky factors.
# Newton's equation has the matrix 1 + GᵀB[G · Gᵀ]G in the scaled space: its eigenvalues
# are at least one, also when `B` is singular or zero.


class _Interior(eqx.Module):
    G: Float[Array, "k k"]
    scaled: Float[Array, " k"]
    infeasibility: Float[Array, ""]
    error: Float[Array, ""]
    steps: Int[Array, ""]

    @property
    def X(self) -> Float[Array, "k k"]:
        return (self.G * self.scaled) @ self.G.T


def _interior_point(
    problem: _Problem, init: _Interior, atol: float, max_steps: int
) -> _Interior:
    identity = jnp.eye(problem.B.shape[0], dtype=problem.B.dtype)

    def cond(state):
        return (state.error > atol) & (state.steps < max_steps)

    def length(y):
        return jnp.minimum(1, -1 / jnp.minimum(jnp.min(y), -0.1))

    def body(state):
        G, scaled = state.G, state.scaled
        K = _congruence(G)
        inverse = _inverse(identity + K.T @ problem.B @ K)
        point = jnp.diag(scaled)
        slack = G.T @ (problem.A + problem(state.X)) @ G
        root = jnp.sqrt(scaled)

        def direction(target):
            # dX + dS = target, and dS is what makes the slack feasible.
            dX = _smat(inverse(_svec(target - slack + point)))
            return jnp.stack([dX, target - dX])

        # Mehrotra: how far does the step to the boundary get? Centre accordingly.
        D = direction(-point)
        step = length(jnp.linalg.eigvalsh(D / (root[:, None] * root)))
        X, S = point + step * D
        gap = jnp.sum(scaled**2)
        centre = (jnp.sum(X * S) / gap) ** 3 * gap / scaled.size
        dXdS = D[0] @ D[1]
        R = jnp.diag(centre - scaled**2) - (dXdS + dXdS.T) / 2
        D = direction(2 * R / (scaled[:, None] + scaled))
        # Λ + step * D = L Lᵀ from the eigenvalues which the length of the step needs;
        # one length for both, as they share the residual.
        y, V = jnp.linalg.eigh(D / (root[:, None] * root))
        step = length(y / 0.99)
        L, R = root[:, None] * V * jnp.sqrt(1 + step * y)[:, None]
        _, scaled, Vt = jnp.linalg.svd(R.T @ L)
        G = G @ L @ Vt.T / jnp.sqrt(scaled)
        # S - A - B[X] shrinks by exactly this; measured, it would be its rounding.
        infeasibility = state.infeasibility * (1 - step)
        objective = jnp.abs(jnp.sum(problem.A * ((G * scaled) @ G.T)))
        error = jnp.maximum(jnp.sum(scaled**2) / objective, infeasibility)
        new = _Interior(G, scaled, infeasibility, error, state.steps + 1)
        # Else stay, and stop.
        ok = jnp.isfinite(error) & jnp.all(jnp.isfinite(G)) & (step > 1e-3)
        old = _Interior(
            state.G,
            state.scaled,
            state.infeasibility,
            jnp.zeros_like(error),
            new.steps,
        )
        return jax.tree.map(lambda x, y: jnp.where(ok, x, y), new, old)

    return jax.lax.while_loop(cond, body, init)


def _power_of_two(x: Array) -> Array:
    """Scaling by it is exact. (`exp2` of an integer need not be.)"""
    return jnp.ldexp(jnp.ones_like(x), jnp.frexp(x)[1])


def _equilibrate(
    A: Float[Array, "k k"], B: Float[Array, "m m"]
) -> tuple[_Problem, Float[Array, " k"], Float[Array, ""]]:
    """`A` and `B` after `X ↦ alpha * D X D`, with entries of about one."""
    k, eps = A.shape[0], float(jnp.finfo(A.dtype).eps)
    rows, cols, _ = _basis(k, A.dtype)
    # B_ijij ≈ (d_i d_j)⁻² by Ruiz' iteration. Not d_i = B_iiii^-¼: this need not bound
    # B_ijij, and B_iiii may be zero.
    size = _smat(jnp.sqrt(jnp.maximum(jnp.diag(B), 0)))
    d = jnp.ones_like(A[0])
    for _ in range(6):
        row = jnp.max(d[:, None] * size * d, axis=1)
        d = d / jnp.sqrt(jnp.where(row > 0, row, 1))
    # A solution has the size of the negative part of A: a row whose A_ii is far above
    # it is shrunk until it is not, lest tolerances be relative to A_ii. Rows on which B
    # is zero have only A_ii to be measured by.
    scaled = A * d[:, None] * d
    eigenvalues = jnp.linalg.eigvalsh(scaled)
    noise = k * eps * jnp.max(jnp.abs(eigenvalues))
    alpha = jnp.maximum(-eigenvalues[0], noise)
    alpha = _power_of_two(jnp.where(alpha > 0, alpha, 1))
    diag = jnp.diag(scaled)
    far = (diag > alpha) | ((jnp.max(size, axis=1) == 0) & (diag > 0))
    d = _power_of_two(d * jnp.sqrt(jnp.where(far, alpha / diag, 1)))
    scale = (d[:, None] * d)[rows, cols]
    problem = _Problem(A * d[:, None] * d / alpha, B * scale[:, None] * scale)
    return problem, d, alpha


@full_precision
def solve_sdcp(
    A: Float[Array, "k k"],
    B: Float[Array, "k k k k"],
    mask: Bool[Array, " k"] | None = None,
    *,
    rtol: float | None = None,
    max_steps: int = 40,
) -> SDCPSolution:
    """Finds a symmetric `X ⪰ 0` with `S = A + B[X] ⪰ 0` and `⟨X, S⟩ = 0`.

    Equivalently `X` minimises `½⟨X, B[X]⟩ + ⟨A, X⟩` over `X ⪰ 0`. Semismooth Newton
    steps come first. Should they not converge, an interior-point method does the work
    and Newton steps remove its last error. If `A ⪰ 0` then `X` is exactly zero, and
    found in no steps.

    **Arguments:**

    - `A`: a symmetric matrix.
    - `B`: a self-adjoint and positive semidefinite map on symmetric matrices,
        `B[X]_ij = Σ_kl B_ijkl X_kl`, with `B_ijkl = B_jikl = B_klij`. If it is singular
        then `X` need not be unique. (`B[X]` is.)
    - `mask`: the rows in use. The others may hold anything finite. Defaults to all.
    - `rtol`: the residual up to which to say `converged`. The steps always go on to the
        rounding of the dtype. Defaults to the square root of its epsilon.
    - `max_steps`: the most interior-point steps.

    **Returns:**

    A [`centralflow.sdcp.SDCPSolution`][]. Failure, as for a problem without solution,
    is `converged=False`, with a finite `X`.

    **Raises:**

    `ValueError` if shapes do not fit.

    ??? cite "References"

        Newton's method, its convergence, and the interior-point direction:

        ```bibtex
        @article{sun2002semismooth,
            author={Sun, Defeng and Sun, Jie},
            title={Semismooth matrix-valued functions},
            journal={Mathematics of Operations Research},
            volume={27},
            number={1},
            pages={150--169},
            year={2002},
        }

        @article{todd1998nesterov,
            author={Todd, Michael J. and Toh, Kim-Chuan and T{\\"u}t{\\"u}nc{\\"u},
                    Reha H.},
            title={On the {N}esterov--{T}odd direction in semidefinite programming},
            journal={SIAM Journal on Optimization},
            volume={8},
            number={3},
            pages={769--796},
            year={1998},
        }
        ```
    """
    k = A.shape[0]
    mask = jnp.ones(k, bool) if mask is None else mask
    if A.shape != (k, k) or k == 0 or not jnp.issubdtype(A.dtype, jnp.floating):
        raise ValueError(
            "`A` must be a symmetric floating-point matrix [k, k], got "
            f"{A.dtype} of shape {A.shape}."
        )
    for name, array, shape in (("B", B, (k,) * 4), ("mask", mask, (k,))):
        if array.shape != shape:
            raise ValueError(
                f"`{name}` must have the shape {shape} as `A` is {k} x {k}, got "
                f"{array.shape}."
            )
    eps = float(jnp.finfo(A.dtype).eps)
    rtol = eps**0.5 if rtol is None else rtol
    used = mask[:, None] & mask
    rows, cols, weight = _basis(k, A.dtype)
    A = jnp.where(used, A, 0)
    pairs = used[rows, cols]
    B = jnp.where(pairs[:, None] & pairs, B[rows, cols][:, rows, cols], 0)
    B = B * weight[:, None] * weight
    problem, d, alpha = _equilibrate(A, B)
    # Rows not in use: S = 1, X = 0.
    a = jnp.where(used, problem.A, jnp.eye(k, dtype=A.dtype))
    problem = _Problem(a, problem.B)
    q, Q = jnp.linalg.eigh(a)
    # A ⪰ 0, up to the rounding of `eigh`.
    trivial = q[0] >= -k * eps * jnp.max(jnp.abs(q))

    # If `B` were the identity, which it resembles after equilibration, X - S = -A would
    # be the solution, and X - S = -A with XS = 1 on the central path. Start from these.
    one, zero = jnp.ones_like(alpha), jnp.zeros((), jnp.int32)
    atol = 4 * k * eps

    def newton(Z, skip, max_steps):
        init = _evaluate(problem, Z, zero)
        init = eqx.tree_at(lambda s: s.error, init, jnp.where(skip, 0, init.error))
        return _newton(problem, init, atol, max_steps)

    first = newton(-a, trivial, 12)
    done = first.error <= atol
    # The positive root of x (x + q) = 1, without cancellation.
    root = (jnp.abs(q) + jnp.sqrt(q**2 + 4)) / 2
    x = jnp.where(q > 0, 1 / root, root)
    init = _Interior(
        Q * jnp.sqrt(x), jnp.ones_like(x), one, jnp.where(done, 0, one), zero
    )
    interior = _interior_point(problem, init, eps, max_steps)
    X = interior.X
    last = newton(jnp.where(done, first.Z, X - a - problem(X)), done, 4)
    X = jnp.where(last.error <= atol, last.X, X)
    X = jnp.where(used & ~trivial & jnp.all(jnp.isfinite(X)), X, 0)

    BX = problem(X)
    S = jnp.where(used, a + BX, 0)
    size_X = jnp.linalg.norm(X)
    size_S = jnp.linalg.norm(jnp.where(used, a, 0)) + jnp.linalg.norm(BX)
    low_X, low_S = jnp.linalg.eigvalsh(jnp.stack([X, S]))[:, 0]
    violation = jnp.stack([-low_X, -low_S, jnp.abs(jnp.sum(X * S))])
    size = jnp.stack([size_X, size_S, size_X * size_S])
    residual = jnp.max(violation / jnp.where(size > 0, size, 1))
    # Where S ⪰ 0 holds only in the limit of X → ∞, the violation vanishes all the same.
    # What gives it away is that the rounding of B, applied to X, is then larger than S.
    rounding = eps * jnp.linalg.norm(problem.B) * size_X
    converged = (residual <= rtol) & (rounding <= rtol * size_S)
    X = alpha * (d[:, None] * d) * X
    steps = first.steps + interior.steps + last.steps
    return SDCPSolution(X, A + _smat(B @ _svec(X)), residual, steps, converged)
