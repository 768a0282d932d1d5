"""How near RMSProp's real preconditioner is to the stationary one, along a run.

    python -m benchmarks.stationary

RMSProp on 1,000 digits, a network of 8,970 parameters, at the edge from about step 160
on; and one of some tens of thousands, at the last time. At each time the weights are
frozen and the preconditioner is found at which nu would stay where it is. Writes
out/stationary.png.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure

import centralflow as cf

from .report import heading, table


def compare_along(width: int, times: list[int]) -> list[list[float]]:
    """A row for each time: how the real P and the stationary one compare."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(1000))
    model = cf.models.MLP(64, 10, width, key=jax.random.key(0))
    weights, flat = objective.flatten(model)
    optimizer = cf.RMSProp(2e-4, 0.99, 1e-7, bias_correction=True)
    state, rows, done = optimizer.init(weights), [], 0
    for step in times:
        run = cf.train(objective, model, optimizer, step - done, optimizer_state=state)
        model, state, done = run.model, run.optimizer_state, step
        here = optimizer.update_state(state, flat.grad(objective.flatten(model)[0]))
        real = np.asarray(optimizer.preconditioner(here), float)
        solve = lambda model=model, state=state: jax.block_until_ready(
            cf.stationary_preconditioner(objective, model, optimizer, state)
        )
        solve()
        start = time.perf_counter()
        found = solve()
        seconds = time.perf_counter() - start
        P = np.asarray(found.preconditioner, float)
        naive = np.abs(np.asarray(flat.grad(objective.flatten(model)[0]), float))
        cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        sharpness = cf.sharpness(objective, model, optimizer, here).values[0]
        rows.append(
            [
                weights.size,
                step,
                float(sharpness),
                cosine(P, real),
                np.linalg.norm(real) / np.linalg.norm(P),
                cosine(naive, real),
                float(found.complementarity),
                float(found.violation),
                int(found.iterations),
                seconds,
                bool(found.converged),
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--times", type=int, nargs="+", default=[50, 100, 150, 200, 300, 500, 800, 1200]
    )
    parser.add_argument("--large", type=int, default=160, help="width of the second")
    arguments = parser.parse_args()
    small = compare_along(64, arguments.times)
    large = compare_along(arguments.large, arguments.times[-1:])
    heading("RMSProp's preconditioner and the stationary one at the same weights")
    formats = "{:d} {:d} {:.2f} {:.4f} {:.3f} {:.2f} {:.0e} {:.0e} {:d} {:.1f} {}"
    table(
        [
            "parameters",
            "step",
            "sharpness",
            "cosine similarity",
            "|real| / |stationary|",
            "cosine to |g|",
            "complementarity",
            "violation",
            "iterations",
            "seconds",
            "converged",
        ],
        [formats.format(*row).split() for row in small + large],
    )
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    a, b = figure.subplots(1, 2, sharex=True)
    columns = list(zip(*small, strict=True))
    a.plot(columns[1], columns[3], "o-", ms=3, label="stationary $P$")
    a.plot(columns[1], columns[5], "s-", ms=3, color="#666666", label="$|g|$")
    a.set(ylim=(0, 1.02), title="cosine similarity to the real $P$")
    a.legend(fontsize=8, frameon=False, loc="lower right")
    b.plot(columns[1], columns[4], "o-", ms=3)
    b.set(ylim=(0, None), title="$|$real $P|$ / $|$stationary $P|$")
    for axes in (a, b):
        axes.axhline(1, color="black", lw=0.8, ls=":")
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/stationary.png", dpi=150)


if __name__ == "__main__":
    main()
