"""Edge flow: a centre and the oscillation around it."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
from jaxtyping import Array, Float, Int

from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer, GradientDescent
from .base import FlowState, Work
from .ends import AbstractEndsFlow, Ends, Rod


class EdgeFlow(AbstractEndsFlow):
    """Edge flow: a centre c and the oscillation a around it. With the gradients g+ and
    g- at the ends c + a and c - a,

        dc/dt = -(eta/2) (g+ + g-),      da/dt = (eta/2) (g+ - g-) - 2 a.

    For gradient descent only. Integrated by Diffrax's `Tsit5` with an adaptive step
    size: a decays at rates of up to 2 per optimizer step, so steps are of the order of
    one, of six pairs of gradients each. Unit Euler steps would be cheaper and look
    perfect, but prove nothing: they are gradient descent itself, from the two points
    c + a and c - a, whose names change in each step.

    a = 0 is a solution. The oscillation starts from what alternates in the first two
    steps of the optimizer, and from rounding errors: the optimizer makes them in each
    step, and when it has been stable for long they are what its next oscillation grows
    from. So the flow does not let a fall below those of the dtype of the weights.

    ??? cite "Reference"

        P. Marion, arXiv 2606.18080.
    """

    # With w_k = c_k + (-1)^k a_k, gradient descent from both ends is, exactly,
    #
    #     c_{k+1} - c_k = -(eta/2) (g+ + g-),      a_{k+1} = -a_k + (eta/2) (g+ - g-),
    #
    # the sign being that of (-1)^k. Where a mode with s = eta lambda alternates,
    # a_{k+1} = (s - 1) a_k, and the rate s - 2 is its log to first order at the edge.

    def term(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        metrics: dict[str, Callable],
        coordinates: Int[Array, " C"],
        rtol: Float[Array, ""] | None,
    ) -> diffrax.ODETerm:
        if not isinstance(optimizer, GradientDescent):
            raise ValueError(
                "`flow` is `EdgeFlow()`, a model of gradient descent only, but "
                f"`optimizer` is {type(optimizer).__name__}: use `RodFlow()` or "
                "`CentralFlow()`."
            )
        return diffrax.ODETerm(
            _EdgeField(Ends(objective, optimizer, metrics, coordinates))
        )

    def work(
        self, start: Any, solution: diffrax.Solution, reports: Int[Array, ""]
    ) -> Work:
        # As of rod flow.
        fields = 6 * solution.stats["num_steps"] + 1
        return Work(gradients=2 * fields + 2 + 3 * (reports + 1))


class _EdgeField(eqx.Module):
    ends: Ends

    def __call__(self, t, y: FlowState, args) -> FlowState:
        rod, v = Rod(self.ends, y), y.oscillation.direction
        up, down = rod.steps(v)
        return rod.rates(y, (up + down) / 2, rod.across(up, down) - 2 * v)
