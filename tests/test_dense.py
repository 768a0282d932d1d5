"""What the oscillations add, between the ends of a long step."""

import jax.numpy as jnp
import numpy as np
import pytest

from centralflow.flows.dense import with_mean

X = np.linspace(0, 1, 2001)


def curve(a, b, mean):
    return np.asarray(with_mean(*(jnp.asarray(v, float) for v in (X, a, b, mean))))


@pytest.mark.parametrize(("a", "b", "mean"), [(3, 1, 2.2), (3, 1, 1.5), (0, 2, 1.3)])
def test_has_its_ends_and_its_mean(x64, a, b, mean):
    """Simpson's rule is exact for parabolas."""
    y = curve(a, b, mean)
    np.testing.assert_allclose([y[0], y[-1]], [a, b], rtol=1e-14)
    np.testing.assert_allclose((y[0] + 4 * y[1000] + y[-1]) / 6, mean, rtol=1e-14)


def test_of_a_parabola_is_that_parabola(x64):
    f = lambda x: 2 + 3 * x - 1.5 * x**2
    np.testing.assert_allclose(curve(f(0), f(1), 2 + 1.5 - 0.5), f(X), rtol=1e-14)


@pytest.mark.parametrize("mean", [-10, 0, 0.5, 3, 10])
def test_a_variance_stays_one(x64, mean):
    """Nor does one that grows from zero, or decays to it, go beyond its end."""
    for a, b in [(0, 2), (2, 0)]:
        y = curve(a, b, mean)
        slopes = np.diff(y) * np.sign(b - a)
        assert np.all(slopes >= -1e-15)
    assert np.all(curve(1, 2, mean) > 0)
