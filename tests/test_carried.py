"""Third derivatives that are carried from step to step, against those computed anew."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf
from centralflow.flows.base import FlowState

from .problems import tiny_loss, tiny_network

# The critical eigenvectors span the first coordinates, and the weights move along the
# others. All third derivatives of critical pairs are along the others, too, and what
# the Hessian changes turns the eigenvectors within their span.
SPAN, SIZE = 3, 12
VALUES = np.concatenate([[2.001, 1.99, 1.98], np.linspace(0.5, 0.1, SIZE - SPAN)])
AHEAD = np.concatenate([np.zeros(SPAN), [0.5], np.zeros(SIZE - SPAN - 1)])

pytestmark = pytest.mark.usefixtures("x64")


def _loss(quartic):
    """The third derivatives are constant, or not if it is `quartic`."""
    C = np.random.default_rng(0).normal(size=(SPAN, SPAN, SIZE - SPAN))
    C = 0.005 * jnp.asarray(C + C.transpose(1, 0, 2))

    def loss(w):
        of = lambda C, v: 0.5 * jnp.einsum("i,j,ijk,k", w[:SPAN], w[:SPAN], C, v)
        far = w[SPAN:]
        return 0.5 * VALUES @ w**2 + of(C, far) + quartic * of(C[::-1, ::-1], far**2)

    return loss


def _term(loss, optimizer):
    flat = cf.Objective(loss).flatten(jnp.zeros(SIZE))[1]
    flow = cf.CentralFlow(eigen_tolerance=1e-10)
    return flow.term(flat, optimizer, {}, jnp.zeros(0, int), jnp.asarray(1e-2))


def _step(
    quartic, optimizer=None, ahead=AHEAD, critical=SPAN, held=1, ratio=1.0, **staleness
):
    """The expansions at both ends, that at the second from the first; and the third
    derivatives there."""
    optimizer = cf.GradientDescent(1.0) if optimizer is None else optimizer
    term = _term(_loss(quartic), optimizer)
    w = jnp.zeros(SIZE)
    # If nu is a state, P = nu^1/2 is 1 first, and then another for each weight. (Being
    # diagonal, it leaves the span of the first coordinates what it is.)
    P = np.concatenate([[1.01, 0.99, 1.0], np.linspace(0.6, 2, SIZE - SPAN)])
    fill = lambda P: lambda x: 0 * x + (P if x.ndim else P[0]) ** 2
    nu = lambda P: jax.tree.map(fill(P), optimizer.init(w))
    y0 = FlowState(w, nu(np.ones(SIZE)), {})
    y1 = FlowState(jnp.asarray(ahead), nu(P), {})
    before = term.with_forces(
        y0, term.expand_ahead(y0, None, None, jnp.zeros(()), jnp.zeros(()))
    )
    before = dataclasses.replace(
        before,
        critical=jnp.int32(critical),
        held=jnp.int32(held),
        staleness=dataclasses.replace(before.staleness, **staleness),
    )
    after = term.expand_ahead(y1, before, before, jnp.asarray(ratio), jnp.zeros(()))
    count = int(after.critical)
    assert count == SPAN
    true = term.objective.thirds(y1.weights, after.eigenvectors[: term.room(y1)], count)
    return term, y1, before, after, true


def _computed(before, after):
    work = after.work.third_derivatives - before.work.third_derivatives
    return int(work)


@pytest.mark.parametrize(
    "optimizer", [None, cf.RMSProp(1.0, 0.9, 0.0), cf.ScalarRMSProp(1.0, 0.9, 0.0)]
)
def test_they_turn_with_the_eigenvectors(optimizer):
    """If they are constant nothing is computed, and nothing is wrong."""
    _, _, before, after, true = _step(0.0, optimizer)
    turn = before.eigenvectors[:SPAN] @ after.eigenvectors[:SPAN].T
    assert np.max(np.abs(turn - np.diag(np.diag(turn)))) > 0.3
    assert int(after.work.third_derivatives) == 0
    assert not after.staleness.exact
    size = np.max(np.abs(true))
    # The eigenvectors' residuals are 1e-10, and what turned out of the span its square.
    np.testing.assert_allclose(after.forces, true, atol=1e-9 * size)


def test_those_of_a_new_direction_are_computed():
    """Of three directions two were known: three pairs of the six are computed."""
    _, _, _, after, true = _step(0.0, critical=2)
    assert int(after.work.third_derivatives) == 3
    np.testing.assert_allclose(
        after.forces, true, atol=1e-9 * np.max(np.abs(true)), rtol=0
    )


@pytest.mark.parametrize(("cosine_sq", "computed"), [(0.85, 3), (0.95, 0)])
def test_a_direction_that_is_partly_new(cosine_sq, computed):
    """One that has turned out of the span by more than a tenth of its square is not
    taken to be known."""
    term, y1, before, _, _ = _step(0.0)
    cosine, sine = np.sqrt(cosine_sq), np.sqrt(1 - cosine_sq)
    U = before.eigenvectors
    U = U.at[2].set(cosine * U[2] + sine * U[3])
    old = dataclasses.replace(before, eigenvectors=U, critical=jnp.int32(SPAN))
    old = term.with_forces(FlowState(jnp.zeros(SIZE), jnp.zeros(()), {}), old)
    after = term.expand_ahead(y1, old, old, jnp.ones(()), jnp.zeros(()))
    assert int(after.work.third_derivatives) == computed
    true = term.with_forces(y1, after).forces
    off = np.max(np.abs(after.forces - true)) / np.max(np.abs(true))
    assert (off < 1e-9) == (computed == 3)


@pytest.mark.parametrize(
    ("error", "change", "ratio"),
    [(0.3, 0.0, 1.0), (0.1, 0.15, 1.0), (0.1, 0.09, 1.2), (np.nan, 0.0, 1.0)],
)
def test_all_are_computed_once_they_are_stale(error, change, ratio):
    error, change = jnp.asarray(error), jnp.asarray(change)
    _, _, _, after, true = _step(1.0, ratio=ratio, error=error, change=change)
    assert int(after.work.third_derivatives) == 6
    np.testing.assert_array_equal(after.forces, true)
    assert after.staleness.exact
    assert after.staleness.error == 0


@pytest.mark.parametrize("optimizer", [None, cf.RMSProp(1.0, 0.9, 0.0)])
def test_how_much_they_changed_is_in_the_norm_of_P(optimizer):
    """In |D|^2 = sum_ij D_ij' P^-1 D_ij, u' P u = 1, no units are left."""
    nan = jnp.asarray(np.nan)
    term, y1, before, after, true = _step(1.0, optimizer, error=nan)
    P = np.broadcast_to(term.optimizer.preconditioner(y1.optimizer_state), SIZE)
    U, V = before.eigenvectors[:SPAN], after.eigenvectors[:SPAN]
    turn = (V * P) @ U.T @ np.linalg.inv((U * P) @ U.T)
    tensor = lambda forces: forces[np.array([[0, 1, 3], [1, 2, 4], [3, 4, 5]])]
    old = np.einsum("ia,jb,abn->ijn", turn, turn, tensor(before.forces))
    size = lambda D: np.linalg.norm(D / np.sqrt(P))
    expected = size(tensor(true) - old) / size(tensor(true))
    assert expected > 0.1
    np.testing.assert_allclose(after.staleness.change, expected, rtol=1e-8)


def test_all_are_computed_where_that_is_no_dearer():
    """Three pairs of a new direction and three along X are all there are."""
    for held, computed in ((2, 3), (3, 6)):
        _, _, _, after, _ = _step(0.0, critical=2, held=held)
        assert int(after.work.third_derivatives) == computed
        assert bool(after.staleness.exact) == (computed == 6)


def test_going_on_with_forces_and_without():
    """A solver state of either kind serves the other. Both are right to 1 %."""
    model, data = tiny_network(jnp.float64, 10, 20, outputs=4)
    predict = lambda carry, steps, **start: cf.predict(
        cf.Objective(tiny_loss, data), model, cf.GradientDescent(0.5), steps,
        flow=cf.CentralFlow(carry_third_derivatives=carry), **start,
    )  # fmt: skip
    for carry in (True, False):
        first = predict(carry, 70)
        assert first.oscillation[-1, 0] > 0
        same, other = (
            predict(x, 20, solver_state=first.solver_state) for x in (carry, not carry)
        )
        np.testing.assert_allclose(other.loss, same.loss, rtol=2e-2)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_forces_are_exact_along_X(rank):
    """For an X of any basis, at as many third derivatives as its rank; and what has
    nothing to do with X stays as it was."""
    term, y1, _, e, true = _step(1.0, error=jnp.asarray(0.05))
    k = term.block_size
    Q = np.linalg.qr(np.random.default_rng(2).normal(size=(SPAN, SPAN)))[0]
    variances = np.array([3.0, 1.0, 0.0]) * (np.arange(SPAN) < rank)
    X = jnp.zeros((k, k)).at[:SPAN, :SPAN].set((Q * variances) @ Q.T)
    force = lambda e: term.forcing(y1, e, X).gradient
    exact = force(dataclasses.replace(e, forces=true))
    size = np.max(np.abs(true))
    if rank:
        assert np.max(np.abs(force(e) - exact)) > 0.01 * size
    found, again = term.exact_along(y1, e, X)
    assert again
    assert found.staleness.exact
    assert _computed(e, found) == rank
    np.testing.assert_allclose(force(found), exact, atol=1e-12 * size)

    other = jnp.zeros((k, k)).at[:SPAN, :SPAN].set(np.outer(Q[:, 2], Q[:, 2]))
    force = lambda e: term.forcing(y1, e, other).gradient
    np.testing.assert_allclose(force(found), force(e), atol=1e-12 * size)

    # The error grows by what was found along X.
    tensor = lambda e: e.forces[np.array([[0, 1, 3], [1, 2, 4], [3, 4, 5]])]
    along = lambda e: np.einsum("ir,jr,ijn->rn", Q, Q, tensor(e))[:rank]
    change = along(found) - along(e)
    expected = np.linalg.norm(change) / np.linalg.norm(along(found)) if rank else 0.0
    np.testing.assert_allclose(found.staleness.error, 0.05 + expected, rtol=1e-9)

    same, again = term.exact_along(y1, found, X)
    assert not again
    assert _computed(found, same) == 0
    np.testing.assert_array_equal(same.forces, found.forces)
