"""Moreau time stepping of a differential equation with a complementarity constraint."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..failures import Failure, choose, first_of, when
from ..results import RESULTS
from ..sdcp import SDCPSolution, solve_sdcp
from .term import AbstractComplementarityTerm

# A multiplier that leaves half of the violation that it is to remove, or more, does not
# hold the constraint. Where the set of tight rows changes, that may happen in a step or
# two; where it lasts for so many optimizer steps, the solution means nothing: with the
# sharpness a tenth above critical an oscillation grows by 1.2^10 = 6 in that time.
_UNHELD = 0.5
LONGEST_UNHELD = 10.0


class _State(eqx.Module):
    expansion: Any
    X: Float[Array, "k k"]
    unconverged: Int[Array, ""]  # complementarity problems so far
    unheld: Float[Array, ""]  # for how long X has not held the constraint
    failure: Failure


class Moreau(diffrax.AbstractSolver):
    """Time stepping with the constraint imposed at the end of each step.

    With everything evaluated at the start of a step of length dt,

        y1 = y0 + dt f(y0, X),     0 <= X  perpendicular to  C + dt C' f(y0, X) >= 0,

    a semidefinite complementarity problem with A = C + dt C' f(y0, 0) and
    B = dt C' (f(y0, .) - f(y0, 0)). To pose it on the rate C' f >= 0 of the tight rows
    instead would let C drift; here C itself stands in A, so that a violation is pulled
    back in the next step, and rows become tight and leave by themselves. First order.

    X belongs to the *start* of a step but is computed at the end of the previous one,
    so that the observables of y1 can use it.

    ??? cite "Reference"

        J. J. Moreau, *Evolution problem associated with a moving convex set in a
        Hilbert space*, Journal of Differential Equations 26 (1977).
    """

    term_structure: ClassVar = AbstractComplementarityTerm
    interpolation_cls: ClassVar[Callable] = diffrax.LocalLinearInterpolation
    state_type: ClassVar = _State

    def order(self, terms):
        return 1

    def start(self, term, y0, dt, previous) -> tuple[PyTree, _State]:
        """y0 with its observables, and the solver state there; `previous` is that at
        the end of an earlier part, or None."""
        y0, state = _complete(term, y0, previous, dt)
        return choose(state.failure.failed, term.without_oscillations(y0), y0), state

    def init(self, terms, t0, t1, y0, args) -> _State:
        return self.start(terms.term, y0, t1 - t0, None)[1]

    @eqx.filter_jit  # Diffrax traces a step four times: this, once
    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del args, made_jump
        term, dt = terms.term, t1 - t0
        rate = _rate(term, y0, solver_state.expansion, solver_state.X, dt)
        y1 = jax.tree.map(lambda y, r: y + dt * r, y0, rate)
        y1, new_state = _complete(term, y1, solver_state, dt)
        failure = first_of(solver_state.failure.at(t0), new_state.failure.at(t1))
        y1, y_end, state, result = settle(failure, y1, new_state, y0, solver_state)
        return y_end, None, dict(y0=y0, y1=y1), state, result

    def func(self, terms, t0, y0, args):
        return terms.vf(t0, y0, args)


def _complete(term, y, previous: _State | None, dt) -> tuple[PyTree, _State]:
    expansion = term.expand(y, None if previous is None else previous.expansion)
    C = term.constraint(expansion)

    horizon = dt + term.memory

    def end(X):
        rate = _rate(term, y, expansion, X, horizon)
        drift = term.drift(y, expansion, rate)
        return C + horizon * term.constraint_rate(y, expansion, drift)

    solution, left = multiplier(end, term.active(expansion), C)
    count = jnp.int32(0) if previous is None else previous.unconverged
    count = count + (~solution.converged).astype(jnp.int32)
    y = term.record(y, expansion, solution.X)
    unheld = jnp.zeros_like(left) if previous is None else previous.unheld
    unheld, unsolved = unheld_for(left, unheld, dt)
    failure = first_of(term.failure(y, expansion), unsolved)
    return y, _State(expansion, solution.X, count, unheld, failure)


def _rate(term: AbstractComplementarityTerm, y, expansion, X, dt) -> PyTree:
    return term.rate(y, expansion.slope, term.forcing(y, expansion, X), dt)


def multiplier(
    end: Callable[[Float[Array, "k k"]], Float[Array, "k k"]],
    active: Int[Array, ""],
    like: Float[Array, "k k"],
) -> tuple[SDCPSolution, Float[Array, ""]]:
    """X such that 0 <= X perpendicular to `end(X)` >= 0, for `end` affine with a
    self-adjoint linear part, on the first `active` rows; and the share of the violation
    of `end(0)` that it leaves, if it is no solution. `like` has X's shape."""
    A, response = jax.linearize(end, jnp.zeros_like(like))
    k = like.shape[0]
    # B on the basis of symmetric matrices, the pairs of the leading rows first.
    rows, columns = (jnp.asarray(x) for x in np.tril_indices(k))

    def column(p, B):
        i, j = rows[p], columns[p]
        E = jnp.zeros_like(like).at[i, j].add(0.5).at[j, i].add(0.5)
        image = response(E)
        return B.at[:, :, i, j].set(image).at[:, :, j, i].set(image)

    B = jnp.zeros((k, k, k, k), like.dtype)
    B = jax.lax.fori_loop(0, active * (active + 1) // 2, column, B)
    # Self-adjoint in exact arithmetic; rounding must not make it otherwise.
    B = (B + B.transpose(2, 3, 0, 1)) / 2
    rows = jnp.arange(k) < active
    solution = solve_sdcp(A, B, rows)
    ends = jnp.stack([jnp.where(rows[:, None] & rows, A, 0), solution.slack])
    before, after = -jnp.linalg.eigvalsh(ends)[:, 0]
    left = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 0)
    return solution, jnp.where(solution.converged, 0, jnp.maximum(left, 0))


def unheld_for(
    left: Float[Array, ""], before: Float[Array, ""], dt: Any
) -> tuple[Float[Array, ""], Failure]:
    """For how long the constraint has not been held, after a step of length dt with the
    share `left`; and the failure if that is too long."""
    unheld = jnp.where(left < _UNHELD, 0, before + dt).astype(left.dtype)
    return unheld, when(unheld > LONGEST_UNHELD, RESULTS.sdcp_failed, left)


def settle(
    failure: Failure, y1: PyTree, state: Any, y0: PyTree, old: Any
) -> tuple[PyTree, PyTree, Any, diffrax.RESULTS]:
    """A step that failed reports NaN in between, and nothing else changes: the y1 to be
    interpolated, the y1 and the state to go on with, and Diffrax's result."""
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), y1)
    y_end, state = choose(failure.failed, (y0, old), (y1, state))
    state = eqx.tree_at(lambda s: s.failure, state, failure)
    result = diffrax.RESULTS.where(
        failure.failed, diffrax.RESULTS.nonfinite, diffrax.RESULTS.successful
    )
    return choose(failure.failed, nothing, y1), y_end, state, result
