"""The stationary preconditioner: against a convex solver, closed forms, and the state's
own rate."""

import clarabel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

import centralflow as cf


def _quadratic(n=10, seed=0, lowest=-0.17):
    """g and H at w = 0, whose eigenvalues are 10, ..., 0.28, `lowest` and +-0.1."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.normal(size=(n, n)))[0]
    eigenvalues = np.geomspace(10, 0.1, n)
    eigenvalues[-2:] = lowest, np.copysign(0.1, lowest)
    H, g = Q * eigenvalues @ Q.T, 0.3 * rng.normal(size=n)
    objective = cf.Objective(lambda w: g @ w + 0.5 * w @ H @ w)
    return objective, jnp.zeros(n), g, H


def _convex_program(g, H, eta, kappa=2.0):
    """min tr P + <g * g, 1/P>/eta^2 s.t. H <= kappa P, with t_i P_i >= g_i^2: as
    |(2 g_i, t_i - P_i)| <= t_i + P_i."""
    n = g.size
    rows, cols = np.triu_indices(n)
    order = np.lexsort((rows, cols))  # Clarabel's: column by column
    rows, cols = rows[order], cols[order]
    weight = np.where(rows == cols, 1, np.sqrt(2))
    A = np.zeros((3 * n + rows.size, 2 * n))  # s = b - A (P, t)
    b = np.zeros(3 * n + rows.size)
    for i in range(n):
        A[3 * i, [i, n + i]] = -1, -1
        b[3 * i + 1] = 2 * g[i] / eta
        A[3 * i + 2, [i, n + i]] = 1, -1
    for r, (i, j) in enumerate(zip(rows, cols, strict=True)):
        if i == j:
            A[3 * n + r, i] = -kappa
        b[3 * n + r] = -weight[r] * H[i, j]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    cones = [clarabel.SecondOrderConeT(3)] * n + [clarabel.PSDTriangleConeT(n)]
    solution = clarabel.DefaultSolver(
        scipy.sparse.csc_matrix((2 * n, 2 * n)),
        np.ones(2 * n),
        scipy.sparse.csc_matrix(A),
        b,
        cones,
        settings,
    ).solve()
    assert solution.status == clarabel.SolverStatus.Solved
    return np.asarray(solution.x)[:n], solution.obj_val


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("seed", "scale", "lowest"),
    [(0, 1.0, -0.17), (1, 0.03, -0.17), (2, 10.0, -0.17)]
    + [(seed, 1.0, lowest) for seed, lowest in enumerate((-8.0, -10.0, -12.0, -25.0))],
)
def test_rmsprop_solves_the_convex_program(seed, scale, lowest):
    objective, w, g, H = _quadratic(seed=seed, lowest=lowest)
    H, eta = scale * H, 0.1
    objective = cf.Objective(lambda w: g @ w + 0.5 * w @ H @ w)
    found = cf.stationary_preconditioner(
        objective, w, cf.RMSProp(eta, 0.9), tolerance=1e-6, max_iterations=20_000
    )
    assert found.converged
    P, value = _convex_program(g, H, eta)
    ours = np.asarray(found.preconditioner)
    # A gap of 1e-10, Clarabel's, is 1e-5 in P, in which the value is of second order.
    np.testing.assert_allclose(ours, P, rtol=5e-5)
    np.testing.assert_allclose(np.sum(ours + (g / eta) ** 2 / ours), value, rtol=1e-8)
    # The multiplier (kappa / eta^2) Sigma closes the duality gap.
    Z = 2 / eta**2 * found.factors.T @ found.factors
    roots = np.sqrt(np.maximum(1 - 2 * np.diag(Z), 0))
    dual = np.sum(Z * H) + 2 / eta * np.sum(np.abs(g) * roots)
    np.testing.assert_allclose(dual, value, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", [cf.Adam, cf.NAdam])
def test_adam_forgets_its_start(method):
    """The same program, with another kappa; and no correction of zeros long ago."""
    objective, w, g, H = _quadratic()
    optimizer = method(0.1, 0.9, 0.99, 0.0, bias_correction=True)
    found = cf.stationary_preconditioner(
        objective, w, optimizer, tolerance=1e-6, max_iterations=20_000
    )
    assert found.converged
    P, _ = _convex_program(g, H, 0.1, float(optimizer.critical_sharpness))
    np.testing.assert_allclose(found.preconditioner, P, rtol=5e-5)
    np.testing.assert_allclose(found.state.m, g, rtol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("slope", [0.0, 0.1, 100.0])
def test_scalar_rmsprop_in_closed_form(slope):
    """sqrt(nu) + eps = max(|g| + eps, eta S / kappa)."""
    _, w, g, H = _quadratic()
    g, eta, eps = slope * g, 0.1, 0.05
    objective = cf.Objective(lambda w: g @ w + 0.5 * w @ H @ w)
    optimizer = cf.ScalarRMSProp(eta, 0.9, eps)
    found = cf.stationary_preconditioner(objective, w, optimizer, tolerance=1e-6)
    S = np.linalg.eigvalsh(H)[-1]
    root = max(np.linalg.norm(g) + eps, eta * S / 2)
    assert found.converged
    np.testing.assert_allclose(found.preconditioner, root / eta, rtol=1e-9)
    np.testing.assert_allclose(found.state.nu, (root - eps) ** 2, rtol=1e-9)
    np.testing.assert_allclose(found.sharpness[0], eta * S / root, rtol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bias_correction", [False, True])
def test_the_state_is_stationary(bias_correction):
    """All conditions, with eps, for which the program has another objective."""
    objective, w, g, H = _quadratic()
    optimizer = cf.RMSProp(0.1, 0.9, 0.02, bias_correction)
    found = cf.stationary_preconditioner(
        objective, w, optimizer, tolerance=1e-7, max_iterations=20_000
    )
    F, P = np.asarray(found.factors), np.asarray(found.preconditioner)
    moments = g**2 + np.sum((F @ H) ** 2, axis=0)
    rate = optimizer.state_rate(found.state, jnp.asarray(g), jnp.asarray(moments))
    np.testing.assert_allclose(rate.nu, 0, atol=1e-6 * np.max(found.state.nu))
    np.testing.assert_array_equal(P, optimizer.preconditioner(found.state))
    slack = 2 * np.diag(P) - H
    lowest = np.linalg.eigvalsh(slack / np.sqrt(np.outer(P, P)))[0]
    assert abs(lowest) < 1e-6
    assert np.max(np.abs(F @ slack)) < 1e-6 * np.max(np.abs(F @ H))


def test_the_general_stationary_state_is_that_of_rmsprop():
    optimizer = cf.RMSProp(0.1, 0.9)
    g = jnp.array([1.0, -2.0, 0.5])
    state = optimizer.update_state(optimizer.init(g), g)
    general = cf.AbstractOptimizer.stationary_state(optimizer, state, g, 3 * g * g)
    own = optimizer.stationary_state(state, g, 3 * g * g)
    np.testing.assert_allclose(general.nu, own.nu, rtol=1e-6)
    np.testing.assert_array_equal(general.updates, state.updates)


@pytest.mark.parametrize(("rate", "stable"), [(0.19, True), (0.21, False)])
def test_gradient_descent_cannot_adapt(rate, stable):
    objective, w, _, _ = _quadratic()  # S = 10
    found = cf.stationary_preconditioner(objective, w, cf.GradientDescent(rate))
    np.testing.assert_allclose(found.preconditioner, 1 / rate, rtol=1e-6)
    np.testing.assert_allclose(found.sharpness[0], 10 * rate, rtol=1e-5)
    assert bool(found.converged) == stable


@pytest.mark.usefixtures("x64")
def test_too_small_a_rank_is_noticed():
    objective, w, g, H = _quadratic(lowest=0.17)
    g = 0 * g + 1e-3
    objective = cf.Objective(lambda w: g @ w + 0.5 * w @ H @ w)
    options = dict(tolerance=1e-4, max_iterations=20_000)
    optimizer = cf.RMSProp(0.1, 0.9)
    small = cf.stationary_preconditioner(objective, w, optimizer, rank=1, **options)
    assert not small.converged
    assert small.violation > 1e-2
    large = cf.stationary_preconditioner(objective, w, optimizer, rank=8, **options)
    assert large.converged
    assert np.linalg.matrix_rank(large.factors, tol=1e-3 * np.max(large.factors)) > 1


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rank=0), "`rank`"),
        (dict(max_iterations=0), "`max_iterations`"),
        (dict(tolerance=2.0), "`tolerance`"),
        (dict(optimizer_state=jnp.zeros(1)), "`optimizer_state`"),
    ],
)
def test_bad_arguments(change, message):
    objective, w, _, _ = _quadratic()
    with pytest.raises(ValueError, match=message):
        cf.stationary_preconditioner(objective, w, cf.RMSProp(0.1, 0.9), **change)


def test_in_single_precision():
    objective, w, g, H = _quadratic()
    found = cf.stationary_preconditioner(objective, w, cf.RMSProp(0.1, 0.9))
    assert found.converged
    with jax.enable_x64(True):
        P, _ = _convex_program(g, H, 0.1)
    np.testing.assert_allclose(found.preconditioner, P, rtol=2e-3)
