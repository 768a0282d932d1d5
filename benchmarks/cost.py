"""What a prediction costs, next to the run it predicts.

    python -m benchmarks.cost

Gradient descent at learning rate 0.2 on a network of 8,970 parameters and 1,000 digits,
for more and more steps; then other optimizers and losses, two of them for more steps,
too; and the fixed-step scheme.
Both sides run in this process, compiled and warmed up, in turn; the ratio of their wall
times is the median over the repetitions. (The longest runs are made once.) Takes from
ten minutes to an hour, by machine. Writes out/cost.png.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import centralflow as cf

from . import problems
from .problems import Problem
from .report import heading, table

LONG = 50_000  # steps: from here on, one repetition and every tenth time


def measure(problem: Problem, steps: int, repeat: int, **options: Any) -> dict:
    if steps > LONG:
        repeat, options = 1, dict(times=np.arange(0, steps + 1, 10.0), **options)
    else:
        problem.train(steps)  # compilation is not counted, but the first run is slower
    compilation = problem.predict(steps, **options).stats["compile_seconds"]
    ratios = []
    for _ in range(repeat):
        run, flow = problem.train(steps), problem.predict(steps, **options)
        ratios.append(flow.stats["seconds"] / run.stats["seconds"])
    report = cf.compare(run, flow)
    edge = 0.99 * float(flow.critical_sharpness)
    critical = np.sum(np.nan_to_num(np.asarray(flow.sharpness)) > edge, axis=1)
    measured = dict(
        problem=problem.name,
        steps=steps,
        wall=statistics.median(ratios),
        work=float(flow.gradient_equivalents) / steps,
        seconds=(run.stats["seconds"], flow.stats["seconds"]),
        critical=(critical.mean(), critical.max()),
        accepted=int(flow.stats["accepted_steps"]),
        rejected=int(flow.stats["rejected_steps"]),
        unconverged=int(flow.stats["unconverged"]),
        loss_error=report.loss_error,
        weight_distance=report.weight_distance,
        compilation=compilation,
    )
    # What was measured is not lost if the rest is interrupted.
    print(*row(measured), f"of {ratios}", sep=" | ", file=sys.stderr, flush=True)
    return measured


def row(m: dict) -> list[str]:
    ratio = lambda x: f"{x:.3g}" if x < 100 else f"{x:.0f}"
    return [
        m["problem"],
        f"{m['steps']:,}",
        ratio(m["wall"]),
        ratio(m["work"]),
        "{:.2f} s, {:.2f} s".format(*m["seconds"]),
        "{:.1f}, {}".format(*m["critical"]),
        f"{m['accepted']} + {m['rejected']}",
        f"{100 * m['loss_error']:.2f} %",
        f"{100 * m['weight_distance']:.1f} %",
        f"{m['compilation']:.0f} s",
    ]


def draw(main: list[dict], others: list[dict]) -> Figure:
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = [m["steps"] for m in main]
    kinds = (
        ("wall", "wall time", "o", "C0"),
        ("work", "gradient-equivalents", "s", "C1"),
    )
    for key, label, marker, color in kinds:
        axes.plot(steps, [m[key] for m in main], marker + "-", c=color, label=label)
    names = list(dict.fromkeys(m["problem"] for m in others))
    for name, marker in zip(names, "^vDP<>X*", strict=False):
        these = [m for m in others if m["problem"] == name]
        for key, _, _, color in kinds:
            x, y = [m["steps"] for m in these], [m[key] for m in these]
            axes.plot(x, y, marker + ":", lw=0.8, c=color, ms=5, mfc="none")
        axes.plot([], [], marker, ms=5, mec="#666666", mfc="none", label=name)
    axes.axhline(1, color="black", lw=0.8, ls=":")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="optimizer steps predicted",
        ylabel="cost of the prediction / of the run",
    )
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[400, 2_000, 20_000, 200_000]
    )
    parser.add_argument("--other-steps", type=int, default=2_000, help="0 for none")
    parser.add_argument("--more-steps", type=int, default=20_000, help="0 for none")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("out/cost.png"))
    arguments = parser.parse_args()
    repeat = arguments.repeat

    gd = problems.gradient_descent()
    rows = [measure(gd, steps, repeat) for steps in arguments.steps]
    others = []
    if arguments.other_steps:
        for make in (
            problems.many_critical,
            problems.seven_critical,
            problems.rmsprop,
            problems.scalar_rmsprop,
            problems.cross_entropy,
            problems.convolutional,
            problems.sorting,
        ):
            others.append(measure(make(), arguments.other_steps, repeat))
    if arguments.more_steps:
        for make in (problems.convolutional, problems.rmsprop):
            others.append(measure(make(), arguments.more_steps, 1))
    fixed = gd._replace(name="GD, CentralFlow(substeps=1)")
    fixed = measure(fixed, 400, repeat, flow=cf.CentralFlow(substeps=1))

    heading("Cost of a prediction / cost of the run")
    table(
        [
            "problem",
            "steps",
            "wall time / training",
            "gradient-equivalents per step",
            "training, prediction",
            "critical eigenvalues (mean, most)",
            "steps of the flow + rejected",
            "loss error",
            "weight distance",
            "compilation",
        ],
        [row(m) for m in [*rows, *others, fixed]],
    )
    failures = sum(m["unconverged"] for m in [*rows, *others])
    print(f"\nSolvers that did not converge in adaptive steps: {failures}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, others).savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
