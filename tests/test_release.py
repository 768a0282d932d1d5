"""When in a step the last oscillation dies: forcings of one number."""

import jax.numpy as jnp
import pytest

from centralflow.solvers.release import release


@pytest.mark.parametrize("last", [0.1, 0.5, 0.9, 1.2])
def test_a_line_to_zero(last):
    """The constraint's rate is X - (1 - t / last): it is held by X = 1 - t / last up to
    `last`, and by X = 0 from there on. The mean of the step before is 2; another row is
    far from tight, and a third, not active, beyond it."""
    usual = 0.4
    end = lambda mean: jnp.diag(jnp.array([mean - (1 - 0.5 / last), 5.0, -7.0]))
    forcing = dict(a=jnp.ones(3), b=jnp.full(3, 1e3), c=jnp.zeros(3))
    mean = dict(a=jnp.full(3, 2.0), b=jnp.full(3, 2e3), c=jnp.zeros(3))
    share, until = release(
        end(0.0), end(2 * usual), jnp.int32(2), forcing, mean, jnp.asarray(usual)
    )
    if last < 1:
        assert until == pytest.approx(last, rel=1e-6)
        assert 2 * usual * share == pytest.approx(last / 2, rel=1e-6)
    else:  # it does not die
        assert until == 1
        assert 2 * usual * share == pytest.approx(1 - 0.5 / last, rel=1e-6)


def _release(without, usually, forcing, usual):
    """Of one number; the mean over the step before is 1."""
    one, usual = jnp.ones(1), jnp.asarray(usual)
    row = lambda c: jnp.full((1, 1), c)
    return release(row(without), row(usually), jnp.int32(1), forcing * one, one, usual)


def test_no_more_than_a_line_to_zero():
    """The forcing is 1 at the start of the step, and held on its mean would be 0.3125:
    but the usual one is enough."""
    share, until = _release(-0.999, 0.001, 1.0, 0.2)
    assert share == 1
    assert until / 2 == pytest.approx(0.2)


@pytest.mark.parametrize("rise", [0.0, 1e-12, -1e-3])
def test_where_the_forcing_does_not_matter(rise):
    """Where the constraint holds anyway X is gone soon, with a line that ends at
    2 * (-10 * 0.3) - 1 = -7; where nothing helps, it is the usual line."""
    share, until = _release(0.5, 0.5 + rise, 1.0, 0.3)
    assert until == pytest.approx(1 / 8)
    assert 0.3 * share == pytest.approx(1 / 16)
    share, until = _release(-0.5, -0.5 + rise, 1.0, 0.3)
    assert share == 1


def test_nothing_before():
    share, until = _release(-0.5, 0.5, 0.0, 0.25)
    assert share == pytest.approx(0.5)
    assert until == 1
