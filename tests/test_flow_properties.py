"""What holds for the flows of any network, weights, data and learning rate, which
Hypothesis draws. Shapes are fixed and all the rest is data, so that one program serves
all examples of a flow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import centralflow as cf

from .problems import tiny_loss, tiny_network

STEPS, N, WIDTH, INPUTS, OUTPUTS = 60, 12, 4, 3, 2
SIZE = WIDTH * INPUTS + WIDTH + OUTPUTS * WIDTH
RTOL = 1e-2
# A violation of the constraint by the share v of the critical sharpness is an error of
# (5 v)^2, so as much as this is accepted within a step. In one of length dt only the
# share dt / (dt + 1/4) counts: down to dt = 0.2, v may be 1.5 times as large.
VIOLATION = np.sqrt(RTOL) / 5
TIMES = np.arange(STEPS + 1.0)


def _network(v):
    A, b, C = jnp.split(v, [WIDTH * INPUTS, WIDTH * INPUTS + WIDTH])
    return dict(A=A.reshape(WIDTH, INPUTS), b=b, C=C.reshape(OUTPUTS, WIDTH))


def _loss(v, batch):
    """Of two networks that know nothing of each other, `shares` of whose losses count:
    with (1, 1) and equal weights every eigenvalue is double, and with (1, 0) half of
    the parameters are dead. `order` says where each parameter stands in v."""
    x, y, shares, order = batch
    both = v[order[0]].reshape(2, SIZE)
    return sum(shares[0, i] * tiny_loss(_network(both[i]), (x, y)) for i in range(2))


_hessian = jax.jit(
    jax.hessian(lambda v, batch: tiny_loss(_network(v), batch), argnums=0)
)


class Problem:
    """A random network, and a learning rate at which it starts below the edge."""

    def __init__(self, seed, sharpness):
        model, self.xy = tiny_network(jnp.float32, WIDTH, N, INPUTS, OUTPUTS, seed)
        self.v = jnp.concatenate([jnp.ravel(model[k]) for k in "AbC"])
        self.rate = 2 * sharpness / float(np.linalg.eigvalsh(self.hessian(self.v))[-1])

    def hessian(self, v):
        return np.asarray(_hessian(v, self.xy), float)

    def predict(
        self, second=0.0, order=None, rows=None, optimizer=None, size=None, **options
    ):
        order = np.arange(2 * SIZE) if order is None else order
        rows = np.arange(N) if rows is None else rows
        every = lambda x, dtype: jnp.tile(jnp.asarray(x, dtype), (N, 1))
        x, y = (a[rows] for a in self.xy)
        data = (x, y, every([1.0, second], jnp.float32), every(order, jnp.int32))
        start = jnp.zeros(2 * SIZE).at[order].set(jnp.tile(self.v, 2))
        optimizer = cf.GradientDescent(self.rate) if optimizer is None else optimizer
        objective = cf.Objective(_loss, data, microbatch_size=size)
        return cf.predict(
            objective, start, optimizer, STEPS, weight_times=TIMES, **options
        )


def _difference(a, b):
    """The mean relative difference of two series."""
    return float(np.mean(np.abs(np.asarray(a) / np.asarray(b) - 1)))


# The sharpness at the start, over the critical one.
problems = st.builds(Problem, st.integers(0, 10**6), st.floats(0.5, 0.95))


def _examples(few, many):
    """A test runs on a few examples, and as a slow one on many."""
    return pytest.mark.parametrize(
        "examples", [few, pytest.param(many, marks=pytest.mark.slow)]
    )


def _check(examples, property_, *strategies):
    options = dict(deadline=None, derandomize=True, max_examples=examples)
    settings(**options)(given(*strategies)(property_))()


def _complementarity(problem):
    flow = problem.predict()
    X, sharpness = np.asarray(flow.oscillation), np.asarray(flow.sharpness)
    # Feasible: as reported, and as it is at the weights.
    assert np.nanmax(sharpness) <= 2 * (1 + 1.5 * VIOLATION)
    hessians = [problem.hessian(w[:SIZE]) for w in flow.weights]
    true = problem.rate * np.linalg.eigvalsh(hessians)[:, -1]
    assert np.max(true) <= 2 * (1 + 1.5 * VIOLATION)
    # It oscillates only where it is critical: <X, 2 - lambda> = 0. At the ends of
    # steps, and between them as a mean over time: an eigenvalue that leaves the edge in
    # a step takes all of it, in the series, for the oscillation to die out.
    assert np.all(X >= 0)
    slack = np.abs(2 - np.where(X > 0, sharpness, 2))
    # Nor is an eigenvalue known in the step in which it is first seen.
    slack = np.where(np.isfinite(slack), slack, 2)
    assert np.sum(slack * X) <= VIOLATION * 2 * np.sum(X)
    # E[L] = L + <H, Sigma> / 2, and H Sigma = 2 P Sigma if all of it is critical. In
    # the difference of the losses their rounding remains.
    total, rounding = np.sum(X, axis=1), 4 * np.finfo(np.float32).eps * flow.loss
    added = np.asarray(flow.mean_loss - flow.loss)
    assert np.all(np.abs(added - total) <= VIOLATION * np.max(total) + rounding)
    # The network that does not count has moved by no more than the noise, a share of
    # 1e-3, from which the Krylov space of the response starts.
    moved = np.linalg.norm(flow.weights - flow.weights[0], axis=0)
    live, dead = np.linalg.norm(moved[:SIZE]), np.linalg.norm(moved[SIZE:])
    assert dead <= 1e-3 * live


@_examples(8, 100)
def test_complementarity_beside_dead_parameters(examples):
    _check(examples, _complementarity, problems)


def test_an_eigenvalue_that_comes_back():
    """One close to the edge is predicted at 1.89, since it is held too much; when that
    is corrected it rises, to 2.14 if the constraint does not count it."""
    _complementarity(Problem(1376, 0.75))


def test_the_correction_raises_another():
    """The second, at 1.83 in a prediction, to 2.05. It counts as not critical, and what
    the critical one lacks was estimated from 1.83: the true sharpness was 2.084."""
    _complementarity(Problem(858, 0.75))


def test_one_comes_from_below_the_guards():
    """Third at the start, and not coupled to the first two, which were the only ones
    tracked: at t = 36 it passes the second, and in steps of 5 to 8 was not found before
    it was at 2.13."""
    _complementarity(Problem(407840, 0.6713467287399002))


def _doubled(problem, carry, apart):
    flow = cf.CentralFlow(carry_third_derivatives=carry)
    one, two = problem.predict(flow=flow), problem.predict(second=1.0, flow=flow)
    # Each is right to 3 rtol, as of test_long_steps.py.
    assert _difference(two.loss, 2 * one.loss) < 3 * RTOL
    assert np.nanmax(two.sharpness) <= 2 * (1 + 1.5 * VIOLATION)
    # Where one is held, so is the other: they are not torn apart, though no sum of an
    # eigenvector here and one there is better than another.
    first, second = two.weights[:, :SIZE], two.weights[:, SIZE:]
    travelled = np.linalg.norm(first[-1] - first[0])
    assert np.max(np.linalg.norm(first - second, axis=1)) < apart * travelled


# In some problems it is the flow itself that leads them apart.
_drift = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="1.5 rtol apart in 42 problems, 3.7 in Problem(2418, 0.9375), where 1.5 % "
    "is left with rtol=1e-3.",
)
_few_and_many = pytest.mark.parametrize(
    "examples", [4, pytest.param(40, marks=[pytest.mark.slow, _drift])]
)


@_few_and_many
def test_double_eigenvalues(examples):
    """Two equal networks side by side go as one alone, at twice the loss."""
    _check(examples, lambda x: _doubled(x, carry=False, apart=RTOL), problems)


@_few_and_many
def test_double_eigenvalues_with_carried_third_derivatives(examples):
    _check(examples, lambda x: _doubled(x, carry=True, apart=2 * RTOL), problems)


def test_carried_third_derivatives_keep_double_eigenvalues_together():
    _doubled(Problem(0, 0.9375), carry=True, apart=RTOL)


def _reordered(problem, order, rows):
    flow = problem.predict()
    # The eigensolver starts from other vectors.
    again = problem.predict(order=np.asarray(order))
    assert _difference(flow.loss, again.loss) < RTOL
    # Only the rounding differs, and perhaps a step that is rejected.
    again = problem.predict(rows=np.asarray(rows))
    assert _difference(flow.loss, again.loss) < RTOL / 2


orders = st.permutations(range(2 * SIZE)), st.permutations(range(N))


@_examples(4, 40)
def test_order_of_parameters_and_of_data(examples):
    _check(examples, _reordered, problems, *orders)


def _descent(problem):
    rtol = 1e-5  # of the weights: for the loss, on which stiff modes tell, a tenth
    flow = problem.predict(flow=cf.StableFlow(), rtol=rtol)
    assert np.all(np.diff(flow.loss) <= 10 * rtol * flow.loss[1:])
    parts = problem.predict(flow=cf.StableFlow(), rtol=rtol, size=5)
    assert _difference(flow.loss, parts.loss) < 10 * rtol
    np.testing.assert_array_equal(flow.mean_loss, flow.loss)


@_examples(5, 60)
def test_the_stable_flow_descends_with_microbatches_too(examples):
    _check(examples, _descent, problems)


def _order_for_rmsprop(problem, order):
    """From far below the edge, where P is small at first; and dead parameters."""
    optimizer = cf.RMSProp(2e-3, 0.9, 1e-2)
    flow = problem.predict(optimizer=optimizer)
    again = problem.predict(optimizer=optimizer, order=np.asarray(order))
    assert _difference(flow.loss, again.loss) < RTOL
    assert np.nanmax(flow.sharpness[1:]) <= 2 * (1 + 1.5 * VIOLATION)


@pytest.mark.slow
def test_order_of_parameters_for_rmsprop():
    _check(20, _order_for_rmsprop, problems, orders[0])


@pytest.mark.slow
def test_microbatches_of_the_central_flow():
    problem = Problem(0, 0.9)
    flow, parts = problem.predict(), problem.predict(size=5)
    assert np.max(flow.oscillation) > 0
    assert _difference(flow.loss, parts.loss) < RTOL / 2
