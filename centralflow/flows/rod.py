"""Rod flow: the midpoint of consecutive iterates, and half their difference."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..objective import FlatObjective
from ..optimizers import AbstractOptimizer
from .base import FlowState, Work
from .ends import AbstractEndsFlow, Ends, Rod


class RodFlow(AbstractEndsFlow):
    """Rod flow: the centre z of the iterates and the half distance a between two of
    them, along which they jump to and fro. With one step of the optimizer z -> z + V(z)
    in the space of weights and state, V+ and V- at the ends z + a and z - a, DV+ and
    DV- the derivatives there, and F = (V+ + V-) / 2,

        dz/dt     = F - (1/4) (DV+ + DV-) F,
        dSigma/dt = (V+ V+' + V- V-') / 4 - 2 Sigma,      Sigma = a a':

    for gradient descent, V = -eta g and DV = -eta H. For any optimizer of this package,
    momentum included. Integrated by Diffrax's `Tsit5` with an adaptive step size.

    The centre decays at rates of up to 4 per optimizer step and a at up to 1, so steps
    are of the order of one, each of 24 gradients and 12 products with H: far dearer
    than the optimizer itself. It needs no third derivatives.

    Sigma, of the size of the weights squared, is kept as one vector a: all directions
    that oscillate do so in step. Only what alternates is kept, not the drift F F' / 4
    from one iterate to the next. It starts from what alternates in the first two steps
    of the optimizer, and does not fall below rounding errors, as in edge flow.

    ??? cite "Reference"

        E. Regis, S. Chewi, arXiv 2602.01480; arXiv 2605.06821 for the general map.
    """

    # Where the equations come from. With consecutive iterates at the ends, z_k - a_k
    # and z_k + a_k, exactly
    #
    #     z_{k+1} - z_k = (V+ + V-) / 2 = F,      a_{k+1} = V+ / 2,      a_k = V- / 2,
    #
    # so that the map of z is F, and of the sign-free a a' it is (V+ V+' + V- V-') / 4 -
    # a a'. A flow whose unit steps are z + F has the velocity F - (1/2) DF F to second
    # order, DF = (DV+ + DV-) / 2. That is dz/dt.
    #
    # What is kept of Sigma. Write V+- = F -+ q: the right-hand side is (1/2) (F F' +
    # q q') - 2 Sigma, its memory half a step, and Sigma is nearly F F' / 4 + q q' / 4.
    # Of these two the first is the drift from one iterate to the next. It does not
    # alternate, but it is the larger one until the oscillation has grown, and then the
    # top eigenvector of Sigma is F, the ends are at z +- F / 2, and nothing drives what
    # is transverse: with that vector for a, even the full n x n equation passes the
    # edge and never oscillates (on the parabola of the tests y = 8.9 at step 1,300, and
    # rising). Nor does a projection of F F' on the tangent space of rank-one matrices
    # drive it. With a column for each eigenvector of Sigma, the drift starts the
    # oscillation too early (7.22; the optimizer, 7.58). So a is what alternates, and
    # F F' is left out: the oscillation starts from rounding errors, as the optimizer's
    # does. This also keeps counters and averages in the state at t, and not t +- 1/2.
    #
    # The rest is linear, dSigma/dt = K Sigma K' / 2 - 2 Sigma with q = K a, and K = -DV
    # if V is linear. With the eigenvalues s_i of K, Sigma_ij changes at the rate
    # s_i s_j / 2 - 2. We take
    #
    #     da/dt = K K a / 4 - a,
    #
    # so that a_i a_j has the rate (s_i^2 + s_j^2) / 4 - 2: right for each i = j, and
    # where both i and j oscillate, as s_i = s_j there. The projection of the right-hand
    # side on the tangent space of rank-one matrices instead, da/dt = (m / 2) q - (m^2 /
    # 4 + 1) a with m = a'q / a'a, needs no second product with K. It agrees with this
    # where a is along an eigenvector. But where a is across the stiff directions, as at
    # a start, m is near zero, and the mode that is about to oscillate decays with the
    # others. And of a rotating mode of a method with momentum, m depends on the units
    # of the state.
    #
    # K q is taken over a distance as long as a, so that K is the same, and of one
    # direction that oscillates da/dt = q^2 / (4 a) - a is that of rod flow exactly.

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

    def work(
        self, start: Any, solution: diffrax.Solution, reports: Int[Array, ""]
    ) -> Work:
        # Tsit5 has seven stages, the first of which is the last of the step before. To
        # start takes two gradients, and a report three; one more is of the start. (If
        # the very first step is rejected, its first stage is evaluated once more.)
        fields = 6 * solution.stats["num_steps"] + 1
        return Work(gradients=4 * fields + 2 + 3 * (reports + 1), hvps=2 * fields)


class _RodField(eqx.Module):
    ends: Ends

    def __call__(self, t, y: FlowState, args) -> FlowState:
        rod, v, n = Rod(self.ends, y), y.oscillation.direction, y.weights.size
        up, down, push = rod.linearized(v)
        F, q = (up + down) / 2, rod.across(up, down)
        # A parameter whose gradient is always zero may have a second moment of zero,
        # where the root has no derivative.
        bend = jnp.where(F == 0, 0, push(F))
        norm = lambda x: jnp.linalg.norm(x[:n])
        scale = jnp.clip(norm(v) / norm(q), 0.1, 10)
        Kq = rod.across(*rod.steps(scale * q)) / scale
        return rod.rates(y, F - bend / 2, Kq / 4 - v)
