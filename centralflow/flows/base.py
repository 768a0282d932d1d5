"""What every flow has: a state, a term, a way to be integrated, and observables."""

import abc
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from ..failures import Failure, when
from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from ..results import RESULTS


class FlowState(eqx.Module):
    """The state y of a flow: weights `[n]`, optimizer state, the observables at y if
    they are by-products of a step, and the oscillation if the flow integrates it."""

    weights: Float[Array, " n"]
    optimizer_state: PyTree[Array]
    observables: dict[str, Any]
    oscillation: Any = None


class FlowSolverState(eqx.Module):
    """All that is needed to go on with an integration: the state of the flow, that of
    its solver, and the next step of an adaptive one."""

    y: FlowState
    solver: Any
    dt: Float[Array, ""] | None = None


class Work(eqx.Module):
    """How often the derivatives were evaluated on the full data set, how often an inner
    solver did not converge, and the largest residual norm of an eigenpair over the
    largest eigenvalue."""

    # Floating-point, as all of y; exact up to 2^24.
    gradients: Float[Array, ""]
    hvps: Float[Array, ""]
    third_derivatives: Float[Array, ""]
    unconverged: Float[Array, ""]
    eigen_residual: Float[Array, ""]

    def __init__(
        self,
        gradients=0,
        hvps=0,
        third_derivatives=0,
        unconverged=0,
        eigen_residual=0,
    ):
        as_float = lambda x: jnp.asarray(x, jnp.result_type(float))
        self.gradients = as_float(gradients)
        self.hvps = as_float(hvps)
        self.third_derivatives = as_float(third_derivatives)
        self.unconverged = as_float(unconverged)
        self.eigen_residual = as_float(eigen_residual)

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.gradients + other.gradients,
            self.hvps + other.hvps,
            self.third_derivatives + other.third_derivatives,
            self.unconverged + other.unconverged,
            jnp.maximum(self.eigen_residual, other.eigen_residual),
        )


class AbstractFlow(eqx.Module):
    """A continuous-time model of an optimizer. To add one, subclass this."""

    @abc.abstractmethod
    def term(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        metrics: dict[str, Callable],
        coordinates: Int[Array, " C"],
        rtol: Float[Array, ""] | None,
    ) -> diffrax.AbstractTerm:
        """The differential equation, for [`centralflow.flows.FlowState`][]s, which
        knows the user's metrics and coordinates to observe, and the tolerance, to which
        an expansion may be computed."""

    @abc.abstractmethod
    def tolerance(self, rtol: float | None) -> float | None:
        """The relative tolerance that the argument `rtol` of [`centralflow.predict`][]
        means. Raises `ValueError` if it means none."""

    @abc.abstractmethod
    def solver(self) -> diffrax.AbstractSolver:
        """How it is stepped."""

    @abc.abstractmethod
    def stepsize(
        self, rtol: Float[Array, ""] | None
    ) -> tuple[diffrax.AbstractStepSizeController, Any]:
        """The step-size controller, and the first step in optimizer steps."""

    def first(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        weights: Float[Array, " n"],
        optimizer_state: PyTree[Array],
    ) -> FlowState:
        """The state at the start, from the weights there and the optimizer state
        *before* their gradient enters it. It has entered if there is a `delay`."""
        if self.delay:
            gradient = objective.grad(weights)
            optimizer_state = optimizer.update_state(optimizer_state, gradient)
        return FlowState(weights, optimizer_state, {})

    @property
    def delay(self) -> int:
        """How many steps after the flow the optimizer has the same state, before it
        takes in its gradient: one if the flow has taken it in."""
        return 1

    @abc.abstractmethod
    def start(self, term: Any, y: FlowState, previous: Any) -> tuple[FlowState, Any]:
        """The complete state y and the solver's state (or None for that of its `init`)
        from which to integrate; `previous` is the solver state at the end of an
        earlier part of the same run, or None."""

    @abc.abstractmethod
    def observe(self, term: Any, t: Any, y: FlowState) -> dict[str, PyTree[Array]]:
        """The series of a [`centralflow.Trajectory`][] at one time."""

    @abc.abstractmethod
    def work(
        self, start: Any, solution: diffrax.Solution, reports: Int[Array, ""]
    ) -> Work:
        """The work of an integration from the solver state `start` and of finding that
        state, rejected steps and `reports` reported times included. Of `start` only the
        scalars are there."""

    def failure(self, solution: diffrax.Solution) -> Failure:
        """What a solver saw that could not go on."""
        result = RESULTS.promote(solution.result)
        result = RESULTS.where(result == RESULTS.nonfinite, RESULTS.diverged, result)
        return when(solution.result != diffrax.RESULTS.successful, result)

    def proposed_step(self, controller_state: Any) -> Float[Array, ""] | None:
        """The length of the step that would have followed, or None for the first of
        `stepsize`."""
        return None

    def check(self, optimizer: AbstractOptimizer, y: FlowState) -> None:
        """Raise `ValueError` if the steps are too long for the optimizer."""

    def large_enough(self, solver_state: Any) -> "AbstractFlow":
        """The flow, enlarged as it was when it had this solver state."""
        return self

    def event(self) -> diffrax.Event | None:
        """Stops the integration where the flow must be enlarged."""
        return None

    def enlarge(self) -> "AbstractFlow":
        """The flow with which to go on after the event."""
        return self
