"""The step-size controller, alone."""

import equinox as eqx
import jax.numpy as jnp
import pytest

import centralflow as cf


class _Y(eqx.Module):
    observables: dict


def _y(error, approach=(1.0, 0.0)):
    work, approach = jnp.asarray(1.0), jnp.asarray(approach)[:, None]
    return _Y(dict(error=jnp.asarray(error), approach=approach, work=work))


def _step(t0, dt, error, approach=(1.0, 0.0), end=1e6):
    """What follows a step from t0 of length dt: whether it is kept, the next, and the
    total of the work."""
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    controller, _ = cf.CentralFlow().stepsize(f32(1e-2))
    y = _y(0.0)
    t1, state = controller.init(None, f32(t0), f32(end), y, f32(dt), None, None, 3)
    keep, t0, t1, _, state, _ = controller.adapt_step_size(
        f32(t0), t1, y, y, None, _y(error, approach), 3, state
    )
    return bool(keep), float(t0), float(t1), float(state.total)


def test_no_longer_than_to_the_edge():
    _, t0, t1, _ = _step(0.0, 1.0, 1e-4)
    assert t1 - t0 == pytest.approx(3)
    # 0.5 from the edge at a speed of 1, where 0.7 sqrt(atol) beyond it is allowed
    _, t0, t1, _ = _step(0.0, 1.0, 1e-4, approach=(0.5, 1.0))
    assert t1 - t0 == pytest.approx(0.57)


def test_the_last_two_steps_are_equal():
    keep, t0, t1, _ = _step(0.0, 1.0, 1e-4, end=5.0)
    assert keep
    assert (t0, t1) == (1.0, 3.0)


def test_work_of_rejected_steps_is_counted():
    keep, t0, _, total = _step(0.0, 1.0, 1.0)
    assert not keep
    assert (t0, total) == (0, 1)


@pytest.mark.parametrize(
    ("error", "kept"),
    [(0.9, True), (1.1, True), (1.9, True), (2.1, False), (jnp.inf, False)],
)
def test_up_to_twice_the_tolerance(error, kept):
    """A step with an error of up to twice the tolerance is accepted. Above it, the next
    try is as much shorter as it is with an error of third order and a safety factor of
    0.9, whether the step was accepted or not."""
    keep, t0, t1, _ = _step(0.0, 8.0, 1e-2 * error)
    assert keep == kept
    assert t0 == (8 if kept else 0)
    if error > 1:
        shorter = max(0.9 * error ** (-1 / 3), 0.2)
        assert t1 - t0 == pytest.approx(8 * shorter, rel=1e-6)
    else:
        assert t1 - t0 >= 8


@pytest.mark.parametrize(
    ("t", "dt", "kept"),
    [(2.0**17, 2**-6, True), (2.0**17, 2**-5, False), (2.0**18, 2**-5, True)],
)
def test_a_step_that_cannot_be_made_shorter_is_kept(t, dt, kept):
    """At t = 2^18 float32 has steps of 2^-5 = 0.031, above `dtmin`: one to be shortened
    would be tried for ever. At 2^17 there are shorter ones."""
    keep, t0, t1, _ = _step(t, dt, 4e-2)
    assert keep == kept
    assert t0 == (t + dt if kept else t)
    assert t0 < t1 <= t0 + dt


def _attempts(error_of, *lengths, start=0.0, rtol=1e-2):
    """Whether steps of these lengths are kept, one after the other, all from the same
    time, and how long the next is."""
    controller, _ = cf.CentralFlow().stepsize(jnp.asarray(rtol, jnp.float32))
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    y, t1 = _y(0.0), f32(start + lengths[0])
    _, state = controller.init(None, f32(start), 1e6, y, t1, None, None, 3)
    kept = []
    for length in lengths:
        error = _y(error_of(length))
        keep, t0, t1, _, state, _ = controller.adapt_step_size(
            f32(start), f32(start + length), y, y, None, error, 3, state
        )
        kept.append(bool(keep))
    return kept, float(t1 - t0)


def test_rounding_is_told_from_an_error():
    """An error of a tenth that does not fall with the step is accepted at less than a
    quarter, for half the length at first, as are those up to one; and the next is a
    quarter.
    One that falls is not, however large; nor one that does not fall in longer steps."""
    rounding = lambda dt: 0.1
    kept, dt = _attempts(rounding, 0.6, 0.4, 0.2)
    assert kept == [False, False, True]
    assert dt == pytest.approx(0.25)
    assert _attempts(rounding, 0.6, 0.2, 0.25, 0.1)[0] == [False, True, True, True]
    assert _attempts(rounding, 6.0, 2.0, 0.3)[0] == [False] * 3
    assert _attempts(lambda dt: 0.1 if dt > 0.3 else 1.1, 0.6, 0.2)[0] == [False] * 2
    kept, dt = _attempts(lambda dt: 0.4 * dt, 0.6, 0.24, 0.1)
    assert kept == [False] * 3
    assert dt < 0.1
    # The first error may be infinite.
    infinite = lambda dt: jnp.inf if dt > 0.5 else 0.1
    assert _attempts(infinite, 0.6, 0.5, 0.2)[0] == [False, False, True]
    # Once it was seen, for 30 steps.
    times = [0.6, 0.2] + [0.25] * 30 + [0.1]
    assert _attempts(rounding, *times)[0] == [False] + [True] * 30 + [False, True]


def test_no_error_is_accepted_for_the_precision_of_the_time():
    """At 70,000 float32 has steps of 1/128: the resolution of 0.1369, for an rtol of
    3e-3, is one of 0.1406. Longer than that all the same, it would be what a rejected
    step is cut to, again and again, until it is kept as one that cannot be made
    shorter."""
    errors = iter([0.05, 0.05, 0.5, 0.05])
    lengths = 0.5, 0.140625, 0.140625, 0.140625
    kept, _ = _attempts(lambda _: next(errors), *lengths, start=7e4, rtol=3e-3)
    assert kept == [False, True, False, True]
