"""What every flow has: a state, a term, a way to be integrated, and observables."""

import abc
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
from jaxtyping import Array, Float, Int, PyTree

from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer


class FlowState(eqx.Module):
    """The state y of a flow: weights `[n]`, optimizer state, and the observables at y
    if they are by-products of a step."""

    weights: Float[Array, " n"]
    optimizer_state: PyTree[Array]
    observables: dict[str, PyTree[Array]]


class Work(eqx.Module):
    """How often the derivatives were evaluated on the full data set, how often an inner
    solver did not converge, and the largest residual norm of an eigenpair over the
    largest eigenvalue."""

    gradients: Int[Array, ""] | int = 0
    hvps: Int[Array, ""] | int = 0
    third_derivatives: Int[Array, ""] | int = 0
    unconverged: Int[Array, ""] | int = 0
    eigen_residual: Float[Array, ""] | float = 0.0


class AbstractFlow(eqx.Module):
    """A continuous-time model of an optimizer. To add one, subclass this."""

    @abc.abstractmethod
    def term(
        self,
        objective: FlatObjective,
        optimizer: AbstractOptimizer,
        metrics: dict[str, Callable],
    ) -> diffrax.AbstractTerm:
        """The differential equation, for [`centralflow.flows.FlowState`][]s."""

    @abc.abstractmethod
    def solver(self) -> diffrax.AbstractSolver:
        """How it is stepped."""

    @abc.abstractmethod
    def stepsize(
        self, rtol: float | None
    ) -> tuple[diffrax.AbstractStepSizeController, Any]:
        """The step-size controller, and the first step in optimizer steps."""

    @abc.abstractmethod
    def start(self, term: Any, y: FlowState, previous: Any) -> tuple[FlowState, Any]:
        """The complete state y and the solver's state (or None) from which to
        integrate; `previous` is the solver state at the end of an earlier part of the
        same run, or None."""

    @abc.abstractmethod
    def observe(self, term: Any, t: Any, y: FlowState) -> dict[str, PyTree[Array]]:
        """The series of a [`centralflow.Trajectory`][] at one time."""

    @abc.abstractmethod
    def work(self, solver_state: Any, steps: Any, reports: int) -> Work:
        """The work of a whole integration, from the solver's last state and the
        number of steps (rejected ones too) and reported times."""

    def event(self) -> diffrax.Event | None:
        """Stops the integration where the flow must be enlarged."""
        return None

    def enlarge(self) -> "AbstractFlow":
        """The flow with which to go on after the event."""
        return self
