"""The stable flow against an integrator of SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.integrate import solve_ivp

import centralflow as cf

from .problems import tiny_loss, tiny_network

BETA2, STEPS, RTOL = 0.95, 100, 1e-3


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", [1, 1e-2])
@pytest.mark.parametrize(
    ("method", "rate", "tolerances"),
    [(cf.RMSProp, 0.01, 1), (cf.ScalarRMSProp, 0.1, 10)],
)
def test_small_second_moments_count_in_full(method, rate, tolerances, scale):
    """An error of nu is one of P, and so of the loss, however small nu is: 1e-8 with
    the small loss. Neither method depends on the scale.

    Beyond the edge, as here, explicit steps are at the limit of their stability, where
    modes hardly forget. The error of a step is at most rtol, and the sum of all was
    0.4 rtol in the loss with RMSProp, and 7 rtol over the 133 steps with Scalar
    RMSProp, whose one nu is wrong for all weights in the same way.
    """
    model, data = tiny_network(jnp.float64)
    w, unravel = ravel_pytree(model)
    loss_fn = lambda model, batch: scale * tiny_loss(model, batch)
    loss = lambda w: loss_fn(unravel(w), data)
    gradient = jax.jit(jax.grad(loss))
    moment = (lambda g: g * g) if method is cf.RMSProp else (lambda g: g[None] @ g)

    def slope(t, y):
        w, nu = np.split(y, [n])
        g = np.asarray(gradient(w))
        w_slope = -rate * g / np.sqrt(nu)
        return np.concatenate([w_slope, (1 - BETA2) / BETA2 * (moment(g) - nu)])

    n, times = w.size, range(STEPS + 1)
    start = np.concatenate([w, (1 - BETA2) * moment(np.asarray(gradient(w)))])
    exact = solve_ivp(slope, (0, STEPS), start, "LSODA", times, rtol=1e-9, atol=1e-16)

    flow = cf.predict(
        cf.Objective(loss_fn, data), model, method(rate, beta2=BETA2), STEPS,
        flow=cf.StableFlow(), rtol=RTOL,
    )  # fmt: skip
    losses = jax.vmap(loss)(exact.y.T[:, :n])
    np.testing.assert_allclose(flow.loss, losses, rtol=tolerances * RTOL)


def test_small_tolerances_with_a_momentum_in_single_precision():
    """A momentum crosses zero, where an error relative to it is one of rounding: with
    errors relative to all numbers, 5,000 steps and more."""
    model, data = tiny_network(jnp.float32)
    cf.predict(
        cf.Objective(tiny_loss, data), model, cf.Adam(0.01, 0.9, 0.99), 400,
        flow=cf.StableFlow(), rtol=1e-5, max_steps=1000,
    )  # fmt: skip
