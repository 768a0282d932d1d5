"""The stable flow: the optimizer without its oscillations."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from .base import AbstractFlow, FlowState, Work


class StableFlow(AbstractFlow):
    """The flow that an optimizer would follow if it did not oscillate,

        dw/dt = velocity(w, s, g(w)),      ds/dt = state_rate(s, g, g * g):

    for gradient descent, gradient flow dw/dt = -eta g. Integrated by Diffrax's `Tsit5`
    with an adaptive step size.
    """

    def term(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        metrics: dict[str, Callable],
        coordinates: Int[Array, " C"],
        rtol: Float[Array, ""] | None,
    ) -> diffrax.ODETerm:
        field = _StableField(objective, optimizer, metrics, coordinates)
        return diffrax.ODETerm(field)

    def tolerance(self, rtol: float | None) -> float:
        return 1e-3 if rtol is None else rtol

    def solver(self) -> diffrax.AbstractSolver:
        return diffrax.Tsit5()

    def stepsize(
        self, rtol: Float[Array, ""] | None
    ) -> tuple[diffrax.AbstractStepSizeController, Any]:
        return _SecondMomentsByThemselves(adaptive(rtol, 1e-3 * rtol)), 0.5

    def start(self, term: Any, y: FlowState, previous: Any) -> tuple[FlowState, Any]:
        if y.oscillation is not None:
            raise ValueError("`solver_state` is that of another flow.")
        return y, None

    def large_enough(self, solver_state: Any) -> "StableFlow":
        if not (solver_state is None or isinstance(solver_state, tuple)):
            raise ValueError("`solver_state` is that of another flow.")
        return self

    def observe(self, term: Any, t: Any, y: FlowState) -> dict[str, PyTree[Array]]:
        field = term.vector_field
        loss, gradient = field.objective.value_and_grad(y.weights)
        P = field.optimizer.preconditioner(y.optimizer_state)
        return dict(
            loss=loss,
            mean_loss=loss,
            grad_norm_sq=gradient @ gradient,
            mean_grad_norm_sq=gradient @ gradient,
            gradient_sq=gradient[field.coordinates] ** 2,
            step_sizes=jnp.broadcast_to(1 / P, gradient.shape)[field.coordinates],
            trace_covariance=jnp.zeros_like(loss),
            metrics=field.objective.evaluate(field.metrics, y.weights),
        )

    def work(
        self, start: Any, solution: diffrax.Solution, reports: Int[Array, ""]
    ) -> Work:
        # Tsit5 has seven stages, the first of which is the last of the step before. One
        # more report is of the start.
        return Work(gradients=6 * solution.stats["num_steps"] + 2 + reports)


class _SecondMomentsByThemselves(diffrax.AbstractStepSizeController):
    """Wraps a step-size controller, so that its absolute tolerance is nothing to arrays
    without a negative number. They are second moments, of 1e-6 and less, and count as
    the weights do. A momentum crosses zero, where its relative error is rounding."""

    controller: diffrax.AbstractStepSizeController

    def wrap(self, direction):
        return _SecondMomentsByThemselves(self.controller.wrap(direction))

    def init(self, *args):
        return self.controller.init(*args)

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, *rest):
        scale = lambda x: jnp.where(jnp.all(x >= 0), jnp.asarray(1e-17, x.dtype), 1)
        scales = jax.tree.map(scale, y0)
        y0, y1, y_error = (
            jax.tree.map(jnp.divide, y, scales) for y in (y0, y1_candidate, y_error)
        )
        return self.controller.adapt_step_size(t0, t1, y0, y1, args, y_error, *rest)


def adaptive(
    rtol: Float[Array, ""], atol: Float[Array, ""]
) -> diffrax.AbstractStepSizeController:
    """The error of a step is the largest of those of weights and state, each as a root
    mean square: the one second moment of Scalar RMSProp counts as all weights do."""

    def norm(error):
        leaves = jax.tree.leaves(error)
        squares = jnp.stack([jnp.mean(x**2) for x in leaves])
        largest = jnp.sqrt(jnp.max(squares))
        return jnp.where(jnp.isnan(largest), jnp.inf, largest)  # the step is too long

    return diffrax.PIDController(rtol, atol, norm=norm, dtmin=1e-5, force_dtmin=False)


class _StableField(eqx.Module):
    objective: FlatObjective
    optimizer: AbstractOptimizer
    metrics: dict[str, Callable]
    coordinates: Int[Array, " C"]

    def __call__(self, t, y: FlowState, args) -> FlowState:
        # Without a loss there is nothing to report: the step is too long.
        loss, g = self.objective.value_and_grad(y.weights)
        g = jnp.where(jnp.isfinite(loss), g, jnp.nan)
        return FlowState(
            self.optimizer.velocity(y.weights, y.optimizer_state, g),
            self.optimizer.state_rate(y.optimizer_state, g, g * g),
            {},
        )
