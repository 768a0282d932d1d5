"""How the cost of a step of the flow grows with the problem.

    python -m benchmarks.scaling                  # all
    python -m benchmarks.scaling examples         # one series; those before are kept

Gradient descent at the edge with one thing changed at a time: the number of parameters
(the width of a network), of examples (the same 100 digits, repeated, so that the flow
is the same), and of critical eigenvalues (12 networks side by side, of which 1, 2, ...
are at the edge, with one eigenvalue or more). A row says what one step of the flow
costs, in processor time and in gradient-equivalents. Exponents are fitted to all sizes,
and to the last two alone. Takes about half an hour on one core, most of it for ten
million parameters.
Writes out/scaling.json and out/scaling.png.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

import centralflow as cf

from .problems import Problem
from .report import heading, table

PREPARE, STEPS = 3, 6  # of the optimizer: the flow makes about as many, at the edge
BELOW = 0.995  # the largest eigenvalue at the start, over the critical one
COPIES = 12

# The exponents expected of the processor time and the gradient-equivalents of a step,
# and what limits it.
EXPECTED = dict(
    parameters=(
        "1, 0",
        "The counts do not depend on n. Of the time a part is derivatives, and a part, "
        "of no more than first order either, products of blocks of vectors of length "
        "n, which memory limits.",
    ),
    examples=(
        "1, 0",
        "Only the derivatives see the examples. With few of them the rest of a step "
        "remains: vectors of length n and small matrices.",
    ),
    critical=(
        "1 to 2, 1 to 2",
        "k eigenvalues need k to k (k + 1) / 2 third derivatives and about 2 k + 2 "
        "Hessian-vector products; the Krylov space hardly depends on k.",
    ),
)


def measure(size: int, problem: Problem, block_size: int = 8) -> dict:
    predict = lambda steps, **start: problem.predict(
        steps,
        flow=cf.CentralFlow(block_size=block_size),
        times=np.linspace(0, steps, 3),
        **start,
    )
    # The first part finds the eigenvectors, from nothing, and the oscillations.
    first = predict(PREPARE)
    flow, seconds = timed(lambda: predict(STEPS, solver_state=first.solver_state))
    _, run = timed(lambda: problem.train(STEPS))
    tried = int(flow.stats["accepted_steps"] + flow.stats["rejected_steps"])
    edge = 0.97 * float(flow.critical_sharpness)
    critical = (np.nan_to_num(np.asarray(flow.sharpness)) > edge).sum(1).mean()
    row = dict(
        size=size,
        critical=float(critical),
        tried=tried,
        work=float(flow.gradient_equivalents) / tried,
        seconds=seconds / tried,
        run=run / STEPS,
    )
    print(row, flush=True)
    return row


def timed(fn: Callable[[], cf.Trajectory]) -> tuple[cf.Trajectory, float]:
    """A trajectory, and the processor time of what was executed for it: the time that
    it took, less what this process did not get of a busy machine."""
    wall, processor = time.perf_counter(), time.process_time()
    trajectory = fn()
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    return trajectory, share * trajectory.stats["seconds"]


def sharpest(objective: cf.Objective, model) -> float:
    optimizer = cf.GradientDescent(1.0)
    return float(cf.sharpness(objective, model, optimizer, None).values[0])


def network(width: int, copies: int) -> tuple[int, Problem]:
    """100 digits, repeated, and a network that is just below the edge."""
    x, y = cf.data.digits(100)
    objective = cf.Objective(cf.losses.squared_error, (x, y))
    model = cf.models.MLP(64, 10, width, key=jax.random.key(0))
    optimizer = cf.GradientDescent(2 * BELOW / sharpest(objective, model))
    repeated = jax.tree.map(lambda x: jnp.concatenate([x] * copies), (x, y))
    objective = cf.Objective(cf.losses.squared_error, repeated)
    return objective.flatten(model)[0].size, Problem("", objective, model, optimizer)


class Networks(eqx.Module):
    """The weighted sum of the losses of many networks."""

    weights: Float[Array, " c"]

    def __call__(self, models, batch):
        losses = jax.vmap(cf.losses.squared_error, in_axes=(0, None))(models, batch)
        return self.weights @ losses


def side_by_side(critical: int) -> Problem:
    """12 networks, so many of them just below the edge and the others far below."""
    data = cf.data.digits(500)
    make = lambda key: cf.models.MLP(64, 10, 32, key=key)
    each = [make(key) for key in jax.random.split(jax.random.key(0), COPIES)]
    objective = cf.Objective(cf.losses.squared_error, data)
    top = np.array([sharpest(objective, model) for model in each])
    weights = 2 * BELOW / top * np.where(np.arange(COPIES) < critical, 1, 0.3)
    leaves = [eqx.filter(model, eqx.is_array) for model in each]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *leaves)
    models = eqx.combine(stacked, eqx.filter(each[0], eqx.is_array, inverse=True))
    objective = cf.Objective(Networks(jnp.asarray(weights, jnp.float32)), data)
    return Problem("", objective, models, cf.GradientDescent(1.0))


@functools.cache  # the two series begin with the same problem
def measured(width: int, copies: int) -> dict:
    n, problem = network(width, copies)
    return dict(measure(n, problem), parameters=n, examples=100 * copies)


def parameters_series(widths: list[int]) -> list[dict]:
    return [measured(width, 1) for width in widths]


def examples_series(repeats: list[int]) -> list[dict]:
    rows = [measured(64, copies) for copies in repeats]
    return [dict(row, size=row["examples"]) for row in rows]


def critical_series(counts: list[int]) -> list[dict]:
    rows = [measure(count, side_by_side(count), 16) for count in counts]
    return [dict(row, size=row["critical"]) for row in rows]


def exponent(rows: list[dict], key: str) -> float:
    x, y = (np.log([row[k] for row in rows]) for k in ("size", key))
    return round(float(np.polyfit(x, y, 1)[0]), 9) + 0.0  # zero is not shown as -0.00


def draw(series: dict[str, list[dict]]) -> Figure:
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    kinds = (
        ("seconds", 1e3, "processor time (ms)", "o", "C0"),
        ("work", 1, "gradient-equivalents", "s", "C1"),
    )
    panels = figure.subplots(1, len(series), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(panels, series.items(), strict=True):
        sizes = [row["size"] for row in rows]
        for key, unit, label, marker, color in kinds:
            label = f"{label}, exponent {exponent(rows, key):.2f}"
            values = [unit * row[key] for row in rows]
            axes.plot(sizes, values, marker + "-", ms=4, c=color, label=label)
        label = "critical eigenvalues" if name == "critical" else name
        axes.set(xscale="log", yscale="log", xlabel=label)
        if name == "critical":
            axes.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
            axes.minorticks_off()
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("for each step of the flow")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, 5 * high)  # room for the legends
    return figure


def report(series: dict[str, list[dict]]) -> None:
    heading("Cost of one step of the flow")
    cells = [
        [
            name,
            f"{row['size']:,.3g}" if name == "critical" else f"{row['size']:,}",
            f"{row['critical']:.1f}",
            str(row["tried"]),
            f"{row['work']:.0f}",
            f"{1e3 * row['seconds']:.3g} ms",
            f"{1e3 * row['run']:.3g} ms",
        ]
        for name, rows in series.items()
        for row in rows
    ]
    table(
        [
            "varied",
            "size",
            "critical eigenvalues (mean)",
            "steps of the flow",
            "gradient-equivalents per step",
            "processor time per step",
            "optimizer step",
        ],
        cells,
    )
    print()
    fits = []
    for name, rows in series.items():
        fit = lambda key, rows=rows: (
            f"{exponent(rows, key):.2f} ({exponent(rows[-2:], key):.2f})"
        )
        fits.append([name, *map(fit, ("seconds", "work", "run")), EXPECTED[name][0]])
    table(
        [
            "exponent in (at the end)",
            "processor time per step",
            "gradient-equivalents",
            "optimizer step",
            "expected of the first two",
        ],
        fits,
    )
    print()
    for name in series:
        print(f"- {name}: {EXPECTED[name][1]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("series", nargs="*", default=list(EXPECTED))
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 280, 970, 3120])
    parser.add_argument("--repeats", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 6])
    parser.add_argument("--output", type=Path, default=Path("out/scaling.png"))
    arguments = parser.parse_args()
    store = arguments.output.with_suffix(".json")
    store.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(store.read_text()) if store.exists() else {}
    of = dict(
        parameters=lambda: parameters_series(arguments.widths),
        examples=lambda: examples_series(arguments.repeats),
        critical=lambda: critical_series(arguments.counts),
    )
    for name in arguments.series:
        found[name] = of[name]()
        store.write_text(json.dumps(found, indent=1))
    series = {name: found[name] for name in EXPECTED if name in found}
    report(series)
    draw(series).savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
