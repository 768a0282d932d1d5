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

    def end(share):
        mean = 2 * usual * share
        return jnp.diag(jnp.array([mean - (1 - 0.5 / last), 5.0, -7.0]))

    forcing, mean = dict(a=jnp.ones(3)), dict(a=jnp.full(3, 2.0))
    share, until = release(end, jnp.int32(2), forcing, mean, jnp.asarray(usual))
    if last < 1:
        assert until == pytest.approx(last, rel=1e-6)
        assert 2 * usual * share == pytest.approx(last / 2, rel=1e-6)
    else:  # it does not die
        assert until == 1
        assert 2 * usual * share == pytest.approx(1 - 0.5 / last, rel=1e-6)


def test_no_more_than_a_line_to_zero():
    """The forcing is 1 at the start of the step, and held on its mean would be 0.3125:
    but the usual one is enough."""
    end = lambda share: jnp.full((1, 1), share - 0.999)
    one, usual = jnp.ones(1), jnp.asarray(0.2)
    share, until = release(end, jnp.int32(1), one, one, usual)
    assert share == 1
    assert until / 2 == pytest.approx(0.2)


@pytest.mark.parametrize("held", [True, False])
def test_where_the_forcing_does_not_matter(held):
    """If the constraint holds anyway, X goes on as if it had its zero in the middle."""
    end = lambda share: jnp.full((1, 1), 0.5 if held else -0.5)
    one, usual = jnp.ones(1), jnp.asarray(0.3)
    share, until = release(end, jnp.int32(1), one, one, usual)
    assert 0.3 * share == pytest.approx(0.25 if held else 0.3)
    assert until == pytest.approx(0.5 if held else 0.6)


def test_nothing_before():
    end = lambda share: jnp.full((1, 1), share - 0.5)
    zero, usual = jnp.zeros(1), jnp.asarray(0.25)
    share, until = release(end, jnp.int32(1), zero, zero, usual)
    assert share == pytest.approx(0.5)
    assert until == 1
