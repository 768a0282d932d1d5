"""What accuracy costs: the error of adaptive steps against their tolerance.

    python -m benchmarks.tolerance

The first 200 steps of gradient descent at learning rate 0.2 on a network of 8,970
parameters and 1,000 digits, in which three eigenvalues become critical; against the
same flow in fixed steps of 1/32 with well-converged eigenvectors. The errors are those
of the integration, not of the flow as a description of the optimizer. One compiled
program serves all tolerances. Takes about three minutes. Writes out/tolerance.png.

Then 4,000 steps of RMSProp in which the loss falls by six orders of magnitude, against
the flow with a tolerance of 1e-4: the errors of the loss, and by how much of the time
the flow is ahead.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import centralflow as cf

from . import problems
from .report import heading, table

ERRORS = ("loss", "mean loss", "oscillation")


def errors(flow: cf.Trajectory, exact: cf.Trajectory) -> list[float]:
    """The mean relative errors of the losses, and the L1 error of the oscillation."""
    mean = lambda a, b: float(np.mean(np.abs(np.asarray(a) / np.asarray(b) - 1)))
    a, b = (np.sum(np.asarray(x.oscillation), axis=1) for x in (flow, exact))
    return [
        mean(flow.loss, exact.loss),
        mean(flow.mean_loss, exact.mean_loss),
        float(np.sum(np.abs(a - b)) / np.sum(b)),
    ]


def falling(tolerances: list[float], steps: int = 4000) -> None:
    """Print the errors where the loss falls by orders of magnitude."""
    problem = problems.separable()
    exact = problem.predict(steps, rtol=1e-4)
    rows = []
    for rtol in tolerances:
        flow = problem.predict(steps, rtol=rtol)
        error = np.asarray(flow.mean_loss) / np.asarray(exact.mean_loss) - 1
        # When the exact loss is as low as this one, from half of the time on.
        falls = -np.log(exact.mean_loss), -np.log(flow.mean_loss)
        late = slice(steps // 2, steps * 9 // 10)
        ahead = np.interp(falls[1][late], falls[0], exact.times) / exact.times[late] - 1
        work = float(flow.gradient_equivalents) / steps
        shares = np.mean(np.abs(error)), np.max(np.abs(error)), np.mean(ahead)
        shown = [f"{100 * x:.1f} %" for x in shares]
        rows.append([f"{rtol:.0e}", *shown, f"{work:.2f}"])
    last = float(exact.mean_loss[-1])
    heading(f"\n{steps} steps of RMSProp, to a loss of {last:.0e}, from rtol=1e-4")
    table(["rtol", "mean", "largest", "ahead", "gradient-equivalents per step"], rows)


def draw(tolerances: list[float], works: list[float], found: np.ndarray) -> Figure:
    figure = Figure(figsize=(6.8, 3.0), layout="constrained")
    a, b = figure.subplots(1, 2, sharey=True)
    for name, marker, column in zip(ERRORS, "os^", found.T, strict=True):
        a.plot(tolerances, column, marker + "-", ms=4, label=name)
        b.plot(works, column, marker + "-", ms=4, label=name)
    a.plot(tolerances, tolerances, color="black", lw=0.8, ls=":", label="rtol")
    a.set(xscale="log", xlabel="rtol", ylabel="relative error of the integration")
    b.set(xlabel="gradient-equivalents per optimizer step")
    b.set(xscale="log")
    b.set_xticks(works, [f"{work:.0f}" for work in works])
    b.minorticks_off()
    a.legend(fontsize=8, frameon=False)
    for axes in (a, b):
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--rtol", type=float, nargs="+", default=[3e-2, 1e-2, 3e-3, 1e-3, 3e-4]
    )
    parser.add_argument("--output", type=Path, default=Path("out/tolerance.png"))
    arguments = parser.parse_args()
    steps, problem = arguments.steps, problems.gradient_descent()

    fine = cf.CentralFlow(substeps=32, renew_every=1, eigen_tolerance=5e-4)
    exact = problem.predict(steps, flow=fine)
    flows = [problem.predict(steps, rtol=rtol) for rtol in arguments.rtol]
    found = np.array([errors(flow, exact) for flow in flows])
    works = [float(flow.gradient_equivalents) / steps for flow in flows]
    rows = []
    for rtol, flow, work, wrong in zip(
        arguments.rtol, flows, works, found, strict=True
    ):
        s = flow.stats
        rows.append(
            [
                f"{rtol:.0e}",
                *(f"{100 * x:.3f} %" for x in wrong),
                f"{work:.1f}",
                f"{s['accepted_steps']} + {s['rejected_steps']}",
                f"{s['seconds']:.2f} s",
            ]
        )
    heading(f"Errors of the integration over {steps} steps of gradient descent, lr 0.2")
    table(
        [
            "rtol",
            *ERRORS,
            "gradient-equivalents per step",
            "steps + rejected",
            "seconds",
        ],
        rows,
    )
    compiled = sum(flow.stats["compile_seconds"] > 0 for flow in flows)
    print(f"\nPrograms compiled for the adaptive steps: {compiled}")
    if len(flows) > 1:
        order = np.polyfit(np.log(arguments.rtol), np.log(found), 1)[0]
        slope = np.polyfit(np.log(arguments.rtol), np.log(works), 1)[0]
        shown = ", ".join(f"{n} {p:.2f}" for n, p in zip(ERRORS, order, strict=True))
        print(f"Fitted powers of rtol: {shown}; the cost {slope:.2f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(arguments.rtol, works, found).savefig(arguments.output, dpi=150)
    falling([rtol for rtol in arguments.rtol if 1e-3 <= rtol <= 1e-2])


if __name__ == "__main__":
    main()
