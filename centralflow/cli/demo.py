"""The demonstration."""

from pathlib import Path
from typing import Annotated

import jax.random as jr
import numpy as np
import typer

from .. import data, losses, models, plot
from ..compare import compare
from ..flows import CentralFlow, StableFlow
from ..objective import Objective
from ..optimizers import GradientDescent
from ..predict import predict
from ..train import train
from ..trajectory import Trajectory
from . import kinds


def demo(
    output: Annotated[
        Path,
        typer.Option(
            file_okay=False, metavar="FOLDER", help="The folder for the results."
        ),
    ],
    steps: Annotated[
        int, typer.Option(help="Optimizer steps.", **kinds.integer(2))
    ] = 400,
    learning_rate: Annotated[
        float, typer.Option(help="Of gradient descent.", **kinds.positive)
    ] = 0.7,
    warm_start: Annotated[
        int,
        typer.Option(
            help="Optimizer steps before the comparison, past the first surge.",
            **kinds.integer(1),
        ),
    ] = 86,
    size: Annotated[
        int, typer.Option(help="Examples.", **kinds.integer(1, 1797))
    ] = 1000,
    seed: Annotated[
        int, typer.Option(help="Of the initial weights.", **kinds.integer(0))
    ] = 0,
    substeps: Annotated[
        int | None,
        typer.Option(
            help="Fixed steps of the flow per optimizer step; by default adaptive.",
            show_default=False,
            **kinds.integer(1),
        ),
    ] = None,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress",
            help="Show progress bars; by default if the session is interactive.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a small network at the edge of stability and predict the run.

    Gradient descent on handwritten digits, and what the central flow and, for
    comparison, the stable flow predict of it: tables, a figure and the trajectories.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder: {error}") from error
    objective = Objective(losses.squared_error, data.digits(size))
    model = models.MLP(64, 10, key=jr.key(seed))
    optimizer = GradientDescent(learning_rate)
    typer.echo("Training ...", err=True)
    # In the first steps the sharpness rises faster than an oscillation can grow: the
    # optimizer overshoots the edge before it oscillates, and no flow follows it.
    warm = train(objective, model, optimizer, warm_start, progress=False)
    problem = (objective, warm.model, optimizer, steps)
    options = dict(
        optimizer_state=warm.optimizer_state,
        weight_times=np.unique(np.round(np.linspace(0, steps, 51))).tolist(),
        progress=progress,
    )
    run = train(*problem, sharpness_every=10, sharpness_count=6, **options)
    typer.echo("Integrating the central flow ...", err=True)
    central = predict(*problem, flow=CentralFlow(substeps), **options)
    typer.echo("Integrating the stable flow ...", err=True)
    stable = predict(*problem, flow=StableFlow(), **options)

    table = "\n\n".join(
        (
            f"Gradient descent with learning rate {learning_rate:g}, "
            f"{run.weights.shape[1]} parameters, {size} digits, "
            f"from step {warm_start}\n"
            f"{_critical(central)}",
            f"Central flow: {compare(run, central)}",
            f"Stable flow: {compare(run, stable)}",
            _work({"run": run, "central flow": central, "stable flow": stable}),
        )
    )
    typer.echo(table)
    (output / "comparison.txt").write_text(table + "\n", encoding="utf-8")
    figure = plot.comparison(run, central, stable=stable)
    figure.savefig(output / "comparison.png", dpi=250)
    figure.savefig(output / "comparison.pdf")
    run.save(output / "run.npz")
    central.save(output / "central.npz")
    stable.save(output / "stable.npz")
    typer.echo(
        f"\nIn {output}: comparison.png, comparison.pdf, comparison.txt and the "
        "trajectories run.npz, central.npz, stable.npz."
    )


def _critical(central: Trajectory) -> str:
    """For how much of the time how many eigenvalues are critical."""
    sharpness = np.asarray(central.sharpness)
    count = np.sum(sharpness > 0.995 * float(central.critical_sharpness), axis=1)
    shares = [f"{k}: {100 * np.mean(count >= k):.0f} %" for k in range(1, 5)]
    return "steps with at least so many critical eigenvalues  " + ", ".join(shares)


def _work(trajectories: dict[str, Trajectory]) -> str:
    """What the run and its predictions cost."""
    titles = ("gradients", "HVPs", "third", "per step", "seconds", "compile s")
    lines = [f"{'Work':<14}" + "".join(f"{title:>11}" for title in titles)]
    for name, trajectory in trajectories.items():
        s = {key: float(value) for key, value in trajectory.stats.items()}
        counts = (s["gradients"], s["hvps"], s["third_derivatives"])
        each = float(trajectory.gradient_equivalents) / float(trajectory.times[-1])
        lines.append(
            f"  {name:<12}"
            + "".join(f"{count:>11,.0f}" for count in counts)
            + f"{each:>11.3g}{s['seconds']:>11.3g}{s['compile_seconds']:>11.3g}"
        )
    return "\n".join(
        (
            *lines,
            "  HVPs: Hessian-vector products; third: third derivatives; per step: all",
            "  of these in gradients (1, 2 and 4 each) per optimizer step.",
            "  The run's HVPs measure its eigenvalues: the optimizer itself needs",
            "  one gradient per step.",
        )
    )
