"""Differential equations with a complementarity constraint."""

import abc
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..failures import Failure


class AbstractComplementarityTerm(diffrax.AbstractTerm):
    """The differential equation with a semidefinite complementarity constraint

        dy/dt = f(y, Phi(y)[X]),      0 <= X  perpendicular to  C(y) >= 0,

    with the forcing Phi(y)[X] linear in the symmetric matrix X [k, k], f affine in the
    forcing, and C(y) [k, k] symmetric. What f needs to know of y is its `slope`; all
    that is known there, other than X, its `expansion`.
    """

    @abc.abstractmethod
    def slope(self, y: PyTree) -> Any:
        """What f needs to know of y."""

    @abc.abstractmethod
    def rate(
        self, y: PyTree, slope: Any, forcing: PyTree, dt: Float[Array, ""]
    ) -> PyTree:
        """f(y, forcing), for an explicit step of length dt."""

    @property
    @abc.abstractmethod
    def memory(self) -> float | Float[Array, ""]:
        """How long the constraint takes to answer to X."""

    @abc.abstractmethod
    def forcing(
        self, y: PyTree, expansion: Any, X: Float[Array, "k k"]
    ) -> PyTree[Array]:
        """Phi(y)[X]."""

    @abc.abstractmethod
    def expand(self, y: PyTree, previous: Any) -> Any:
        """The expansion at y, warm-started from the one at a point near by."""

    @abc.abstractmethod
    def constraint(self, expansion: Any) -> Float[Array, "k k"]:
        """C(y)."""

    @abc.abstractmethod
    def constraint_rate(
        self, y: PyTree, expansion: Any, rate: PyTree
    ) -> Float[Array, "k k"]:
        """dC/dy applied to `rate`."""

    @abc.abstractmethod
    def drift(self, y: PyTree, expansion: Any, rate: PyTree) -> PyTree:
        """The rate with which y moves in the mean over the `memory`."""

    @abc.abstractmethod
    def active(self, expansion: Any) -> Int[Array, ""]:
        """How many leading rows of C may be tight during the step. X is zero in the
        others."""

    @abc.abstractmethod
    def record(self, y: PyTree, expansion: Any, X: Float[Array, "k k"]) -> PyTree:
        """y with its observables brought up to date."""

    @abc.abstractmethod
    def failure(self, y: PyTree, expansion: Any) -> Failure:
        """Whether y and its expansion still make sense."""

    @abc.abstractmethod
    def without_oscillations(self, y: PyTree) -> PyTree:
        """y with the observables that X = 0 has, where X is not known."""

    def contr(self, t0, t1, **kwargs):
        return t1 - t0

    def prod(self, vf, control):
        return jax.tree.map(lambda x: control * x, vf)


class Step(eqx.Module):
    """A step from y0 to y1, for those who judge it."""

    dt: Float[Array, ""]
    y0: PyTree[Array]
    y1: PyTree[Array]
    rate0: PyTree[Array]
    rate1: PyTree[Array]
    expansion0: Any
    predicted: Any  # the expansion at the predicted end
    expansion1: Any
    linearized: Float[Array, "k k"]  # what the constraint at y1 should be
    defect: PyTree[Array]  # an estimate of y1's error with the forcing as it is
    correction: PyTree[Array]  # what the change of the forcing did to y1
    relief: Float[Array, ""]  # how far X at the end keeps the constraint up
    excess: Float[Array, ""]  # a violation of the constraint that is permitted
    middle: Any  # what is known of the middle of a step of modes that ring
    before: Any  # the expansion one step before its start
    ratio: Float[Array, ""]  # of its length to that of the step before, or zero
    bulge: PyTree[Array]  # how far X's observables are from linear, in the mean


class AbstractStiffComplementarityTerm(AbstractComplementarityTerm):
    """A complementarity term that can also be stepped over many times the time that its
    fastest modes need. The eigenvalues of df/dy are real, or nearly so, unless it
    `rings`."""

    @property
    @abc.abstractmethod
    def rings(self) -> bool:
        """Whether there are modes with complex rates. Then `ring` makes the steps."""

    @abc.abstractmethod
    def ring(
        self, y: PyTree, slope: Any, forcing: PyTree, dt: Float[Array, ""]
    ) -> tuple[PyTree, PyTree, Int[Array, ""], Any]:
        """y after dt, the forcing as it is; the rate there; the number of stages; and
        what is of use to `relative_error` about the middle of the step."""

    @abc.abstractmethod
    def no_stiff_modes(self, y: PyTree) -> Any:
        """What is known of the fastest modes of df/dy at first: nothing."""

    @abc.abstractmethod
    def slowed(
        self, y: PyTree, rate: PyTree, stiff: Any, dt: Float[Array, ""]
    ) -> PyTree:
        """The rate at y with the fastest modes slowed down: still in equilibrium after
        a small part of dt."""

    @abc.abstractmethod
    def relaxed(
        self, y: PyTree, rate: PyTree, t: Float[Array, ""]
    ) -> tuple[PyTree, PyTree]:
        """The part of the change of y after a time t that is known in closed form, and
        its rate; from the rate of y at the start."""

    @abc.abstractmethod
    def admissible(self, y: PyTree) -> PyTree:
        """y, extrapolated, or the nearest there can be."""

    @abc.abstractmethod
    def reach(
        self,
        y: PyTree,
        rate: PyTree,
        expansion: Any,
        stiff: Any,
        dt: Float[Array, ""],
    ) -> Float[Array, ""]:
        """A bound on -dt times the eigenvalues of df/dy, slowed, in a step from y."""

    @abc.abstractmethod
    def expand_ahead(
        self,
        y: PyTree,
        previous: Any,
        before: Any,
        ratio: Float[Array, ""],
        relief: Float[Array, ""],
    ) -> Any:
        """The expansion at the predicted end y of a step, without its slope, from those
        at the start of the step and one step `before`; `ratio` is the step's length
        over that of the one before, and `relief` how far X keeps the constraint up in
        the step. With `previous` None, the first expansion."""

    @abc.abstractmethod
    def remembered(self, expansion: Any) -> Any:
        """What `expand_ahead`, `crossing` and `approach` need of that one step
        before."""

    @abc.abstractmethod
    def exact_along(
        self, y: PyTree, expansion: Any, X: Float[Array, "k k"]
    ) -> tuple[Any, Bool[Array, ""]]:
        """Phi may be that of an earlier step. The expansion with a Phi that is exact
        for this X; and whether it had not been."""

    @abc.abstractmethod
    def responder(
        self, y: PyTree, expansion: Any, dt: Float[Array, ""]
    ) -> tuple[Callable[[PyTree, PyTree], PyTree], Any, Any]:
        """A linear function: what a change of the forcing in a step does to its end, y,
        if it is constant, and if it rises by so much and is zero at the middle. (Unless
        modes ring, its `of_the_last(share)` is for a change in the last share of the
        step, and `with_caution` as much or more, where it is estimated.) What that
        shows of the fastest modes. The expansion, with the work counted."""

    @abc.abstractmethod
    def complete(
        self,
        y: PyTree,
        expansion: Any,
        X: Float[Array, "k k"],
        stages: Int[Array, ""],
        converged: Bool[Array, ""],
    ) -> tuple[Any, Any]:
        """The expansion at the corrected end y of a step, from that at the predicted
        one: its `slope`, and C on the rows that may be tight. And the same with these
        rows as they are at y, for Phi. X, the number of stages and whether the
        complementarity problem converged are for the record."""

    @abc.abstractmethod
    def begins(self, before: Any) -> Bool[Array, ""]:
        """Whether no row was tight at the start of a step."""

    @abc.abstractmethod
    def settled(
        self, before: Any, after: Any, onset: Float[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether as many rows were tight at the start of a step, or from the onset on,
        as at its end."""

    @abc.abstractmethod
    def crossing(
        self, before: Any, start: Any, predicted: Any, ratio: Float[Array, ""]
    ) -> Float[Array, ""]:
        """When in a step, from 0 to 1, the constraint of one row more would be
        violated; zero if it is not. From the expansions one step `before`, at the start
        and at the predicted end; `ratio` as above."""

    @abc.abstractmethod
    def expected(
        self, before: Any, start: Any, predicted: Any, ratio: Float[Array, ""]
    ) -> Bool[Array, ""]:
        """Whether a row that comes to be violated goes on as it did in the step before.
        (It may have been overlooked, or there was a jump.)"""

    @abc.abstractmethod
    def onset(
        self,
        crossing: Float[Array, ""],
        start: Any,
        after: Any,
        earlier: PyTree[Array],
        mean: PyTree[Array],
    ) -> Float[Array, ""]:
        """That, if a row does become tight then; or zero. From the expansions at the
        start and `after` the step; and X's observables at the start and in the mean."""

    @abc.abstractmethod
    def mean_multiplier(
        self,
        y: PyTree,
        before: Any,
        expansion: Any,
        X: Float[Array, "k k"],
        mean: Float[Array, "k k"],
        rho: Float[Array, ""],
        forcing: PyTree,
        mean_forcing: PyTree,
    ) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
        """The mean over a step of an X that is linear: what ends with X and had the
        `mean` in the step before, which was as long as dt (1/rho - 1). And the number
        it is to be multiplied by, for Phi changes in the step. From the expansions at
        the start and at the end y of the step, the forcing there and in the mean."""

    @abc.abstractmethod
    def in_rows_of(
        self, y: PyTree, before: Any, expansion: Any, C: Float[Array, "k k"]
    ) -> Float[Array, "k k"]:
        """A matrix on the rows of the expansion `before`, on those of that at y."""

    @abc.abstractmethod
    def staying(
        self,
        before: Any,
        after: Any,
        X: Float[Array, "k k"],
        mean: Float[Array, "k k"],
    ) -> Float[Array, ""]:
        """Where some rows have ceased to be tight in a step: of the others, the `mean`
        over the step in units of X at its end. Zero where none has, or all have."""

    @abc.abstractmethod
    def damped(
        self, y: PyTree, expansion: Any, defect: PyTree, dt: Float[Array, ""]
    ) -> tuple[PyTree, Any]:
        """The defect of a step that ends at y, without what its fast modes undo within
        the step; and the expansion, with the work for that counted."""

    @abc.abstractmethod
    def distance(self, y0: PyTree, y1: PyTree) -> Float[Array, ""]:
        """The length of a step."""

    @abc.abstractmethod
    def relative_error(self, step: Step) -> tuple[Float[Array, ""], Any]:
        """The error of a step, relative to what it should be relative to; and the
        expansion at its end, with the work for that counted."""

    @abc.abstractmethod
    def approach(self, step: Step) -> Float[Array, "2 k"]:
        """How far each row is from being tight, and the speed at which it came nearer
        in the prediction, both in the square roots of an error."""
