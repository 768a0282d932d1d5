"""The central flow where the spectrum of the Hessian is as awkward as it gets, against
closed forms. All that differs between the cases is data: one program serves them all,
and a second one those in which the block of eigenvectors must grow."""

import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

pytestmark = pytest.mark.usefixtures("x64")

ETA, STEPS, M, RTOL = 0.5, 60, 12, 1e-3
EDGE = 2 / ETA
# A violation of the constraint by the share v of the critical sharpness is an error of
# (5 v)^2, of which up to twice the tolerance is accepted within a step.
VIOLATION = np.sqrt(2 * RTOL) / 5


def _loss(v, data):
    """sum_i live_i (y_i x_i^2 / 2 - b_i y_i) - speed z, where (x, y, z) = Q v: a cubic
    whose Hessian at x = 0 has the eigenvalues live_i y_i, and zero M + 1 times.

    y_i = min(y_i(0) + eta live_i b_i t, 2/eta), then Sigma_ii = 2 b_i; z goes on at
    constant speed. What of Sigma is not on the diagonal does not matter, and is not
    unique: the complementarity problem has a singular linear part."""
    live, b, speed, Q = (leaf[0] for leaf in data)
    w = Q @ v
    x, y, z = w[:M], w[M : 2 * M], w[2 * M]
    return jnp.sum(live * (0.5 * y * x**2 - b * y)) - speed * z


def _vector(first, rest):
    return np.concatenate([first, np.broadcast_to(rest, M - len(first))]).astype(float)


LOW = np.linspace(0.1, 1.0, M)
NEAR = 3.8 - 0.002 * np.arange(10)

# Initial y, b, and which of them are alive.
CASES = dict(
    repeated=(_vector([3.7] * 3, LOW[3:]), _vector([0.02] * 3, 0)),
    # The fourth leaves the cluster below the edge.
    splitting=(_vector([3.7] * 4, 0.5), _vector([0.02, 0.016, 0.013, 0.001], 0)),
    # With no more than the rounding of a zero to begin with.
    zero_and_flat=(np.zeros(M), np.zeros(M)),
    zero_at_first=(np.zeros(M), _vector([0.2, 0.15], 0.001)),
    negative=(_vector([-0.05, -0.03], -0.01), _vector([0.001], 0)),
    # In the directions of negative curvature rounding errors grow, twentyfold at most.
    negative_then_critical=(_vector([-0.05, -0.1], -0.02), _vector([0.2], 0)),
    dead=(_vector([3.7, 3.6], 5.0), _vector([0.02, 0.02], 1), _vector([1, 1], 0)),
    all_dead=(LOW, _vector([0.02], 0), np.zeros(M)),
    crossing_below=(_vector([3.0, 2.5, 2.0], LOW[3:]), _vector([5e-3, 0.02, 0.05], 0)),
    crossing_at_the_edge=(
        _vector([3.6, 3.0, 2.0], LOW[3:]),
        _vector([0.02, 0.04, 0.08], 0),
    ),
    # Room for eight, two of which are guards.
    ten_in_a_few_steps=(_vector(NEAR, 0.5), _vector([0.02] * 10, 0)),
    ten_at_once=(_vector([3.8] * 10, 0.5), _vector([0.02] * 10, 0)),
)
BASES = dict(
    identity=np.eye(2 * M + 1),
    permutation=np.eye(2 * M + 1)[np.random.default_rng(0).permutation(2 * M + 1)],
    rotation=np.linalg.qr(np.random.default_rng(1).normal(size=(2 * M + 1,) * 2))[0],
)


def _check(case, Q, **options):
    y0, b, live, *_ = (*CASES[case], np.ones(M))
    speed = 0.0 if case == "zero_and_flat" else 1.0
    data = [jnp.asarray(x)[None] for x in (live, b, speed, Q)]
    start = Q.T @ np.concatenate([np.zeros(M), y0, [0.0]])
    times = np.arange(STEPS + 1.0)
    flow = cf.predict(
        cf.Objective(_loss, data), jnp.asarray(start), cf.GradientDescent(ETA), STEPS,
        weight_times=times, **options,
    )  # fmt: skip
    y = (flow.weights @ Q.T)[:, M : 2 * M]
    expected = y0 + ETA * np.outer(times, live * b)
    held = live * expected[-1] > EDGE
    expected = np.where(live > 0, np.minimum(expected, EDGE), expected)
    # At the end there is what the constraint's linearization, here exact, leaves of the
    # rounding of the eigenvectors; where the last one has just become critical, X is
    # still on its way.
    np.testing.assert_allclose(y[-1], expected[-1], atol=1e-3)
    np.testing.assert_allclose(y, expected, atol=VIOLATION * EDGE)
    total = np.sum(flow.oscillation, axis=1)
    np.testing.assert_allclose(total[-1], np.sum(2 * b[held]) / ETA, rtol=5 * RTOL)
    assert np.all(flow.oscillation >= 0)
    # Nothing oscillates before the first one is critical.
    rising = np.max(live * expected, axis=1) < (1 - VIOLATION) * EDGE
    assert np.all(total[rising] == 0)
    top = np.max(live * np.maximum(expected, 0), axis=1) * ETA
    reported = np.maximum(flow.sharpness[:, 0], 0)
    if case != "crossing_below":  # of which below
        np.testing.assert_allclose(reported, top, atol=2 * VIOLATION)
    assert flow.stats["unconverged"] == 0
    return flow, top


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("ten")])
def test_adaptive_steps(case, basis):
    flow, _ = _check(case, BASES[basis], rtol=RTOL)
    assert flow.stats["accepted_steps"] < STEPS
    if case == "zero_and_flat":
        np.testing.assert_array_equal(flow.weights, flow.weights[:1].repeat(61, 0))


@pytest.mark.parametrize(
    "case",
    ["ten_in_a_few_steps", pytest.param("ten_at_once", marks=pytest.mark.slow)],
)
def test_ten_eigenvalues_become_critical_together(case):
    flow, _ = _check(case, BASES["identity"], rtol=RTOL)
    assert flow.sharpness.shape[1] == 16
    np.testing.assert_allclose(flow.sharpness[-1, :10], 2, atol=2 * VIOLATION)


@pytest.mark.parametrize("basis", BASES)
def test_an_uncoupled_eigenvalue_that_overtakes_below_the_edge_is_found(basis):
    """Third at first, where one eigenvalue and a guard are followed: no derivative
    couples its eigenvector to theirs, and there are few steps."""
    flow, top = _check("crossing_below", BASES[basis], rtol=RTOL)
    np.testing.assert_allclose(flow.sharpness[-1, 0], top[-1], atol=2 * VIOLATION)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="Below the edge the sharpness is interpolated between the ends of steps, "
    "here five. The largest eigenvalue has a kink where another one overtakes it: in "
    "between 1.66 is reported, not 1.555. What is at the edge, or about to be, does "
    "not depend on it here.",
)
def test_an_uncoupled_eigenvalue_that_overtakes_below_the_edge_is_reported():
    flow, top = _check("crossing_below", BASES["rotation"], rtol=RTOL)
    np.testing.assert_allclose(flow.sharpness[:, 0], top, atol=2 * VIOLATION)


@pytest.mark.slow
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("case", CASES)
def test_fixed_steps(case, basis):
    _check(case, BASES[basis], flow=cf.CentralFlow(substeps=4))


def _one(w, data):
    """-a w + c w^3 / 6: the sharpness is c w, and at rest at the edge, w = 2 / (eta c),
    Sigma = 2 (a / c - w^2 / 2)."""
    a, c = data[0]
    return jnp.sum(-a * w + c * w**3 / 6)


@pytest.mark.slow
@pytest.mark.parametrize("flow", [cf.CentralFlow(4), cf.CentralFlow()])
def test_one_parameter(flow):
    """And room for eight eigenvectors. The edge is reached within a step: it is where
    eta sqrt(a c / 2), the rate of the free rise to w = sqrt(2 a / c), exceeds 1."""
    a, c = 10.0, 1.0
    found = cf.predict(
        cf.Objective(_one, jnp.array([[a, c]])), jnp.array([3.0]),
        cf.GradientDescent(ETA), 30, flow=flow, weight_times=[0, 30],
    )  # fmt: skip
    w = 2 / (ETA * c)
    # Relaxation takes some 5 steps: e^-6 is left, of 1 and of 4.
    np.testing.assert_allclose(found.weights[-1], w, rtol=5e-3)
    sigma = 2 * (a / c - w**2 / 2)
    np.testing.assert_allclose(found.oscillation[-1, 0], sigma / ETA, rtol=1e-2)
    assert np.all(found.oscillation[:, 1:] == 0)
    assert np.all(np.isnan(found.sharpness[:, 1:]) | (found.sharpness[:, 1:] == 0))
    assert np.max(found.sharpness[2:, 0]) < 2 * (1 + 1e-2)
