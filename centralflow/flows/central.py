"""The central flow: the time-averaged trajectory at the edge of stability."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..checks import require_integer, require_positive
from ..failures import Failure, choose, no_failure
from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from ..solvers import ForesightController, Moreau, Piece, ProjectedRKC
from .base import AbstractFlow, FlowState, Work
from .central_term import GUARDS, CentralTerm
from .dense import StepInterpolation
from .joints import no_joint
from .response import state_decay
from .stiff_central_term import StiffCentralTerm

# Fixed steps: an eigenvalue is taken for one that may become critical within a step
# unless it would have to rise by more than this share of the critical sharpness per
# optimizer step. Adaptive steps correct a prediction, and need less.
_MAX_RISE = 0.1
_MARGIN = 0.03
# In optimizer steps, over the root of rtol: a quarter, for the usual one. (Steps are of
# second order.) Within that time the optimizer itself does not follow the flow.
_RESOLUTION = 2.5
# With a larger tolerance, predictions that are too far off to be corrected would be
# accepted.
_LARGEST_RTOL = 0.05


class CentralFlow(AbstractFlow):
    """The central flow,

        dw/dt = velocity(w, s, E[g]),          E[g]     = g + (1/2) grad <Sigma, H>,
        ds/dt = state_rate(s, E[g], E[g * g]), E[g * g] = g * g + diag(H Sigma H),

    where Sigma = U' X U, U the top eigenvectors of P^-1 H, and X is such that no
    eigenvalue of P^-1 H exceeds the critical sharpness:

        0 <= X   perpendicular to   U (kappa P - H) U' >= 0.

    **Arguments:**

    - `substeps`: `None` for steps as long as the tolerance permits, which is far longer
        than an optimizer step; or the number of fixed steps per optimizer step, for a
        scheme that is simpler and costs far more than the optimizer's run.
    - `renew_every`: the eigenvectors and the third derivatives are computed anew every
        so many fixed steps; the gradient, P and the Rayleigh quotients always are. By
        default every optimizer step or four fixed ones, whichever is less: with four,
        that is the published scheme. The eigenvalues may then exceed the critical one
        by what the eigenvectors turn in that time, about 1e-3.
    - `block_size`: the number of eigenvectors there is room for. It is doubled when
        they are all needed.
    - `eigen_tolerance`: the residual norm to which the eigenpairs are computed, over
        the largest eigenvalue; by default 2e-3 with fixed steps and 0.2 sqrt(rtol)
        with adaptive ones, or down to a 20th of that where the oscillations die down at
        the edge. The error of an eigenvalue is of the order of its square.
    - `carry_third_derivatives`: whether adaptive steps keep the third derivatives of
        all pairs of critical eigenvectors from step to step, so that few are computed.
        Without, a prediction takes the memory of 1.5 (k - 2) (k - 1) vectors of
        parameters less, k the block size, and where many eigenvalues are critical up to
        1.5 times the work. The oscillation is then reported up to some percent too
        large in long steps.

    ??? cite "Reference"

        J. Cohen, A. Damian, A. Talwalkar, J. Z. Kolter, J. D. Lee, *Understanding
        optimization in deep learning with central flows*, arXiv 2410.24206.
    """

    # Arrays, so that one program serves all their values.
    substeps: Int[Array, ""] | None
    renew_every: Int[Array, ""]
    eigen_tolerance: Float[Array, ""] | None
    block_size: int = eqx.field(static=True)
    carry_third_derivatives: bool = eqx.field(static=True)

    def __init__(
        self,
        substeps: int | None = None,
        *,
        renew_every: int | None = None,
        block_size: int = 8,
        eigen_tolerance: float | None = None,
        carry_third_derivatives: bool = True,
    ):
        if substeps is None and renew_every is not None:
            raise ValueError(
                f"`renew_every` is {renew_every!r}, which is for fixed steps: set "
                "`substeps` too."
            )
        for name, value in (
            ("substeps", 1 if substeps is None else substeps),
            ("renew_every", 1 if renew_every is None else renew_every),
            ("block_size", block_size),
        ):
            require_integer(name, value)
        if not isinstance(carry_third_derivatives, bool):
            raise ValueError(
                "`carry_third_derivatives` must be True or False, got "
                f"{carry_third_derivatives!r}."
            )
        if eigen_tolerance is not None:
            require_positive("eigen_tolerance", eigen_tolerance, 1)
        if renew_every is None:
            renew_every = 1 if substeps is None else min(substeps, 4)
        if eigen_tolerance is None and substeps is not None:
            eigen_tolerance = 2e-3
        real = lambda x: jnp.asarray(x, jnp.result_type(float))
        self.substeps = None if substeps is None else jnp.asarray(substeps)
        self.renew_every = jnp.asarray(renew_every)
        self.block_size = int(block_size)
        self.carry_third_derivatives = carry_third_derivatives
        self.eigen_tolerance = (
            None if eigen_tolerance is None else real(eigen_tolerance)
        )

    def tolerance(self, rtol: float | None) -> float | None:
        if self.substeps is None:
            rtol = 1e-2 if rtol is None else rtol
            if rtol > _LARGEST_RTOL:
                raise ValueError(
                    f"`rtol` must be at most {_LARGEST_RTOL} for `CentralFlow`, got "
                    f"{rtol!r}."
                )
        elif rtol is not None:
            raise ValueError(
                f"`rtol` is {rtol!r}, but the steps of `CentralFlow(substeps=...)` are "
                "fixed: set `substeps` instead, or leave it out for adaptive steps."
            )
        return rtol

    def term(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        metrics: dict[str, Callable],
        coordinates: Int[Array, " C"],
        rtol: Float[Array, ""] | None,
    ) -> CentralTerm:
        margin, eigen_tolerance = jnp.asarray(_MARGIN), self.eigen_tolerance
        if self.substeps is not None:
            margin = _MAX_RISE * self.renew_every / self.substeps
        elif eigen_tolerance is None:
            eigen_tolerance = 0.2 * jnp.sqrt(rtol)
        equation = (
            objective,
            optimizer,
            metrics,
            coordinates,
            self.block_size,
            eigen_tolerance,
            self.renew_every,
            margin,
        )
        if self.substeps is not None:
            return CentralTerm(*equation)
        return StiffCentralTerm(*equation, rtol, self.carry_third_derivatives)

    def solver(self) -> diffrax.AbstractSolver:
        if self.substeps is None:
            return ProjectedRKC(StepInterpolation)
        return Moreau()

    def stepsize(
        self, rtol: Float[Array, ""] | None
    ) -> tuple[diffrax.AbstractStepSizeController, Any]:
        if self.substeps is not None:
            return diffrax.ConstantStepSize(), 1 / self.substeps
        controller = diffrax.PIDController(
            rtol=0,  # the error is a relative one already
            atol=rtol,
            norm=lambda y: y.observables["error"],
            factormax=3,
            # Late in runs of 200,000 steps float32 does not resolve less.
            dtmin=0.02,
        )
        return ForesightController(controller, _RESOLUTION * jnp.sqrt(rtol)), 0.5

    def start(self, term: Any, y: FlowState, previous: Any) -> tuple[FlowState, Any]:
        if previous is not None:
            # The work of each part is counted by itself.
            expansion = dataclasses.replace(previous.expansion, work=Work())
            if self.substeps is None:
                expansion = term.with_room_for_forces(y, expansion)
            previous = dataclasses.replace(
                previous, expansion=expansion, failure=no_failure()
            )
            if self.substeps is not None:
                previous = dataclasses.replace(previous, unconverged=jnp.int32(0))
            else:  # what was reported is not led to where the next step begins
                of_X = y.observables["oscillating"]
                piece = Piece(of_X, jnp.zeros_like(previous.dt))
                previous = dataclasses.replace(previous, piece=piece)
            if expansion.eigenvectors.shape[0] == self.block_size:
                return y, previous
        if self.substeps is None:
            y, state = self.solver().start(term, y, previous)
            if previous is not None:  # X, and so how many are held, is not known yet
                held = previous.expansion.held
                state = eqx.tree_at(lambda s: s.expansion.held, state, held)
            return y, state
        return self.solver().start(term, y, 1 / self.substeps, previous)

    def observe(self, term: Any, t: Any, y: FlowState) -> dict[str, PyTree[Array]]:
        smooth, oscillating = (y.observables[k] for k in ("smooth", "oscillating"))
        series = dict(
            loss=smooth["loss"],
            mean_loss=smooth["loss"] + oscillating["loss"],
            grad_norm_sq=smooth["grad_norm_sq"],
            mean_grad_norm_sq=smooth["grad_norm_sq"] + oscillating["grad_norm_sq"],
            sharpness=smooth["sharpness"],
            oscillation=oscillating["oscillation"],
            metrics=jax.tree.map(jnp.add, smooth["metrics"], oscillating["metrics"]),
            gradient_sq=smooth["gradient_sq"] + oscillating["gradient_sq"],
            step_sizes=smooth["step_sizes"],
            trace_covariance=oscillating["trace_covariance"],
        )
        if self.substeps is None:
            joint = y.observables.get("joint")  # between steps there is none
            joint = dict(joint or no_joint(oscillating, y.weights.dtype))
            rise = dict(joint.pop("rise"))
            rise["mean_loss"] = rise.pop("loss")
            rise["mean_grad_norm_sq"] = rise.pop("grad_norm_sq")
            series["joint"] = joint | dict(rise=rise)
        return series

    def work(
        self, start: Any, solution: diffrax.Solution, reports: Int[Array, ""]
    ) -> Work:
        if self.substeps is None:
            return start.expansion.work + solution.controller_state.total
        state = solution.solver_state
        return state.expansion.work + Work(unconverged=state.unconverged)

    def failure(self, solution: diffrax.Solution) -> Failure:
        own = solution.result == diffrax.RESULTS.nonfinite
        return choose(own, solution.solver_state.failure, super().failure(solution))

    def proposed_step(self, controller_state: Any) -> Float[Array, ""] | None:
        return None if self.substeps is not None else controller_state.proposed

    def event(self) -> diffrax.Event:
        def crowded(t, y, args, *, terms, **kwargs):
            term = getattr(terms, "term", terms)
            if self.block_size >= y.weights.size:
                return jnp.array(False)
            critical = term.count_critical(y.observables["smooth"]["sharpness"])
            return critical + GUARDS > self.block_size

        return diffrax.Event(crowded)

    def check(self, optimizer: AbstractOptimizer, y: FlowState) -> None:
        if self.substeps is None:
            return
        # Euler steps of length h of ds/dt = -s / tau grow where h > 2 tau.
        rates = [jnp.max(-d) for d in jax.tree.leaves(state_decay(optimizer, y))]
        fewest = float(jnp.max(jnp.stack(rates))) / 2 if rates else 0.0
        if optimizer.has_memory:
            # Steps of length h = 1 are those of the method itself, at the limit of
            # stability at the edge. At h = 1/2 the limit is four times as far.
            fewest = max(fewest, 2.0)
        if self.substeps < fewest:
            raise ValueError(
                f"`substeps` is {int(self.substeps)}, but fixed steps of the flow of "
                "this optimizer and its state are unstable with fewer than "
                f"{math.ceil(fewest)} per optimizer step: set more, or leave "
                "`substeps` out for adaptive steps."
            )

    def large_enough(self, solver_state: Any) -> "CentralFlow":
        if not isinstance(solver_state, self.solver().state_type):
            raise ValueError(
                "`solver_state` is that of another flow, or of another kind of steps."
            )
        flow = self
        while flow.block_size < solver_state.expansion.eigenvectors.shape[0]:
            flow = flow.enlarge()
        return flow

    def enlarge(self) -> "CentralFlow":
        return CentralFlow(
            None if self.substeps is None else int(self.substeps),
            renew_every=None if self.substeps is None else int(self.renew_every),
            block_size=2 * self.block_size,
            eigen_tolerance=(
                None if self.eigen_tolerance is None else float(self.eigen_tolerance)
            ),
            carry_third_derivatives=self.carry_third_derivatives,
        )
