"""Moreau time stepping of a differential equation with a complementarity constraint."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..sdcp import SDCPSolution, solve_sdcp
from .term import AbstractComplementarityTerm


class _State(eqx.Module):
    expansion: Any
    X: Float[Array, "k k"]
    unconverged: Int[Array, ""]  # complementarity problems so far


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
        return _complete(term, y0, previous, dt)

    def init(self, terms, t0, t1, y0, args) -> _State:
        return self.start(terms.term, y0, t1 - t0, None)[1]

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        del args, made_jump
        term, dt = terms.term, t1 - t0
        rate = _rate(term, y0, solver_state.expansion, solver_state.X, dt)
        y1 = jax.tree.map(lambda y, r: y + dt * r, y0, rate)
        y1, new_state = _complete(term, y1, solver_state, dt)
        good = term.is_finite(y1, new_state.expansion)
        result = diffrax.RESULTS.where(
            good, diffrax.RESULTS.successful, diffrax.RESULTS.nonfinite
        )
        # A failed step reports its NaNs but does not put them into the solution.
        keep = lambda new, old: jax.tree.map(
            lambda a, b: jnp.where(good, a, b), new, old
        )
        info = dict(y0=y0, y1=y1)
        return keep(y1, y0), None, info, keep(new_state, solver_state), result

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

    solution = multiplier(end, term.active(expansion), C)
    failures = jnp.int32(0) if previous is None else previous.unconverged
    failures = failures + (~solution.converged).astype(jnp.int32)
    y = term.record(y, expansion, solution.X)
    return y, _State(expansion, solution.X, failures)


def _rate(term: AbstractComplementarityTerm, y, expansion, X, dt) -> PyTree:
    return term.rate(y, expansion.slope, term.forcing(y, expansion, X), dt)


def multiplier(
    end: Callable[[Float[Array, "k k"]], Float[Array, "k k"]],
    active: Int[Array, ""],
    like: Float[Array, "k k"],
) -> SDCPSolution:
    """X such that 0 <= X perpendicular to `end(X)` >= 0, for `end` affine with a
    self-adjoint linear part, on the first `active` rows. `like` has X's shape."""
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
    return solve_sdcp(A, B, jnp.arange(k) < active)
