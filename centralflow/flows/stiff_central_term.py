"""What long steps need of the central flow.

Notation as in `central_term.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..failures import largest
from ..precision import full_precision
from ..solvers import AbstractStiffComplementarityTerm, Step
from .base import FlowState, Work
from .carried import carried, exact_along
from .central_term import CentralTerm
from .coupling import Coupling, coupling, turned_eigenvectors
from .dense import crossing
from .expansion import Expansion, Forcing, Slope, Staleness
from .leapfrog import RingingResponse, leapfrog
from .observables import held
from .response import Response, damped, relaxed_state, responder, state_decay
from .step_error import approach, errors
from .stiff_modes import StiffModes, none_known
from .turning import mean_multiplier, staying

# By how much slowed modes may be faster than they should, for having turned in a step.
_TURNED = 1.3
# An eigenvector counts as critical if leaving it out would let the sharpness exceed the
# critical one by this share of the tolerance. (What it adds grows with the fourth power
# of the step: twice as long, and it is a third.)
_COUPLED = 0.02
# Which share of the tolerance the sharpness may exceed that of the critical
# eigenvectors by before the other tracked ones are looked at.
_LOOK = 0.2
# To what share of what X does to it in a step the sharpness is known; and the finest
# tolerance of the eigenpairs, over the usual one.
_KNOWN, _FINEST = 0.5, 0.05
# The share of a step after which an eigenvalue becomes critical, at most. X after that
# is found by division by the share that is left, and with the jump, whatever else
# changes in X is enlarged; where it is the first eigenvalue there is nothing else. And
# how many times faster than in the step before one may rise to be the same.
_LATEST, _LATEST_OF_MORE, _FASTER = 0.9, 0.75, 3.0
# How far below the edge, over the tolerance, an eigenvalue is that has left it.
_LEFT = 0.1

_matmul = full_precision(jnp.matmul)


class StiffCentralTerm(CentralTerm, AbstractStiffComplementarityTerm):
    """The central flow, for steps of many times what its fastest modes need."""

    rtol: Float[Array, ""]
    carry_forces: bool = eqx.field(static=True)

    def relaxed(
        self, y: FlowState, rate: FlowState, t: Float[Array, ""]
    ) -> tuple[FlowState, FlowState]:
        """What the optimizer state does if what drives it stays as it is."""
        state = lambda t: relaxed_state(self.optimizer, y, rate, t)
        after, slope = jax.jvp(state, (t,), (jnp.ones_like(t),))
        change = jax.tree.map(jnp.subtract, after, y.optimizer_state)
        zero = jnp.zeros_like(y.weights)
        return FlowState(zero, change, {}), FlowState(zero, slope, {})

    def admissible(self, y: FlowState) -> FlowState:
        state = self.optimizer.admissible(y.optimizer_state)
        return dataclasses.replace(y, optimizer_state=state)

    @full_precision
    def reach(
        self,
        y: FlowState,
        rate: FlowState,
        e: Expansion,
        stiff: StiffModes,
        dt: Float[Array, ""],
    ) -> Float[Array, ""]:
        # P may fall in the step, the decay of the learning rate or of nu permitting.
        U = e.eigenvectors
        seen = (jnp.arange(self.block_size) < e.tracked) & (e.sharpness > 0)

        slowness = stiff.slowness(e.sharpness, dt)
        sharpness = e.sharpness * jnp.minimum(_TURNED * slowness, 1)

        squares = U * U

        def largest(share):
            state = relaxed_state(self.optimizer, y, rate, share * dt)
            P = self.optimizer.preconditioner(state)
            norms = squares @ P if P.ndim else P * jnp.sum(squares, axis=1)
            return jnp.max(jnp.where(seen, sharpness / norms, 0))

        shares = jnp.linspace(0, 1, 17, dtype=dt.dtype)
        rates = [0.1 * self.optimizer.critical_sharpness]  # at least
        rates.append(jnp.max(jax.lax.map(largest, shares)))
        for decay in jax.tree.leaves(state_decay(self.optimizer, y)):
            rates.append(jnp.max(jnp.abs(decay)))
        # H changes in the step, too.
        return 1.1 * dt * jnp.max(jnp.stack([jnp.asarray(r, dt.dtype) for r in rates]))

    def expand_ahead(
        self, y: FlowState, previous: Any, before: Any, ratio: Any, relief: Any
    ) -> Expansion:
        if previous is None:
            return self.spectrum(y, None, self.block_size, min(3, self.block_size))
        start = previous.eigenvectors
        if start.shape[0] == self.block_size:
            # What of U the step before changed, once more; the scout goes its own way.
            P = self.optimizer.preconditioner(y.optimizer_state)
            old = before.eigenvectors * jnp.sqrt(P)
            norm = jnp.linalg.norm(old, axis=1, keepdims=True)
            old = jnp.where(norm > 0, old / jnp.where(norm > 0, norm, 1), 0)
            V = start * jnp.sqrt(P)
            tracked = jnp.arange(self.block_size) < previous.tracked
            change = V - _matmul(_matmul(V, old.T), old)
            change = jnp.where(tracked[:, None], change, 0)
            start = (V + jnp.minimum(ratio, 2) * change) / jnp.sqrt(P)
        count, wanted = self.followed(previous)
        with_scout = jnp.maximum(count, self.block_size - 1)
        count = jnp.minimum(count + previous.affordable, with_scout)
        close = self.count_critical(previous.sharpness)
        close = jnp.minimum(jnp.minimum(close, self.room(y)), count)
        wanted = jnp.maximum(wanted, close)
        tolerance = self._tolerance(previous, relief)
        e = self.spectrum(y, previous, count, wanted, start, tolerance)
        # What was at the edge, or close, may be predicted far below it, for being held
        # too much: once that is corrected it is back, and may be beyond. Without
        # oscillations and below the edge there is nothing to solve for.
        critical = jnp.maximum(jnp.maximum(e.critical, previous.held), close)
        critical = jnp.maximum(critical, jnp.minimum(previous.coupled, self.room(y)))
        critical = jnp.minimum(critical, e.tracked)
        below = e.sharpness[0] < self.optimizer.critical_sharpness
        critical = jnp.where(below & (previous.held == 0), 0, critical)
        e = dataclasses.replace(e, critical=critical)
        if previous.forces.shape == e.forces.shape:
            P = self.optimizer.preconditioner(y.optimizer_state)
            return carried(self.objective, y.weights, P, previous, e, ratio)
        return self.with_forces(y, e)

    def _tolerance(
        self, previous: Expansion, relief: Float[Array, ""]
    ) -> Float[Array, ""]:
        """That of the eigenpairs. X answers to a change of the sharpness, whatever its
        cause. So the error of the sharpness, r^2 / (kappa / 2) of a residual r, has to
        be small next to what X does to it in the step, or next to its distance from the
        edge: in a flow that comes to rest at the edge, X would be noise."""
        kappa, usual = self.optimizer.critical_sharpness, self.eigen_tolerance
        below = jnp.maximum(kappa - previous.sharpness[0], 0)
        enough = jnp.sqrt(_KNOWN * (below + relief) / (2 * kappa))
        root = jnp.sqrt(jnp.finfo(enough.dtype).eps)  # less is lost in rounding
        return jnp.clip(enough, jnp.maximum(_FINEST * usual, root), usual)

    def with_room_for_forces(self, y: FlowState, e: Expansion) -> Expansion:
        """The expansion of a prediction that may have carried forces where this one
        does not, or the other way round."""
        rows = self.room(y) if self.carry_forces else 0
        shape = (rows * (rows + 1) // 2, y.weights.size)
        if e.eigenvectors.shape[0] != self.block_size or e.forces.shape == shape:
            return e
        staleness = Staleness.of(False, y.weights.dtype)
        forces = jnp.zeros(shape, y.weights.dtype)
        return dataclasses.replace(e, forces=forces, staleness=staleness)

    def remembered(self, e: Expansion) -> Expansion:
        return dataclasses.replace(e, forces=e.forces[:0])

    def exact_along(
        self, y: FlowState, e: Expansion, X: Float[Array, "k k"]
    ) -> tuple[Expansion, Bool[Array, ""]]:
        if not self.carry_forces:
            return e, jnp.bool_(False)
        P = self.optimizer.preconditioner(y.optimizer_state)
        exact = exact_along(self.objective, y.weights, P, e, X)
        return exact, ~e.staleness.exact

    def no_stiff_modes(self, y: FlowState) -> StiffModes:
        return none_known(y.weights.size, y.weights.dtype)

    def slowed(
        self,
        y: FlowState,
        rate: FlowState,
        stiff: StiffModes,
        dt: Float[Array, ""],
    ) -> FlowState:
        P = self.optimizer.preconditioner(y.optimizer_state)
        weights = stiff.slowed(rate.weights, P, dt)
        return dataclasses.replace(rate, weights=weights)

    def responder(
        self, y: FlowState, e: Expansion, dt: Float[Array, ""]
    ) -> tuple[Callable, StiffModes, Expansion]:
        active = jnp.arange(self.block_size) < e.critical
        force = self.forcing(y, e, jnp.diag(active.astype(dt.dtype))).gradient
        kind = RingingResponse if self.rings else Response
        finite = jnp.isfinite(largest((y.weights, e.sharpness, force)))
        response, stiff, e = responder(
            self.objective, self.optimizer, y, e, force, dt, kind
        )
        return response, stiff, _doubted(e, finite, response.space.nodes)

    @property
    def rings(self) -> bool:
        return self.optimizer.has_memory

    def ring(
        self, y: FlowState, slope: Slope, forcing: Forcing, dt: Float[Array, ""]
    ) -> tuple[FlowState, FlowState, Int[Array, ""], Float[Array, ""]]:
        return leapfrog(self, y, slope, forcing, dt)

    def complete(
        self, y: FlowState, e: Expansion, X, stages, converged
    ) -> tuple[Expansion, Expansion]:
        P, U = self.optimizer.preconditioner(y.optimizer_state), e.eigenvectors
        kappa, rows = self.optimizer.critical_sharpness, jnp.arange(self.block_size)
        above = lambda values: jnp.maximum(values[-1], kappa)

        # What the critical eigenvectors lack is estimated from the others as they were;
        # if that matters, these too are looked at: the correction may have raised them.
        def look(carry):
            first, last, images, *_, of_critical, _ = carry
            images = self.objective.hvps(y.weights, U, last, first, images)
            seen, tracked = rows < last, rows < e.tracked
            gram = jnp.where(seen[:, None] & seen, _matmul(U * P, U.T), e.gram)
            now = coupling(U, images, P, gram, e.sharpness, seen, tracked, kappa)
            of_critical = jnp.where(first == 0, above(now.values), of_critical)
            excess = now.excess + above(now.values) - of_critical
            again = (last < e.tracked) & (excess > _LOOK * self.rtol * kappa)
            return last, e.tracked, images, gram, now, excess, of_critical, again

        none, zero = jnp.zeros_like(e.sharpness), jnp.zeros_like(e.excess)
        nothing = Coupling(e.hessian, none, zero, none)
        seen, _, images, gram, now, excess, *_ = jax.lax.while_loop(
            lambda carry: carry[-1],
            look,
            (
                jnp.int32(0),
                e.critical,
                jnp.zeros_like(U),
                e.gram,
                nothing,
                zero,
                zero,
                jnp.bool_(True),
            ),
        )
        rank = jnp.sum(held(jnp.linalg.eigvalsh(X)), dtype=jnp.int32)
        enough = now.lost < _COUPLED * self.rtol * kappa
        enough &= rows >= rank
        coupled = jnp.where(jnp.any(enough), jnp.argmax(enough), len(rows))
        work = Work(
            gradients=stages,  # one less in the step, and one at its end
            hvps=seen,
            unconverged=(~converged).astype(jnp.int32),
        )
        completed = dataclasses.replace(
            e,
            slope=self.slope(y),
            sharpness=now.values[::-1],
            hessian=now.hessian,
            gram=gram,
            forces=e.forces if self.carry_forces else e.forces[:0],
            held=rank,
            excess=excess,
            coupled=coupled.astype(jnp.int32),
            work=e.work + work,
        )
        if P.ndim == 0:  # they do not turn
            V = U * (e.root / jnp.sqrt(P))
        else:
            critical, tracked = rows < e.critical, rows < e.tracked
            V = turned_eigenvectors(U, images, P, e.sharpness, critical, tracked, kappa)
        return completed, dataclasses.replace(
            completed, eigenvectors=V, forces=e.forces
        )

    def begins(self, before: Expansion) -> Bool[Array, ""]:
        return before.held == 0

    def settled(
        self, before: Expansion, after: Expansion, onset: Float[Array, ""]
    ) -> Bool[Array, ""]:
        return (after.held > 0) & ((before.held == after.held) | (onset > 0))

    def crossing(
        self,
        before: Expansion,
        start: Expansion,
        predicted: Expansion,
        ratio: Float[Array, ""],
    ) -> Float[Array, ""]:
        # Which of the predicted eigenvalues it is cannot be told once they have mixed:
        # it is what is left of their sum when those that were held stay as they are.
        row, rows = start.held, jnp.arange(self.block_size)
        upto = lambda count, e: jnp.sum(jnp.where(rows < count, e.sharpness, 0))
        ahead = upto(row + 1, predicted) - upto(row, start)
        sharpness = before.sharpness[row], start.sharpness[row], ahead
        ratio = jnp.where(row < before.tracked, ratio, 0)
        share = crossing(*sharpness, self.optimizer.critical_sharpness, ratio)
        return jnp.minimum(share, jnp.where(row == 0, _LATEST, _LATEST_OF_MORE))

    def expected(
        self,
        before: Expansion,
        start: Expansion,
        predicted: Expansion,
        ratio: Float[Array, ""],
    ) -> Bool[Array, ""]:
        earlier, first, last = (e.sharpness[0] for e in (before, start, predicted))
        return (ratio == 0) | (last - first < _FASTER * ratio * (first - earlier))

    def onset(
        self,
        crossing: Float[Array, ""],
        start: Expansion,
        after: Expansion,
        earlier: Any,
        mean: Any,
    ) -> Float[Array, ""]:
        row, share = start.held, crossing
        jumps = row < jnp.minimum(after.held, start.tracked)
        # What there is after the jump, times a number: a covariance, in the same order?
        for name in ("oscillation", "loss", "grad_norm_sq", "trace_covariance"):
            left = mean[name] - share * earlier[name]
            jumps &= jnp.all(left >= 0) & jnp.all(jnp.diff(jnp.atleast_1d(left)) <= 0)
        return jnp.where(jumps, share, 0)

    def mean_multiplier(
        self,
        y: FlowState,
        before: Expansion,
        e: Expansion,
        X: Float[Array, "k k"],
        mean: Float[Array, "k k"],
        rho: Float[Array, ""],
        forcing: Forcing,
        mean_forcing: Forcing,
    ) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
        return mean_multiplier(self, y, before, e, X, mean, rho, forcing, mean_forcing)

    def in_rows_of(
        self, y: FlowState, before: Expansion, e: Expansion, C: Float[Array, "k k"]
    ) -> Float[Array, "k k"]:
        P = self.optimizer.preconditioner(y.optimizer_state)
        T = _matmul(e.eigenvectors * P, before.eigenvectors.T)
        return _matmul(_matmul(T, C), T.T)

    def staying(
        self,
        before: Expansion,
        after: Expansion,
        X: Float[Array, "k k"],
        mean: Float[Array, "k k"],
    ) -> Float[Array, ""]:
        # Of equal eigenvalues at the edge X may be anywhere in the span: none has left.
        kappa, row = self.optimizer.critical_sharpness, after.held
        left = after.sharpness[row] < (1 - _LEFT * self.rtol) * kappa
        fewer = left & (after.held > 0) & (after.held < before.held)
        return jnp.where(fewer, staying(X, mean, after.held), 0)

    def damped(
        self, y: FlowState, e: Expansion, defect: FlowState, dt: Float[Array, ""]
    ) -> tuple[FlowState, Expansion]:
        weights, count = damped(
            self.objective, self.optimizer, y, e, defect.weights, dt
        )
        e = _doubted(e, jnp.isfinite(largest((y.weights, defect.weights))), weights)
        defect = FlowState(weights, defect.optimizer_state, defect.observables)
        return defect, dataclasses.replace(e, work=e.work + Work(hvps=count))

    @full_precision
    def distance(self, y0: FlowState, y1: FlowState) -> Float[Array, ""]:
        P = self.optimizer.preconditioner(y1.optimizer_state)
        return jnp.sqrt(jnp.sum(P * (y1.weights - y0.weights) ** 2))

    def relative_error(self, step: Step) -> tuple[Float[Array, ""], Expansion]:
        def error(noise):
            return jnp.max(jnp.stack(list(errors(self, step, noise).values())))

        e = step.expansion1
        none = jax.tree.map(jnp.zeros_like, e.slope)
        first = error(none)
        if self.rings:  # there is no defect
            return first, e
        # Before a step is blamed for it, what rounding makes of the error is measured.
        found, work = jax.lax.cond(
            first > self.rtol,
            lambda: (error(self._noise(step.y1, e.slope)), Work(gradients=1)),
            lambda: (first, Work()),
        )
        return found, dataclasses.replace(e, work=e.work + work)

    def _noise(self, y: FlowState, slope: Slope) -> Slope:
        """How much the slope changes where each weight is rounded another way."""
        w = y.weights
        sign = jax.random.rademacher(jax.random.key(0), w.shape, w.dtype)
        w = w * (1 + jnp.finfo(w.dtype).eps * sign)
        other = self.slope(dataclasses.replace(y, weights=w))
        return jax.tree.map(lambda a, b: jnp.abs(a - b), other, slope)

    def approach(self, step: Step) -> Float[Array, "2 k"]:
        return approach(self, step)


def _doubted(e: Expansion, finite: Bool[Array, ""], products: Array) -> Expansion:
    """What the Hessian made not finite, of something `finite`, makes e so."""
    bad = finite & ~jnp.isfinite(largest(products))
    return dataclasses.replace(e, sharpness=jnp.where(bad, jnp.nan, e.sharpness))
