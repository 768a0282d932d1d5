"""Runge-Kutta-Chebyshev steps: order, stability, rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import Chebyshev
from scipy.integrate import solve_ivp

from centralflow.solvers.rkc import polynomial, rkc2

pytestmark = pytest.mark.usefixtures("x64")

# Of the interval of stability: they give the smallest, a middle and the largest number
# of stages.
LENGTHS = dict(smallest=0.0, middle=1000.0, largest=None)


def _polynomial(name):
    length = LENGTHS[name]
    if length is None:
        length = polynomial(jnp.zeros(()))[1]
    R, _ = polynomial(jnp.asarray(length, float))
    return R, float((1 + R.w0) / R.w1)  # where w0 + w1 z = -1


def _stability_polynomial(R):
    """a + b T_s(w0 + w1 z) with a and b from its value and slope at zero, which leaves
    its second derivative to be checked."""
    s, w0, w1 = int(R.stages), float(R.w0), float(R.w1)
    T = Chebyshev.basis(s)
    b = 1 / (w1 * T.deriv()(w0))
    return lambda z: 1 + b * (T(w0 + w1 * z) - T(w0)), b * w1**2 * T.deriv(2)(w0)


def test_numbers_of_stages():
    stages = [int(_polynomial(name)[0].stages) for name in LENGTHS]
    assert stages[0] == 2 < 30 < stages[1] < 70 < 500 < stages[2], stages


@pytest.mark.parametrize("name", LENGTHS)
def test_a_step_is_the_stability_polynomial(name):
    R, interval = _polynomial(name)
    # the modes of -P^-1 H: the whole interval, what is near zero, and growing ones
    z = np.concatenate(
        [-np.linspace(0, interval, 1001), -np.geomspace(1e-6, 1, 100), [0.5, 1, 3]]
    )
    expected, second = _stability_polynomial(R)
    np.testing.assert_allclose(second, 1, rtol=1e-9)  # R''(0)
    y0 = jnp.ones(z.size)
    step = y0 + rkc2(lambda y: z * y, y0, jnp.asarray(z), jnp.ones(()), R)
    # Rounding errors of the recurrence grow like s^2 eps, here up to 6e-11.
    rounding = dict(rtol=1e-12, atol=float(R.stages) ** 2 * 2.3e-16)
    np.testing.assert_allclose(step, expected(z), **rounding)


@pytest.mark.parametrize("name", LENGTHS)
def test_stable_on_the_interval_and_not_far_beyond(name):
    R, interval = _polynomial(name)
    z = -np.linspace(0, interval, 20001)
    expected, _ = _stability_polynomial(R)
    assert np.max(np.abs(expected(z))) <= 1 + 1e-11  # R(0), rounded
    # Past a tenth of the interval a mode is left with 0.38 and ripples of 0.11.
    if name != "smallest":
        assert np.max(np.abs(expected(z[2001:]))) < 0.5
    # R of two stages is stable to -2, beyond what it is used for.
    beyond = 2.01 if name == "smallest" else 1.1 * interval
    assert abs(expected(-beyond)) > 1


@pytest.mark.parametrize("name", LENGTHS)
def test_the_exponential_to_third_order(name):
    R, _ = _polynomial(name)
    expected, _ = _stability_polynomial(R)
    z = -np.array([0.4, 0.2, 0.1, 0.05])
    error = np.abs(expected(z) - (1 + z + z**2 / 2)) / np.abs(z) ** 3
    # Zero with two stages, where R is that polynomial, and never above the 1/6 of e^z.
    assert np.all(error < 1 / 6)


@pytest.mark.parametrize("name", ["smallest", "middle"])
def test_second_order_on_a_nonlinear_problem(name):
    rng = np.random.default_rng(0)
    A = rng.normal(size=(5, 5)) / 2
    rate = lambda y: -A.T @ jnp.tanh(A @ y) - y**3 + jnp.sin(y[::-1])
    y0 = rng.normal(size=5)
    exact = solve_ivp(
        lambda t, y: np.asarray(rate(y)), (0, 2), y0, rtol=1e-12, atol=1e-12
    ).y[:, -1]
    R, _ = _polynomial(name)

    @jax.jit
    def end(steps):
        dt = 2.0 / steps
        step = lambda _, y: y + rkc2(rate, y, rate(y), dt, R)
        return jax.lax.fori_loop(0, steps, step, jnp.asarray(y0))

    errors = [np.linalg.norm(end(n) - exact) for n in (32, 64, 128, 256)]
    rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    # 2 + O(dt)
    assert np.all(np.abs(rates - 2) < 0.1), rates
    assert errors[-1] < 1e-3


def test_a_long_step_of_stiff_decay_ends_in_equilibrium():
    """Two steps of 400 times the fastest time to the slow manifold, and along it."""
    z = -jnp.array([0.1, 1.0, 10.0, 400.0])
    rest = jnp.array([1.0, 2.0, 3.0, 4.0])
    rate = lambda y: z * (y - rest)
    R, _ = polynomial(jnp.asarray(400.0))
    y = jnp.zeros(4)
    for _ in range(8):
        y = y + rkc2(rate, y, rate(y), jnp.ones(()), R)
    # |R| is at most 0.5 for the last two, and of second order for the others.
    np.testing.assert_allclose(y[2:], rest[2:], rtol=0.5**8)
    exact = rest * (1 - jnp.exp(8 * z))
    np.testing.assert_allclose(y[:2], exact[:2], rtol=1e-2)


def test_stages_grow_like_the_square_root_of_the_length():
    lengths = jnp.geomspace(10.0, 9e4, 200)
    polynomials, _ = jax.vmap(polynomial)(lengths)
    R = polynomials
    assert jnp.all((1 + R.w0) / R.w1 >= lengths * (1 - 1e-12)), "they must suffice"
    ratio = R.stages / jnp.sqrt(lengths)
    # The interval is 0.49 s^2, and the table's stages are 12 % apart, or one.
    assert jnp.all(ratio > 1.4)
    assert jnp.all(ratio < 1.12 * 1.43 + 1 / jnp.sqrt(lengths))


def test_too_long_a_step_is_told():
    longest = polynomial(jnp.zeros(()))[1]
    assert 5e4 < longest < 2e5  # 0.49 * 516^2
    assert polynomial(2 * longest)[1] == longest


@pytest.mark.parametrize(("size", "limit"), [(1e-3, 20), (1.0, 3000)])
def test_rounding_in_float32(size, limit):
    """The recurrence is for y - y0: for y its rounding errors would be s^2 eps, which
    is 0.03, and of any y. These are, where y is near its slow manifold, eps (measured:
    4), and otherwise dt times the rate times eps: a rate of 1.3e5 y, seen through the
    response, which is 2 / interval, s times and more (measured: 2200)."""
    double, interval = _polynomial("largest")
    single, _ = polynomial(jnp.asarray(interval * (1 - 1e-6), jnp.float32))
    assert single.recurrence.dtype == jnp.float32
    assert single.stages == double.stages
    z = -jnp.concatenate(
        [jnp.linspace(0, interval, 1000), jnp.geomspace(1e-4, interval, 1000)]
    ).astype(jnp.float32)
    y0 = 1 + jnp.float32(size) / (1 + jnp.abs(z))
    rate = lambda y: z * (y - 1)
    step = y0 + rkc2(rate, y0, rate(y0), jnp.float32(1), single)
    assert step.dtype == jnp.float32
    R = _stability_polynomial(double)[0](np.asarray(z, float))
    expected = 1 + (np.asarray(y0, float) - 1) * R
    error = np.max(np.abs(np.asarray(step, float) - expected))
    eps = float(np.finfo(np.float32).eps)
    assert error < limit * eps, error / eps
