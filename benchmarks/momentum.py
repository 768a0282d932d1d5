"""Where the flow of a method with momentum departs from the method, mode by mode.

    python -m benchmarks.momentum

A quadratic with one mode at each of several shares of the critical sharpness, for which
the flow has nothing to hold: by heavy ball (with averaging, as in Adam), and by its
central flow in small steps. Two steps of a mode determine the next, as w_t+2 = p w_t+1
- q w_t; the roots of z^2 - p z + q are the factors by which it goes on, exp(-decay +- i
2 pi / period). They are fitted to the weights of each. A table of docs/numerics.md.
"""

import jax
import jax.numpy as jnp
import numpy as np

import centralflow as cf

from .report import heading, table

SHARES = [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99]
BETAS = [0.9, 0.99]


def roots(weights: np.ndarray) -> np.ndarray:
    """One of each mode's two, which are complex conjugates."""
    w = np.asarray(weights, float)
    found = []
    for x in w.T:
        A = np.stack([x[1:-1], -x[:-2]], axis=1)
        p, q = np.linalg.lstsq(A, x[2:], rcond=None)[0]
        found.append(max(np.roots([1, -p, q]), key=lambda z: z.imag))
    return np.array(found)


def modes(beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The roots of the method, and of its flow, of one optimizer step."""
    optimizer = cf.HeavyBall(1.0, beta, averaged=True)
    s = jnp.array(SHARES) * optimizer.critical_sharpness
    objective = cf.Objective(lambda w: 0.5 * jnp.sum(s * w * w))
    problem = objective, jnp.ones_like(s), optimizer, 12
    run = cf.train(*problem, weight_times=range(13))
    flow = cf.predict(
        *problem, flow=cf.CentralFlow(substeps=64), weight_times=range(13)
    )
    return roots(run.weights), roots(flow.weights)


def period(z: complex) -> str:
    return f"{2 * np.pi / abs(np.angle(z)):.2f}"


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    heading("Modes below the edge: the method and its flow")
    for beta in BETAS:
        rows = []
        for share, a, b in zip(SHARES, *modes(beta), strict=True):
            # By how far the flow is behind when the mode has decayed to 1/e.
            turn = (np.angle(a) - np.angle(b)) / (2 * np.pi) / -np.log(abs(a))
            row = [f"{share:g}", period(a), period(b), f"{abs(a):.4f}", f"{abs(b):.4f}"]
            rows.append([*row, f"{turn:.2f}"])
        print(f"\nbeta = {beta}")
        table(
            [
                "sharpness / critical",
                "period of the method",
                "of the flow",
                "decay in a step",
                "of the flow",
                "turns behind",
            ],
            rows,
        )


if __name__ == "__main__":
    main()
