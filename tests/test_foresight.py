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
    ("share", "kept"),
    # The first step has an error of 1.9 tol; the second, 0.73 times as long, a `share`
    # of that. It is kept if that is more than the root of 0.73.
    [
        (1.0, True),
        (0.9, True),
        (0.7, False),
        (0.6, False),
        (1.1, False),
        (jnp.inf, False),
    ],
)
def test_an_inherited_error_is_accepted(share, kept):
    """If it is below twice the tolerance."""
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    controller, _ = cf.CentralFlow().stepsize(f32(1e-2))
    y = _y(0.0)
    t1, state = controller.init(None, f32(0), f32(1e6), y, f32(8), None, None, 3)
    keep, t0, t1, _, state, _ = controller.adapt_step_size(
        f32(0), t1, y, y, None, _y(1.9e-2), 3, state
    )
    assert not keep
    length = float(t1)
    assert 4 < length < 8
    keep, t0, t1, _, state, _ = controller.adapt_step_size(
        t0, t1, y, y, None, _y(1.9e-2 * share), 3, state
    )
    assert bool(keep) == kept
    if kept:
        assert (float(t0), float(t1)) == pytest.approx((length, 2 * length))
        # The next one is judged by itself.
        keep, *_ = controller.adapt_step_size(t0, t1, y, y, None, _y(1.9e-2), 3, state)
        assert not keep


@pytest.mark.parametrize("dt", [2**-6, 2**-5])
def test_a_step_that_cannot_be_made_shorter_is_kept(dt):
    """At t = 2^17 float32 has steps of 2^-6. One of 2^-5 = 0.031, above `dtmin`, and to
    be shortened by a tenth only, would be tried for ever."""
    t = 2.0**17
    keep, t0, t1, _ = _step(t, dt, 1.03e-2)
    assert keep
    assert t + dt == t0 < t1
    # Twice the error wants a step that there is.
    if dt == 2**-5:
        keep, t0, t1, _ = _step(t, dt, 4e-2)
        assert not keep
        assert t1 - t0 < dt
