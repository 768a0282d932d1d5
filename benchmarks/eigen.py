"""Products per step of warm-started tracking, against LOBPCG, on a drifting matrix."""

import platform
import time

import jax
import jax.numpy as jnp
from jax.experimental.sparse.linalg import lobpcg_standard

from centralflow.eigen import scouted, top_eigenpairs

N, STEPS, COUNT, WANTED, K = 400, 30, 4, 3, 8
OUTLIERS = jnp.array([2.0, 1.9, 1.5, 1.2, 0.8])
BULK = 0.5 * jnp.exp(-jnp.arange(N - 5) / 30) - 0.02 * jnp.linspace(0, 1, N - 5)


def turn(vectors, angle):
    """exp(angle (Z - Zᵀ)) for a fixed Gaussian Z with entries of variance 1 / N."""
    Z = jax.random.normal(jax.random.key(0), (N, N)) / jnp.sqrt(N)
    term = vectors
    for i in range(1, 5):
        term = angle * (Z - Z.T) @ term / i
        vectors = vectors + term
    return vectors


def matrix_at(E, t):
    # The third and fourth eigenvalue cross each other and the second.
    swing = jnp.array([0.1, 0.0, 0.3, 0.4, 0.0]) * jnp.sin(jnp.arange(5) * 0.04 * t)
    return (E * jnp.concatenate([OUTLIERS + swing, BULK])) @ E.T


def rows_of(matrix):
    def operator(V, count):
        def apply(i, images):
            return images.at[i].set(jnp.matmul(matrix, V[i], precision="highest"))

        return jax.lax.fori_loop(0, count, apply, jnp.zeros_like(V))

    return operator


@jax.jit
def ours(angle, tolerance, key):
    def step(carry, t):
        E, vectors = carry
        pairs = top_eigenpairs(
            rows_of(matrix_at(E, t)),
            vectors,
            COUNT,
            WANTED,
            tolerance=tolerance / 2,  # relative to the largest eigenvalue, 2
            max_sweeps=50,
            key=None if key is None else jax.random.fold_in(key, t.astype(int)),
        )
        next_start = pairs.vectors if key is None else scouted(pairs, COUNT)
        return (turn(E, angle), next_start), pairs.products

    E = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (N, N)))[0]
    start = jax.random.normal(jax.random.key(2), (K, N))
    return jax.lax.scan(step, (E, start), jnp.arange(float(STEPS)))[1]


@jax.jit
def lobpcg(angle, tolerance):
    """It stops at residuals of 10 n tol (λ + |A v|), so 40 n tol for the largest."""

    def step(carry, t):
        E, X = carry
        A = matrix_at(E, t)
        _, X, iterations = lobpcg_standard(A, X, m=50, tol=tolerance / (40 * N))
        # One for the start and, applied to the whole basis, three per iteration, and
        # one for the residuals.
        return (turn(E, angle), X), WANTED * (1 + 4 * iterations)

    E = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (N, N)))[0]
    start = jax.random.normal(jax.random.key(2), (N, WANTED))
    return jax.lax.scan(step, (E, start), jnp.arange(float(STEPS)))[1]


def overhead(n=9000, sweeps=1):
    """Microseconds per call with an operator that costs next to nothing."""
    diagonal = jnp.linspace(0, 1, n)

    @jax.jit
    def call(start):
        def operator(V, count):
            return jnp.where(jnp.arange(V.shape[0])[:, None] < count, V * diagonal, 0)

        return top_eigenpairs(
            operator, start, COUNT, WANTED, tolerance=0.0, max_sweeps=sweeps
        ).vectors

    vectors = call(jax.random.normal(jax.random.key(0), (K, n))).block_until_ready()
    begin = time.perf_counter()
    for _ in range(100):
        vectors = call(vectors)
    vectors.block_until_ready()
    return (time.perf_counter() - begin) * 1e4


if __name__ == "__main__":
    device = jax.devices()[0]
    print(
        f"{platform.processor() or platform.machine()}, {device}, jax {jax.__version__}"
    )
    print(
        f"n = {N}, {WANTED} wanted of {COUNT}, products: cold start / mean of the rest"
    )
    print(
        f"{'angle':>8}{'tolerance':>11}{'ours':>14}{'with a scout':>16}{'LOBPCG':>16}"
    )
    for tolerance in (1e-2, 1e-3):
        for angle in (1e-3, 1e-2, 5e-2):
            runs = (
                ours(angle, 2 * tolerance, None),
                ours(angle, 2 * tolerance, jax.random.key(3)),
                lobpcg(angle, 2 * tolerance),
            )
            cells = [f"{int(run[0]):4d} /{float(run[1:].mean()):6.2f}" for run in runs]
            print(f"{angle:8.3f}{tolerance:11.0e}" + "".join(f"{c:>16}" for c in cells))
    for sweeps in (0, 1, 2):
        print(f"n = 9000, {sweeps} sweeps: {overhead(sweeps=sweeps):.0f} µs per call")
