"""How far the response to a change of the forcing is trusted."""

import jax.numpy as jnp
from jaxtyping import Array, Float

# Corrections alternate if the cosine of the angle between them is below this. Then
# there is so much more caution; else a share is left after each step.
_ALTERNATE, _MORE, _LEFT = -0.8, 0.25, 0.9


def next_caution(
    last: Float[Array, "k k"], now: Float[Array, "k k"], caution: Float[Array, ""]
) -> Float[Array, ""]:
    """The caution, from 0 to 1, for the next step, from what the corrections of the
    last step and of this one do to the constraint.

    A correction is made with an estimate of the response. If the true one is r times
    that, the multiplier overshoots by r - 1 of its change; the constraint holds at the
    end of the step, but the state is not where it is thought to be, and at the end of
    the next step that is missing. For r > 2 each correction is larger than the last,
    and against it, however smooth the solution is. Shorter steps help only so far as
    estimates are better there: a flow in which four eigenvalues stayed at the edge for
    20,000 steps was integrated in steps of 30, now of 1,000 and more. With full caution
    the estimate is the most that can be.
    """
    along = jnp.sum(last * now)
    alternate = along < _ALTERNATE * jnp.linalg.norm(last) * jnp.linalg.norm(now)
    more = jnp.minimum(caution + _MORE, 1)
    return jnp.where(alternate, more, _LEFT * caution)
