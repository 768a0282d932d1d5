"""The complementarity solver: against a conic solver, closed forms and symmetries."""

import clarabel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from centralflow.sdcp import solve_sdcp


@pytest.fixture(params=[np.float32, np.float64], ids=["f32", "f64"])
def dtype(request):
    with jax.enable_x64(request.param is np.float64):
        yield request.param


_solve = jax.jit(solve_sdcp)


def solve(A, B, mask=None, dtype=np.float64, **kwargs):
    """In `dtype`; then in double precision, in which everything below is measured."""
    mask = None if mask is None else jnp.asarray(mask)
    sol = _solve(jnp.asarray(A, dtype), jnp.asarray(B, dtype), mask, **kwargs)
    assert sol.X.dtype == sol.slack.dtype == sol.residual.dtype == dtype
    return jax.tree.map(
        lambda x: np.asarray(x, np.float64 if x.dtype == dtype else None), sol
    )


#
# Problems
#


def apply(B, X):
    return np.einsum("ijkl,kl->ij", B, X)


def symmetric(rng, k):
    M = rng.normal(size=(k, k))
    return (M + M.T) / 2


def gram(rng, k, n):
    M = np.stack([symmetric(rng, k) for _ in range(n)])
    return np.einsum("nij,nkl->ijkl", M, M) / n


def identity(k):
    I = np.eye(k)  # noqa: E741
    return (np.einsum("ik,jl->ijkl", I, I) + np.einsum("il,jk->ijkl", I, I)) / 2


def congruent(A, B, Q):
    """The problem in `Q⁻ᵀ X Q⁻¹`."""
    B = np.einsum("ijkl,ai,bj,ck,dl->abcd", B, Q, Q, Q, Q, optimize=True)
    return Q @ A @ Q.T, B


def planted(rng, k, B, nullity=0):
    """`A` for which a given `X` is a solution; `nullity` zeros are shared with `S`."""
    rank = max(1, k // 3)
    Q, _ = np.linalg.qr(rng.normal(size=(k, k)))
    x, s = np.zeros(k), np.zeros(k)
    x[:rank] = rng.uniform(0.5, 2, rank)
    s[rank + nullity :] = rng.uniform(0.5, 2, max(0, k - rank - nullity))
    X = (Q * x) @ Q.T
    return (Q * s) @ Q.T - apply(B, X), X


def oracle(A, B, tol):
    """The same minimum, by a conic solver (which keeps the slack of `X ⪰ 0`)."""
    k = A.shape[0]
    cols, rows = np.tril_indices(k)  # the upper triangle by columns
    weight = np.where(rows == cols, 1, np.sqrt(2))
    P = B[rows, cols][:, rows, cols] * weight[:, None] * weight
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = tol
    solution = clarabel.DefaultSolver(
        scipy.sparse.csc_matrix(np.triu(P)),
        weight * A[rows, cols],
        scipy.sparse.csc_matrix(-np.eye(rows.size)),
        np.zeros(rows.size),
        [clarabel.PSDTriangleConeT(k)],
        settings,
    ).solve()
    assert solution.status == clarabel.SolverStatus.Solved
    X = np.zeros((k, k))
    X[rows, cols] = X[cols, rows] = np.asarray(solution.x) / weight
    return X


def objective(A, B, X):
    return np.sum(X * apply(B, X)) / 2 + np.sum(A * X)


def check(A, B, sol, rtol):
    """The three conditions, without the help of the solver."""
    X, S = sol.X, A + apply(B, sol.X)
    size = np.linalg.norm(A) + np.linalg.norm(apply(B, X))
    assert sol.converged
    assert np.linalg.eigvalsh(X)[0] >= -rtol * np.linalg.norm(X)
    assert np.linalg.eigvalsh(S)[0] >= -rtol * size
    assert abs(np.sum(X * S)) <= rtol * np.linalg.norm(X) * size
    np.testing.assert_allclose(sol.slack, S, rtol=0, atol=rtol * size)


def rounding(dtype, k):
    """Of the conditions: the tolerance `4 k eps` of the steps, in another norm."""
    return 4 * max(k, 4) ** 2 * np.finfo(dtype).eps


def close(x, y, rtol):
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * np.max(np.abs(y)))


SIZES = [1, 2, 3, 5, 8, 16]


#
# The conic solver
#


@pytest.mark.parametrize("k", SIZES)
def test_oracle(k, dtype):
    rng = np.random.default_rng(k)
    B = gram(rng, k, k * (k + 1))
    A = symmetric(rng, k) - np.eye(k) / 2
    sol = solve(A, B, dtype=dtype)
    check(A, B, sol, rounding(dtype, k))
    X = oracle(A, B, tol=1e-10)  # Below this it stalls.
    # Of the eigenvalues of this `B` the smallest is about a hundredth of the largest,
    # and the smallest of |X - S|, against which the face is told apart, likewise: 1e4
    # roundings. 1e-5 is the square root of the tolerance of the oracle.
    close(sol.X, X, 1e4 * np.finfo(dtype).eps + 1e-5)
    # Second order in the error of X, so that this is rounding and the oracle's gap.
    want = objective(A, B, X)
    got = objective(A, B, sol.X)
    assert abs(got - want) <= (rounding(dtype, k) + 1e-9) * abs(want)


@pytest.mark.parametrize("nullity", [0, 1])
@pytest.mark.parametrize("k", SIZES)
def test_singular(k, nullity, dtype):
    # Linearly dependent or too few vectors: X is not unique, but B[X] is.
    rng = np.random.default_rng(k)
    B = gram(rng, k, max(1, k * (k + 1) // 4))
    A, X = planted(rng, k, B, nullity)
    sol = solve(A, B, dtype=dtype)
    check(A, B, sol, rounding(dtype, k))
    # |B½(X - X*)|² is twice the excess of the objective, which is of the size of the
    # violations: B[X] may be off by their square root.
    close(apply(B, sol.X), apply(B, X), np.sqrt(rounding(dtype, k)))
    got, want = objective(A, B, sol.X), objective(A, B, oracle(A, B, tol=1e-8))
    size = abs(want) * (1 + np.linalg.norm(sol.X))
    assert abs(got - want) <= (rounding(dtype, k) + 10 * 1e-8) * size


@pytest.mark.parametrize("k", [5, 8])
def test_interior_point(k, dtype):
    # B[X] = tr(X): Newton's method alone fails, on both of these. The answer has
    # all of X on the lowest eigenvector.
    rng = np.random.default_rng(k)
    B = np.einsum("ij,kl->ijkl", np.eye(k), np.eye(k))
    q = np.linspace(-1, 2, k)
    Q, _ = np.linalg.qr(rng.normal(size=(k, k)))
    A = (Q * q) @ Q.T
    sol = solve(A, B, dtype=dtype)
    assert sol.steps > 12  # the Newton steps alone
    check(A, B, sol, rounding(dtype, k))
    # Conditioned like the gap of the eigenvalues, at least 3 / (k - 1).
    close(sol.X, np.outer(Q[:, 0], Q[:, 0]), k * rounding(dtype, k))


#
# Closed forms
#


@pytest.mark.parametrize("A", [-3.0, -1e-8, 0.0, 2.0])
@pytest.mark.parametrize("B", [1e-8, 0.7, 1e8])
def test_scalar(A, B, dtype):
    sol = solve(np.full((1, 1), A), np.full((1,) * 4, B), dtype=dtype)
    assert sol.converged
    # A few roundings: of A and B into the dtype, and of one division.
    assert abs(sol.X.item() - max(0, -A) / B) <= 8 * np.finfo(dtype).eps * abs(A) / B


@pytest.mark.parametrize("k", SIZES)
def test_projection(k, dtype):
    # B = 1: X and S are the parts of -A, for degenerate and multiple eigenvalues too.
    rng = np.random.default_rng(k)
    Q, _ = np.linalg.qr(rng.normal(size=(k, k)))
    eps = np.finfo(dtype).eps
    for q in (
        np.linspace(-2, 1, k),
        np.resize([-1, 0, 1], k),
        np.resize([-1, -1 - 4 * eps, 1], k),
        np.resize([-1, -1e-3, eps, -eps], k),
    ):
        A = (Q * q) @ Q.T
        sol = solve(A, identity(k), dtype=dtype)
        X = (Q * np.maximum(-q, 0)) @ Q.T
        # The projection does not expand: the error is that of A, and of one `eigh`.
        close(sol.X, X, rounding(dtype, k))
        assert sol.converged


def test_diagonal(dtype):
    # B[X]_ij = b_ij X_ij and A diagonal: three scalar problems, one with B = 0.
    b = np.array([[2.0, 1, 0], [1, 0.5, 0], [0, 0, 0]])
    B = identity(3) * b[:, :, None, None]
    sol = solve(np.diag([-1.0, -3, 1]), B, dtype=dtype)
    close(sol.X, np.diag([0.5, 6, 0]), rounding(dtype, 3))
    close(sol.slack, np.diag([0, 0, 1.0]), rounding(dtype, 3))


@pytest.mark.parametrize("b", [0.0, 1.0, 5.0])
def test_off_diagonal(b, dtype):
    # X = x vvᵀ and S = s uuᵀ with v, u = (1, ±1)/√2: s = 3x and -2 + bx/2 = -s/2.
    B = identity(2) * np.array([[3, b], [b, 3]])[:, :, None, None]
    sol = solve(np.array([[0.0, -2], [-2, 0]]), B, dtype=dtype)
    # Twice the rounding: the smaller of x and s is about half the larger.
    close(sol.X, np.full((2, 2), 2 / (3 + b)), 2 * rounding(dtype, 2))
    assert sol.converged


@pytest.mark.parametrize("nullity", [0, 1, 2])
@pytest.mark.parametrize("k", SIZES)
def test_planted(k, nullity, dtype):
    # The eigenvalues of B are between one and about k. Then X is as accurate as the
    # conditions, whether complementarity is strict or not.
    rng = np.random.default_rng(k)
    B = identity(k) + gram(rng, k, k * (k + 1))
    A, X = planted(rng, k, B, nullity)
    sol = solve(A, B, dtype=dtype)
    check(A, B, sol, rounding(dtype, k))
    close(sol.X, X, rounding(dtype, k))


@pytest.mark.parametrize("k", SIZES)
def test_zero(k, dtype):
    rng = np.random.default_rng(k)
    for B in (gram(rng, k, 2), np.zeros((k,) * 4)):
        for rank in (0, 1, k):
            R = rng.normal(size=(k, rank))
            sol = solve(R @ R.T, B, dtype=dtype)
            assert sol.converged
            assert sol.steps == 0
            assert np.all(sol.X == 0)


#
# Symmetries
#


@pytest.mark.parametrize("k", [2, 8])
def test_orthogonal(k, dtype):
    rng = np.random.default_rng(k)
    B = identity(k) + gram(rng, k, k * (k + 1))
    A = symmetric(rng, k)
    Q, _ = np.linalg.qr(rng.normal(size=(k, k)))
    X = solve(A, B, dtype=dtype).X
    assert np.max(np.abs(X)) > 0
    # As in `test_planted`, once for each.
    close(
        solve(*congruent(A, B, Q), dtype=dtype).X, Q @ X @ Q.T, 2 * rounding(dtype, k)
    )


@pytest.mark.parametrize("k", [1, 3, 8])
def test_units(k, dtype):
    rng = np.random.default_rng(k)
    A, B = symmetric(rng, k) - np.eye(k), gram(rng, k, k * (k + 1))
    sol = solve(A, B, dtype=dtype)
    for p in (-27, 27):
        for q in (-28, 28):
            # Powers of two (of sixteen, for B): the very same numbers, throughout; but
            # the eigenvalues of GPUs round otherwise.
            scaled = solve(2.0**p * A, 2.0**q * B, dtype=dtype)
            if jax.default_backend() == "cpu":
                assert np.array_equal(scaled.X, 2.0 ** (p - q) * sol.X)
                assert scaled.residual == sol.residual
                assert scaled.steps == sol.steps
            else:
                close(scaled.X, 2.0 ** (p - q) * sol.X, 2 * rounding(dtype, k))


@pytest.mark.parametrize("nullity", [0, 1])
@pytest.mark.parametrize("k", [2, 3, 5, 8, 16])
def test_scales(k, nullity, dtype):
    # Every row in units of its own, over eight decades, and A and B over sixteen.
    rng = np.random.default_rng(k)
    B = identity(k) + gram(rng, k, k * (k + 1))
    A, X = planted(rng, k, B, nullity)
    d = np.logspace(-4, 4, k)
    scale = d[:, None] * d
    for p, q in ((1, 1), (1e-8, 1e8), (1e8, 1e-8)):
        A_, B_ = congruent(p * A, q * B, np.diag(d))
        sol = solve(A_, B_, dtype=dtype)
        assert sol.converged
        # As in `test_planted`, and as much again for the rounding of A and B into the
        # dtype, which powers of two would not have.
        close(sol.X * scale * q / p, X, 2 * rounding(dtype, k))


def test_wide(dtype):
    # A slack that is far above the others does not set the precision of their rows.
    sol = solve(np.diag([1e8, -1.0]), identity(2), dtype=dtype)
    # k roundings of 1e8 are taken for noise when A is scaled: tolerances are relative
    # to them, and not to the smaller A_22.
    X = np.diag([0, 1.0])
    close(sol.X, X, 1e2 * rounding(dtype, 2))


#
# Transformations
#


@pytest.mark.parametrize("used", [[0, 1, 2], [1, 4, 6], [], list(range(8))])
def test_mask(used, dtype):
    k = 8
    rng = np.random.default_rng(0)
    mask = np.isin(np.arange(k), used)
    A = symmetric(rng, k) - np.eye(k)
    B = gram(rng, k, k * (k + 1))
    sub = np.ix_(used, used)
    sub4 = np.ix_(used, used, used, used)
    A_, B_ = A[sub], B[sub4]
    # Anything finite: not even symmetric.
    A = np.where(mask[:, None] & mask, A, 1e30 * rng.normal(size=A.shape))
    both = mask[:, None] & mask
    B = np.where(both[..., None, None] & both, B, 1e30 * rng.normal(size=B.shape))
    sol = solve(A, B, mask, dtype=dtype)
    assert sol.converged
    assert np.all(sol.X[~both] == 0)
    assert np.all(sol.slack[~both] == 0)
    if used:
        want = solve(A_, B_, dtype=dtype)
        # 1e2 is the condition of B.
        close(sol.X[sub], want.X, 1e2 * rounding(dtype, k))


def test_vmap_and_eager(dtype):
    # No step, Newton steps, interior-point steps and no solution, in one batch.
    k = 3
    rng = np.random.default_rng(0)
    full, trace = gram(rng, k, 12), np.einsum("ij,kl->ijkl", np.eye(k), np.eye(k))
    A = np.stack([np.eye(k), -np.eye(k), np.diag([-1, 1, 2]), -np.eye(k)])
    B = np.stack([full, full, trace, 0 * trace])
    A, B = jnp.asarray(A, dtype), jnp.asarray(B, dtype)
    batch = jax.jit(jax.vmap(solve_sdcp))(A, B)
    assert batch.converged.tolist() == [True, True, True, False]
    # Other kernels: other rounding, of a problem with a condition of 1e2.
    rtol = 1e2 * rounding(dtype, k)
    for i in range(3):
        close(batch.X[i], _solve(A[i], B[i]).X, rtol)
    close(batch.X[2], solve_sdcp(A[2], B[2]).X, rtol)


#
# Failure
#


def corner(k):
    B = np.zeros((k,) * 4)
    B[-1, -1, -1, -1] = 1
    return B


@pytest.mark.parametrize(
    ("A", "B"),
    [
        (-np.eye(1), np.zeros((1,) * 4)),
        (-np.eye(2), corner(2)),
        (np.diag([-1e-3, -1]), corner(2)),
        # det(A + B[X]) = -1, for all X: its lowest eigenvalue tends to zero as X → ∞.
        (np.array([[0.0, 1], [1, 0]]), corner(2)),
        (-np.eye(8), corner(8)),
        (np.full((2, 2), np.nan), corner(2)),
    ],
    ids=["scalar", "row", "small", "limit", "large", "nan"],
)
def test_infeasible(A, B, dtype):
    sol = solve(A, B, dtype=dtype)
    assert not sol.converged
    assert np.all(np.isfinite(sol.X))
    assert sol.steps <= 12 + 40 + 4


def test_max_steps(dtype):
    # `test_interior_point`, without it: whatever Newton's method leaves is reported.
    k = 5
    A, B = np.diag(np.linspace(-1, 2, k)), np.einsum("ij,kl->ijkl", *2 * [np.eye(k)])
    sol = jax.jit(lambda A, B: solve_sdcp(A, B, max_steps=0))(
        jnp.asarray(A, dtype), jnp.asarray(B, dtype)
    )
    assert sol.steps <= 12 + 0 + 4
    assert solve(A, B, dtype=dtype).steps > 12 + 0 + 4
    assert np.all(np.isfinite(sol.X))
    assert sol.converged == (sol.residual <= np.sqrt(np.finfo(dtype).eps))


#
# Properties
#


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    used=st.integers(1, 6),
    n=st.integers(1, 30),
    nullity=st.integers(0, 3),
    decades=st.floats(0, 4),
    double=st.booleans(),
)
def test_conditions(seed, used, n, nullity, decades, double):
    # A solution exists, of any rank; B has any rank; the units are anything.
    dtype = np.float64 if double else np.float32
    k = 6
    rng = np.random.default_rng(seed)
    mask = np.arange(k) < used
    both = mask[:, None] & mask
    B = np.where(both[..., None, None] & both, gram(rng, k, n), 0)
    A, X = np.zeros((k, k)), np.zeros((k, k))
    A[:used, :used], X[:used, :used] = planted(
        rng, used, B[:used, :used, :used, :used], nullity
    )
    d = 10 ** rng.uniform(-decades, decades, k)
    with jax.enable_x64(double):
        sol = solve(*congruent(A, B, np.diag(d)), mask, dtype=dtype)
    X = sol.X * d[:, None] * d
    # In the units in which the problem was made. The rounding of A and B into the dtype
    # moves S by that of B[X], which is large if B is nearly singular on the face of X.
    S = A + apply(B, X)
    size = np.linalg.norm(A) + np.linalg.norm(B) * np.linalg.norm(X)
    tol = rounding(dtype, k)
    assert sol.converged
    assert np.all(sol.X[~both] == 0)
    assert np.linalg.eigvalsh(X)[0] >= -tol * np.linalg.norm(X)
    assert np.linalg.eigvalsh(S)[0] >= -tol * size
    assert abs(np.sum(X * S)) <= tol * size * np.linalg.norm(X)
