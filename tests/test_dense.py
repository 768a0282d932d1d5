"""A flow between the ends of a long step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from centralflow.flows.base import FlowState
from centralflow.flows.dense import StepInterpolation, crossing

pytestmark = pytest.mark.usefixtures("x64")


def of_X(variances):
    """What two variances add: themselves, and their sum."""
    return dict(
        oscillation=variances, gradient_sq=variances, trace_covariance=variances.sum()
    )


def state(variances):
    smooth = dict(
        loss=jnp.ones(()),
        grad_norm_sq=jnp.ones(()),
        metrics={},
        sharpness=jnp.full(2, 2.0),
    )
    observables = dict(smooth=smooth, oscillating=of_X(variances))
    return FlowState(jnp.ones(3), (), observables)


def _step(a, b, bulge, earlier=(0.0, 0.0), onset=0.0, until=1.0):
    """A step in which only the oscillation changes."""
    a, b, bulge, earlier = map(jnp.asarray, (a, b, bulge, earlier))
    ratio, onset, until = map(jnp.asarray, (0.0, onset, until))
    y0, y1 = state(a), state(b)
    rest = jax.tree.map(jnp.zeros_like, y0)
    t0, t1 = jnp.asarray(10.0), jnp.asarray(30.0)
    return StepInterpolation(
        t0, t1, y0, y1, rest, rest, y0,
        ratio, of_X(earlier), onset, until, of_X(bulge), of_X(0 * a),
        jnp.asarray(onset > 0),
    )  # fmt: skip


def _oscillating(step, points=2001):
    at = jax.vmap(lambda t: step.evaluate(t).observables["oscillating"])
    return at(jnp.linspace(step.t0, step.t1, points))


def test_the_mean_exceeds_that_of_the_ends_by_the_bulge():
    a, b, bulge = np.array([3.0, 1.0]), np.array([2.0, 0.5]), np.array([0.7, -0.2])
    variances = _oscillating(_step(a, b, bulge))["oscillation"]
    np.testing.assert_allclose(variances[0], a, rtol=1e-12)
    np.testing.assert_allclose(variances[-1], b, rtol=1e-12)
    mean = np.trapezoid(variances, axis=0) / (len(variances) - 1)
    # The rule's error is that of a second derivative of 12 * bulge.
    np.testing.assert_allclose(mean, (a + b) / 2 + bulge, rtol=1e-6)


def test_until_the_onset_it_is_as_before():
    level = np.array([3.0, 2.0])
    step = _step(level, level, [0.0, 0.0], earlier=[4.0, 0.0], onset=0.25)
    variances = _oscillating(step, 41)["oscillation"]
    np.testing.assert_array_equal(variances[:10], 10 * [[4.0, 0.0]])
    np.testing.assert_array_equal(variances[10:], 31 * [level])


def test_what_has_come_to_its_end_stays_there():
    """And the sharpness is what it was until then."""
    step = _step([3.0, 2.0], [0.0, 0.0], [0.0, 0.0], until=0.5)
    smooth = step.y1.observables["smooth"]
    smooth["sharpness"] = jnp.array([1.0, 2.0])
    at = lambda t: step.evaluate(jnp.asarray(t)).observables["smooth"]["sharpness"]
    np.testing.assert_array_equal([at(19.0), at(25.0)], [[2.0, 2.0], [1.5, 2.0]])
    variances = _oscillating(step, 41)["oscillation"]
    share = np.maximum(1 - np.arange(41) / 20, 0)
    np.testing.assert_allclose(variances, share[:, None] * [3.0, 2.0], atol=1e-15)


@pytest.mark.parametrize(("a", "b"), [(3.0, 1.0), (2.0, 0.0), (0.0, 0.0), (1e-9, 4.0)])
def test_no_variance_becomes_negative(a, b):
    """Of a bulge that is too large there is as much as there can be: the parabola
    touches zero. All observables have the same share of it."""
    step = _step([a, 5.0], [b, 5.0], [-10.0, 1.0])
    of_X = _oscillating(step)
    lowest = np.min(of_X["oscillation"][:, 0])
    # 2,001 points miss the minimum by half of one in 2,000, and the parabola's second
    # derivative is at most 2 (sqrt(a) + sqrt(b))^2 < 16.
    assert -1e-12 < lowest < 16 * (1 / 4000) ** 2
    np.testing.assert_allclose(
        np.sum(of_X["oscillation"], axis=1), of_X["trace_covariance"], rtol=1e-12
    )
    height = 6 * 0.25 * (np.sqrt(a) + np.sqrt(b)) ** 2 / 60
    middle = of_X["oscillation"][1000]
    np.testing.assert_allclose(middle, [(a + b) / 2 - 10 * height, 5 + height])


@pytest.mark.parametrize("noise", [0.0, 1e-17])
def test_variances_that_are_zero_but_for_rounding_have_no_say(noise):
    """Else the mean loss within a step is one or another by how a sum was rounded."""
    of_X = _oscillating(_step([noise, 5.0], [noise, 4.0], [-10 * noise, -1.0]))
    found = of_X["oscillation"][1000]
    np.testing.assert_allclose(found, [0, 4.5 - 1.5], rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("bend", [-0.9, -0.3, 0.0, 0.4, 0.9])
def test_where_a_parabola_crosses(ratio, bend):
    """y = x - x (1 - x) bend rises from 0 to 1, and the step before began at
    x = -1 / ratio."""
    y = lambda x: x - x * (1 - x) * bend
    for x in (0.1, 0.5, 0.8):
        level = 3 + 2 * y(x)  # any scale
        found = crossing(
            *map(jnp.asarray, (3 + 2 * y(-1 / ratio), 3.0, 5.0, level, ratio))
        )
        np.testing.assert_allclose(found, x, rtol=1e-9)


def test_crossings_of_other_curves():
    def at(before, level, ratio=1.0):
        return crossing(*map(jnp.asarray, (before, 0.0, 1.0, level, ratio)))

    assert at(-7.0, 0.3, 0.0) == pytest.approx(0.3)  # nothing known of before
    # What rose by 5 and then by 1 would turn in the step: the slope is zero at its end,
    # y = 2 x - x^2. What fell by 5 has slope zero at its start, y = x^2.
    assert at(-5.0, 0.75) == pytest.approx(0.5)
    assert at(5.0, 0.25) == pytest.approx(0.5)
    assert at(-1.0, 1.5) == 0 == at(-1.0, -0.5)
