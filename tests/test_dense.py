"""A flow between the ends of a long step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from centralflow.flows.base import FlowState
from centralflow.flows.dense import StepInterpolation, crossing
from centralflow.flows.expansion import Slope

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


def interpolation(t0, t1, y0, y1, **options):
    """A step with nothing in it, but for the options."""
    rest = jax.tree.map(jnp.zeros_like, y0)
    slope = Slope(jnp.zeros(()), jnp.zeros(3))
    of_y0 = y0.observables["oscillating"]
    nothing = jax.tree.map(jnp.zeros_like, of_y0)
    no, yes = jnp.zeros(()), jnp.ones(())
    names = dict(rate0=rest, rate1=rest, slope0=slope, slope1=slope, turn=rest)
    names |= dict(before=y0, ratio=no, earlier=of_y0, onset=no, until=yes)
    names |= dict(bulge=nothing, rise=nothing)
    names |= {name: jnp.asarray(False) for name in ("constant", "held", "smooth")}
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    return StepInterpolation(t0, t1, y0, y1, **(names | options))


def _step(a, b, bulge, earlier=(0.0, 0.0), onset=0.0, until=1.0):
    """A step in which only the oscillation changes."""
    a, b, bulge, earlier = map(jnp.asarray, (a, b, bulge, earlier))
    onset, until = jnp.asarray(onset), jnp.asarray(until)
    return interpolation(
        10.0,
        30.0,
        state(a),
        state(b),
        earlier=of_X(earlier),
        onset=onset,
        until=until,
        bulge=of_X(bulge),
        constant=onset > 0,
    )


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


T0, T1, BEFORE = 10.0, 30.0, 0.0
A, B = np.array([1.0, -2.0, 0.5]), np.array([0.02, 0.01, -0.03])
EDGE = np.array([0.3, 0.2, -0.4])


def _path(w, rate, error=0.0, ratio=1.0, **options):
    """A step along w(t), where the loss is exp(|w|^2 / 20), from rates that are off by
    an error. Nothing oscillates."""

    def at(t):
        weights = jnp.asarray(w(t))
        y = state(jnp.zeros(2))
        smooth = y.observables["smooth"] | dict(loss=_loss(weights))
        return FlowState(weights, (), y.observables | dict(smooth=smooth))

    ends = [at(t) for t in (BEFORE, T0, T1)]
    rest = jax.tree.map(jnp.zeros_like, ends[0])
    rates = (FlowState(rate(t) + error, (), rest.observables) for t in (T0, T1))
    slopes = (Slope(_loss(y.weights), jax.grad(_loss)(y.weights)) for y in ends[1:])
    names = dict(zip(("rate0", "rate1"), rates, strict=True))
    names |= dict(zip(("slope0", "slope1"), slopes, strict=True))
    ratio = jnp.asarray(ratio) * (T0 - BEFORE) / (T1 - T0)
    return interpolation(
        T0, T1, *ends[1:], before=ends[0], ratio=ratio, **(names | options)
    )


def _loss(w):
    return jnp.exp(jnp.sum(w * w) / 20)


def _parabola(t):
    return A + B * t + EDGE * (t / 40) ** 2


def _parabola_rate(t):
    return jnp.asarray(B + EDGE * t / 800)


TIMES = np.linspace(T0, T1, 41)


def _along(step):
    ys = jax.vmap(step.evaluate)(jnp.asarray(TIMES))
    return ys.weights, ys.observables["smooth"]["loss"]


def test_weights_are_cubic_and_the_loss_goes_with_them():
    cubic = lambda t: A * (1 + 0.02 * t) + EDGE * (t / 60) ** 3
    weights, loss = _along(_path(cubic, jax.jacfwd(cubic), ratio=0.0))
    np.testing.assert_allclose(weights, [cubic(t) for t in TIMES], rtol=1e-12)
    # A cubic of the logarithm, which is of degree six: dt^4 / 384 of its fourth
    # derivative.
    log = lambda t: jnp.sum(cubic(t) ** 2) / 20
    fourth = log
    for _ in range(4):
        fourth = jax.jacfwd(fourth)
    error = (T1 - T0) ** 4 / 384 * max(abs(fourth(t)) for t in TIMES)
    assert error < 3e-5  # of 0.38 to 0.67
    np.testing.assert_allclose(np.log(loss), [log(t) for t in TIMES], atol=error)


HELD = dict(held=jnp.asarray(True), smooth=jnp.asarray(True))


@pytest.mark.parametrize("error", [0.02, -0.05])
def test_what_is_held_goes_by_the_points_and_not_by_rates(error):
    """In steps of 20, to a fifth: the slope is wrong by 1 - dt / (dt + 5)."""
    weights, _ = _along(_path(_parabola, _parabola_rate, error, **HELD))
    x = (TIMES - T0) / (T1 - T0)
    # k0 and k1 are off by as much, dt error / 5, and so a cubic in x.
    wrong = 20 * error / 5 * x * (1 - x) * (1 - 2 * x)
    expected = np.array([_parabola(t) for t in TIMES]) + wrong[:, None]
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_around_a_corner_it_is_straight():
    """Where in the step before other eigenvalues were held, or not all the time."""
    x = ((TIMES - T0) / (T1 - T0))[:, None]
    chord = _parabola(T0) + x * (_parabola(T1) - _parabola(T0))
    curve = np.array([_parabola(t) for t in TIMES]) - chord
    for options in (HELD | dict(smooth=jnp.asarray(False)), HELD | dict(ratio=0.0)):
        weights, _ = _along(_path(_parabola, _parabola_rate, **options))
        np.testing.assert_allclose(weights, chord + curve / 5, rtol=1e-12)


def test_weights_and_loss_turn_at_the_onset():
    onset, turn = 0.3, np.array([0.1, -0.05, 0.2])
    since = np.maximum((TIMES - T0) / (T1 - T0) - onset, 0) / (1 - onset)
    path = lambda t: _parabola(t) + turn * (t == T1)
    # With the mean of the forcing over all of the step, as if it acted in all of it.
    rate = lambda t: _parabola_rate(t) + turn / (T1 - T0) * (t == T1)
    step = _path(
        path,
        rate,
        onset=jnp.asarray(onset),
        turn=FlowState(jnp.asarray(turn), (), {}),
    )
    weights, loss = _along(step)
    expected = np.array([_parabola(t) for t in TIMES]) + since[:, None] * turn
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    # Before the onset nothing is known of the turn, but through the gradient at the
    # end: that is off by the second derivative of the loss, 0.1, times the turn.
    before = T0 + onset * (T1 - T0) >= TIMES
    true = jnp.asarray([_loss(w) for w in expected])
    np.testing.assert_allclose(loss[before], true[before], rtol=0.1 * turn @ turn)
    # The loss at the end is what it was, and without the turn it would not be near.
    np.testing.assert_allclose(loss[-1], _loss(path(T1)), rtol=1e-12)
    assert abs(_loss(path(T1)) / _loss(_parabola(T1)) - 1) > 0.01
