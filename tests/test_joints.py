"""What oscillations add, where long steps join."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from centralflow.flows.joints import joined
from centralflow.solvers.course import Piece

from .test_dense import interpolation, of_X, state

pytestmark = pytest.mark.usefixtures("x64")

# Steps that grow and shrink, and the times of which there are rows: 40 in each step, at
# the middles of equal parts, and at its end.
ENDS = np.array([0, 2, 5, 9, 12, 13, 18, 25, 29, 32, 36, 41.0]) / 20
POINTS = 40


def _variances(t):
    return jnp.stack([2 + jnp.sin(2 * t), 1 + jnp.cos(t)])


def _integral(t):
    return jnp.stack([2 * t - jnp.cos(2 * t) / 2, t + jnp.sin(t)])


def _rows(ends=ENDS, missing=()):
    """As in `ProjectedRKC`: of each step the mean is known, and at its end what is
    extrapolated from that and the one before. `missing` are the steps without rows."""
    scaled = lambda share, tree: jax.tree.map(lambda x: share * x, tree)
    subtract = lambda a, b: jax.tree.map(jnp.subtract, a, b)
    rows, piece, last = [], None, None
    for step, (t0, t1) in enumerate(itertools.pairwise(ends)):
        dt = jnp.asarray(t1 - t0)
        mean = of_X((_integral(t1) - _integral(t0)) / dt)
        new = Piece(mean, dt)
        if piece is None:
            earlier = first = last = mean
        else:
            slope = scaled(dt / (dt + piece.length), subtract(mean, piece.mean))
            earlier, first = last, piece.joint(new)
            last = jax.tree.map(jnp.add, mean, slope)
        y0, y1 = (state(x["oscillation"]) for x in (first, last))
        ends_mean = scaled(0.5, jax.tree.map(jnp.add, first, last))
        within = interpolation(
            t0,
            t1,
            y0,
            y1,
            earlier=earlier,
            bulge=subtract(mean, ends_mean),
            rise=subtract(first, earlier),
            constant=jnp.asarray(piece is None),
        )
        piece = new
        if step in missing:
            continue
        t = t0 + (t1 - t0) * (jnp.arange(POINTS) + 0.5) / POINTS
        t = jnp.append(t, t1)
        at = jax.vmap(lambda t, i=within: i.evaluate(t).observables)(t)
        mean_loss = at["smooth"]["loss"]
        rows.append(
            dict(t=t, mean_loss=mean_loss, joint=at["joint"], **at["oscillating"])
        )
    return jax.tree.map(lambda *x: jnp.concatenate(x), *rows)


def _error(rows):
    return np.abs(rows["oscillation"] - jax.vmap(_variances)(rows["t"]))


def test_steps_join():
    before = _rows()
    after = joined(before)
    assert "joint" not in after
    # Continuous: a step's last row, at its end, and the next one's first, which is a
    # half of 40 parts later. (The rise is at most 2 per unit of time, steps 0.35.)
    ends = np.arange(POINTS, len(after["t"]) - 1, POINTS + 1)
    gap = lambda rows: np.abs(rows["oscillation"][ends] - rows["oscillation"][ends + 1])
    assert np.max(gap(after)) < 2.5 * 0.35 / 80
    assert np.max(gap(before)) > 5 * 2.5 * 0.35 / 80
    # With the means that they had: of a parabola, those of 40 middles are right to
    # 1 / (24 40^2) of its second derivative, which is below 5 in units of the step.
    middles = np.delete(
        np.arange(len(after["t"])), np.append(ends, len(after["t"]) - 1)
    )
    mean = after["oscillation"][middles].reshape(-1, POINTS, 2).mean(axis=1)
    true = jax.vmap(_integral)(jnp.asarray(ENDS))
    true = np.diff(true, axis=0) / np.diff(ENDS)[:, None]
    np.testing.assert_allclose(mean, true, atol=5 / 24 / POINTS**2)
    # Extrapolated, the end of a parabola is off by twice as much as the joint (2/3 and
    # 1/3 of half its second derivative, in units of a step). No step follows the last.
    known = after["t"] <= ENDS[-2]
    assert np.mean(_error(after)[known]) < 0.5 * np.mean(_error(before)[known])
    last = ~known
    np.testing.assert_array_equal(
        after["oscillation"][last], before["oscillation"][last]
    )
    # All are of one covariance.
    np.testing.assert_allclose(
        np.sum(after["oscillation"], axis=1), after["trace_covariance"], rtol=1e-14
    )
    np.testing.assert_allclose(
        after["oscillation"], -np.sort(-after["gradient_sq"], axis=1), rtol=1e-14
    )


def test_the_order():
    """Once a step is known and the next, it is a parabola between two values of second
    order, with the mean of the third."""
    halved = np.sort(np.append(ENDS, (ENDS[1:] + ENDS[:-1]) / 2))

    def error(ends):
        rows = joined(_rows(ends))
        inner = (rows["t"] > ENDS[1]) & (rows["t"] <= ENDS[-2])
        return np.mean(_error(rows)[inner])

    # Where lengths differ the ends are of second order only.
    assert error(halved) < error(ENDS) / 3.5


def test_without_a_row_of_the_next_step_it_stays_as_it_was():
    whole, missing = _rows(), _rows(missing=[5])
    expected = joined(whole)["oscillation"]
    found = joined(missing)["oscillation"]
    step = np.repeat(np.arange(len(ENDS) - 1), POINTS + 1)
    kept = step != 5
    expected = np.where(step[:, None] == 4, whole["oscillation"], expected)[kept]
    np.testing.assert_array_equal(found, expected)


def test_no_variance_becomes_negative():
    rows = _rows()
    rise = rows["joint"]["rise"]
    # As of a joint far above the ends: parabolas to it would go far below zero.
    rise = jax.tree.map(lambda x: 50.0 + 0 * x, rise)
    rise["trace_covariance"] = 100.0 + 0 * rise["trace_covariance"]
    after = joined(rows | dict(joint=rows["joint"] | dict(rise=rise)))
    assert np.min(after["oscillation"]) == 0
    assert np.mean(after["oscillation"] == 0) > 0.1
    assert np.min(after["gradient_sq"]) >= 0
    np.testing.assert_allclose(
        np.sum(after["oscillation"], axis=1), after["trace_covariance"], atol=1e-13
    )


def test_a_variance_that_is_rounding_has_no_say_in_it():
    rows = _rows()
    wide = lambda x, value: jnp.concatenate([x, jnp.full((len(x), 1), value)], axis=1)
    moved = wide(rows["joint"]["rise"]["oscillation"], 1e-12)
    joint = rows["joint"] | dict(rise=rows["joint"]["rise"] | dict(oscillation=moved))
    after = joined(rows | dict(oscillation=wide(rows["oscillation"], 0.0), joint=joint))
    expected = joined(rows)["oscillation"]
    np.testing.assert_array_equal(after["oscillation"][:, :2], expected)
    assert np.max(after["oscillation"][:, 2]) <= 1e-12


def test_of_what_is_not_there_nothing_is_known():
    """Rows that were not reached, under `jax.jit`, have infinite times; those of a step
    that failed are not numbers; and a user's metric may be neither at one time."""
    whole = _rows()
    count = (len(ENDS) - 2) * (POINTS + 1)  # up to the last step
    expected = jax.tree.map(lambda x: x[:count], whole)
    expected = joined(expected)
    keep = lambda x, value: x.at[count:].set(value)
    unreached = jax.tree.map(lambda x: keep(x, jnp.inf), whole)
    failed = jax.tree.map(lambda x: keep(x, jnp.nan), whole) | dict(
        t=whole["t"], joint=whole["joint"]
    )
    for rows in (unreached, failed):
        after = jax.tree.map(lambda x: x[:count], joined(rows))
        jax.tree.map(np.testing.assert_array_equal, after, expected)
    row = np.searchsorted(whole["t"], ENDS[6], side="right")
    rise = whole["joint"]["rise"]
    bad = rise["trace_covariance"].at[row].set(jnp.nan)
    joint = whole["joint"] | dict(rise=rise | dict(trace_covariance=bad))
    after = joined(whole | dict(joint=joint))
    assert np.all(np.isfinite(after["trace_covariance"]))
    np.testing.assert_array_equal(after["oscillation"], joined(whole)["oscillation"])


def test_series_without_joints_are_what_they_are():
    rows = dict(t=jnp.arange(3.0), loss=jnp.ones(3))
    assert joined(rows) == rows
