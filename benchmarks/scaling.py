"""How the cost of a prediction grows with the problem.

    python -m benchmarks.scaling

Gradient descent on digits with one thing changed at a time: the number of parameters
(the width of the network), of examples, and of critical eigenvalues (the learning
rate). A row says what one step of the flow costs, in wall time and in
gradient-equivalents, and the exponents are fitted to these. Takes about five minutes.
Writes out/scaling.png.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import centralflow as cf

from .problems import Problem
from .report import heading, table

# What limits each, at the sizes that are measured here.
LIMITS = dict(
    parameters="The counts do not depend on the width; the derivatives do, as any "
    "gradient does, once they outweigh what a step costs at any size.",
    examples="Only the derivatives see the examples, so an exponent below one is the "
    "share of the rest of a step: vector operations on the weights and small matrices.",
    critical="k eigenvalues need k (k + 1) / 2 third derivatives and about 2 k + 2 "
    "Hessian-vector products a step: between first and second order in k.",
)


def measure(size: float | None, steps: int, problem: Problem, **options: Any) -> dict:
    problem.predict(steps, **options)
    flow = min(
        (problem.predict(steps, **options) for _ in range(2)),
        key=lambda flow: flow.stats["seconds"],
    )
    tried = int(flow.stats["accepted_steps"] + flow.stats["rejected_steps"])
    edge = 0.99 * float(flow.critical_sharpness)
    critical = float((np.nan_to_num(np.asarray(flow.sharpness)) > edge).sum(1).mean())
    return dict(
        size=critical if size is None else size,
        critical=critical,
        tried=tried,
        work=float(flow.gradient_equivalents) / tried,
        seconds=flow.stats["seconds"] / tried,
        run=problem.train(steps).stats["seconds"] / steps,
    )


def network(width: int, examples: int, rate: float) -> Problem:
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(examples))
    model = cf.models.MLP(64, 10, width, key=jax.random.key(0))
    problem = Problem("", objective, model, cf.GradientDescent(rate))
    return problem.after(100)  # past the first steps, which overshoot the edge


def parameters(problem: Problem) -> int:
    return problem.objective.flatten(problem.model)[0].size


def exponent(rows: list[dict], key: str) -> float:
    x, y = (np.log([row[k] for row in rows]) for k in ("size", key))
    return float(np.polyfit(x, y, 1)[0])


def draw(series: dict[str, list[dict]]) -> Figure:
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    kinds = (
        ("seconds", 1e3, "wall time (ms)", "o", "C0"),
        ("work", 1, "gradient-equivalents", "s", "C1"),
    )
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (name, rows) in zip(panels, series.items(), strict=True):
        sizes = [row["size"] for row in rows]
        for key, unit, label, marker, color in kinds:
            label = f"{label}, exponent {exponent(rows, key):.2f}"
            values = [unit * row[key] for row in rows]
            axes.plot(sizes, values, marker + "-", ms=4, c=color, label=label)
        axes.set(xscale="log", yscale="log", xlabel=name)
        axes.set_xticks(
            sizes, [f"{size:,.3g}" if size < 100 else f"{size:,.0f}" for size in sizes]
        )
        axes.minorticks_off()
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("for each step of the flow")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, 3 * high)  # room for the legends
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--examples", type=int, nargs="+", default=[200, 500, 1797])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.4, 0.7, 1.0])
    parser.add_argument("--output", type=Path, default=Path("out/scaling.png"))
    arguments = parser.parse_args()
    steps = arguments.steps

    wide = [network(width, 500, 0.4) for width in arguments.widths]
    many = [network(64, examples, 0.4) for examples in arguments.examples]
    fast = [network(64, 500, rate) for rate in arguments.rates]
    series = dict(
        parameters=[measure(parameters(p), steps, p) for p in wide],
        examples=[measure(p.objective.examples, steps, p) for p in many],
        critical=[measure(None, steps, p) for p in fast],
    )
    heading(f"Cost of one step of the flow, in predictions of {steps} steps")
    cells = []
    for name, rows in series.items():
        for row in rows:
            size = f"{row['size']:.1f}" if name == "critical" else f"{row['size']:,}"
            cells.append(
                [
                    name,
                    size,
                    f"{row['critical']:.1f}",
                    str(row["tried"]),
                    f"{row['work']:.1f}",
                    f"{1e3 * row['seconds']:.1f} ms",
                    f"{1e3 * row['run']:.2f} ms",
                ]
            )
    table(
        [
            "varied",
            "size",
            "critical eigenvalues (mean)",
            "steps of the flow",
            "gradient-equivalents per step",
            "wall time per step",
            "optimizer step",
        ],
        cells,
    )
    print()
    for name, rows in series.items():
        print(
            f"{name}: wall time per step of the flow ~ size^"
            f"{exponent(rows, 'seconds'):.2f}, optimizer step ~ size^"
            f"{exponent(rows, 'run'):.2f}, gradient-equivalents ~ size^"
            f"{exponent(rows, 'work'):.2f}. {LIMITS[name]}"
        )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    names = ("parameters", "examples", "critical eigenvalues (mean)")
    draw(dict(zip(names, series.values(), strict=True))).savefig(
        arguments.output, dpi=150
    )


if __name__ == "__main__":
    main()
