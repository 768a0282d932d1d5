"""Second-order Runge–Kutta–Chebyshev steps: explicit, for long steps of stiff decay."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

# The stability polynomial of s stages is

#     R(z) = a + b T(w0 + w1 z),    w0 = 1 + eps / s^2,    R = 1 + z + z^2/2 + O(z^3),

# with T the Chebyshev polynomial of degree s. Textbooks damp it by eps = 2/13: stable
# on the interval of length 0.65 s^2, with |R| up to 0.95 there. Here the modes to be
# damped are those that a change of the oscillations excites, and they must be gone
# after a few steps; with eps = 3 R is 0.38 plus ripples of 0.11, and the interval
# 0.49 s^2. That is 1.15 times the stages. (With eps = 10 it is 0.22, and 1.4.)
DAMPING = 3.0

_STAGES = np.unique(np.round(2 * 1.12 ** np.arange(50)).astype(int))


class Polynomial(eqx.Module):
    """The number of stages, w0 and w1, and the coefficients of the recurrence."""

    stages: Int[Array, ""]
    w0: Float[Array, ""]
    w1: Float[Array, ""]
    recurrence: Float[Array, "4 s"]


def polynomial(length: Float[Array, ""]) -> tuple[Polynomial, Float[Array, ""]]:
    """The cheapest polynomial that is stable on [-length, 0], and the length of the
    longest interval on which there is one."""
    tables, intervals = _tables()
    intervals = jnp.asarray(intervals, length.dtype)
    row = jnp.argmax(intervals >= length)  # the first one that suffices

    def pick(table):
        integer = table.dtype.kind == "i"
        return jnp.asarray(table, jnp.int32 if integer else length.dtype)[row]

    picked = Polynomial(**{name: pick(table) for name, table in tables.items()})
    return picked, intervals[-1]


def rkc2(
    rate: Callable[[PyTree], PyTree],
    y0: PyTree,
    rate0: PyTree,
    dt: Float[Array, ""],
    polynomial: Polynomial,
) -> PyTree:
    """One step of y' = rate(y): the change y1 - y0. `rate0` is rate(y0).

    ??? cite "Reference"

        B. P. Sommeijer, L. F. Shampine, J. G. Verwer, *RKC: an explicit solver for
        parabolic PDEs*, Journal of Computational and Applied Mathematics 88 (1997).
    """
    mu, nu, mu_t, gamma_t = polynomial.recurrence
    tree_map = jax.tree.map

    # The recurrence is for y_j - y0: for y_j itself its rounding errors would be
    # relative to y and grow with s^2.
    def stage(j, carry):
        d, before = carry
        r = rate(tree_map(lambda y, d: y + d, y0, d))
        new = tree_map(
            lambda d, b, r, r0: (
                mu[j] * d + nu[j] * b + dt * (mu_t[j] * r + gamma_t[j] * r0)
            ),
            d,
            before,
            r,
            rate0,
        )
        return new, d

    start = tree_map(lambda r: mu_t[1] * dt * r, rate0)
    zero = tree_map(jnp.zeros_like, y0)
    change, _ = jax.lax.fori_loop(2, polynomial.stages + 1, stage, (start, zero))
    return change


@functools.cache
def _tables() -> tuple[dict[str, np.ndarray], np.ndarray]:
    rows = [_coefficients(int(s), int(_STAGES[-1])) for s in _STAGES]
    tables = {name: np.stack([row[0][name] for row in rows]) for name in rows[0][0]}
    return tables, np.array([row[1] for row in rows])


def _coefficients(s: int, longest: int) -> tuple[dict[str, Any], float]:
    w0 = 1 + DAMPING / s**2
    T, dT, ddT = np.zeros((3, s + 1))  # T_j and its derivatives at w0
    T[:2], dT[1] = (1, w0), 1
    for j in range(2, s + 1):
        T[j] = 2 * w0 * T[j - 1] - T[j - 2]
        dT[j] = 2 * T[j - 1] + 2 * w0 * dT[j - 1] - dT[j - 2]
        ddT[j] = 4 * dT[j - 1] + 2 * w0 * ddT[j - 1] - ddT[j - 2]
    w1 = dT[s] / ddT[s]
    b = np.zeros(s + 1)
    b[2:] = ddT[2:] / dT[2:] ** 2
    b[:2] = b[2]
    a = 1 - b * T
    j = np.arange(2, s + 1)
    recurrence = np.zeros((4, longest + 1))
    recurrence[2, 1] = b[1] * w1
    recurrence[:3, 2 : s + 1] = np.stack([2 * w0 * b[j], 0 * b[j], 2 * w1 * b[j]])
    recurrence[:3, 2 : s + 1] /= b[j - 1]
    recurrence[1, 2 : s + 1] = -b[j] / b[j - 2]
    recurrence[3, 2 : s + 1] = -a[j - 1] * recurrence[2, 2 : s + 1]
    interval = (1 + w0) / w1  # where w0 + w1 z = -1
    values = dict(stages=s, w0=w0, w1=w1, recurrence=recurrence)
    return values, interval
