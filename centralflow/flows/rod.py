"""Rod flow: the midpoint of consecutive iterates, and half their difference."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from .base import AbstractFlow, FlowState, Work
from .ends import Ends, at_ends, check_oscillation, rates
from .stable import StableFlow


class RodFlow(AbstractFlow):
    stable: StableFlow = StableFlow()

    @property
    def delay(self) -> int:
        return 0

    def first(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        weights: Float[Array, " n"],
        optimizer_state: PyTree[Array],
    ) -> FlowState:
        return FlowState(weights, optimizer_state, {})

    def term(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        metrics: dict[str, Callable],
        coordinates: Int[Array, " C"],
        rtol: Float[Array, ""] | None,
    ) -> diffrax.ODETerm:
        ends = Ends(objective, optimizer, metrics, coordinates)
        return diffrax.ODETerm(_RodField(ends))

    def tolerance(self, rtol: float | None) -> float:
        return self.stable.tolerance(rtol)

    def solver(self) -> diffrax.AbstractSolver:
        return self.stable.solver()

    def stepsize(
        self, rtol: Float[Array, ""] | None
    ) -> tuple[diffrax.AbstractStepSizeController, Any]:
        return self.stable.stepsize(rtol)

    def start(self, term: Any, y: FlowState, previous: Any) -> tuple[FlowState, Any]:
        check_oscillation(y, previous)
        return (term.vector_field.ends.start(y) if previous is None else y), None

    def observe(self, term: Any, t: Any, y: FlowState) -> dict[str, PyTree[Array]]:
        return term.vector_field.ends.observe(y)

    def work(self, start: Any, solution: diffrax.Solution, reports: int) -> Work:
        fields = 6 * solution.stats["num_steps"] + 1
        return Work(gradients=2 * fields + 2 + 3 * (reports + 1), hvps=2 * fields)


class _RodField(eqx.Module):
    ends: Ends

    def __call__(self, t, y: FlowState, args) -> FlowState:
        e, v = at_ends(self.ends, y, bend=True), y.oscillation.direction
        turn = (2 + jnp.clip(e.m, 0, 2)) / 4
        return rates(y, e.F - e.bend / 2, turn * (e.q - e.m * v), e.m**2 / 4 - 1 + e.noise)
