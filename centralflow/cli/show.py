"""`centralflow plot` and `centralflow compare`: what is in the file of a run."""

from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

from .. import plot as figures
from ..compare import compare as compare_trajectories
from ..results import RESULTS
from ..trajectory import Trajectory
from . import kinds
from .errors import wrong
from .store import Log, Table

_Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="The folder of a run, finished or not.")
]


def plot(folder: _Folder) -> None:
    """Draw the figures of a run again."""
    names = draw(folder, _read(folder))
    typer.echo(f"In {folder}: {', '.join(names)}.")


def compare(
    folder: _Folder,
    window: Annotated[
        int | None,
        typer.Option(
            help="Width of the averaging kernel in optimizer steps.",
            show_default="a tenth of the run, at least 2 and at most 50",
            **kinds.integer(1),
        ),
    ] = None,
) -> None:
    """Print how well the flows predicted the run.

    Losses and gradient norms are averaged over a window in optimizer steps, at each of
    which they are kept, whatever --log-every was.
    """
    log = _read(folder)
    found = trajectories(log)
    run = found.pop("discrete", None)
    flows = {k: v for k, v in found.items() if k in ("central", "stable")}
    if run is None or not flows:
        raise wrong("FOLDER", "only a discrete run and a flow can be compared.")
    try:
        tables = [
            f"{name.capitalize()} flow: "
            f"{compare_trajectories(run, flow, window=window)}"
            for name, flow in flows.items()
        ]
    except ValueError as error:
        raise wrong("FOLDER", str(error)) from error
    typer.echo("\n\n".join(tables))


def draw(folder: Path, log: Log) -> list[str]:
    """Write the figures that the processes permit; their names."""
    found = trajectories(log)
    # The midpoints last: then the others have the colours of the other figure.
    labels = sorted(found, key=lambda name: name == "midpoint")
    ordered = [found[name] for name in labels]
    drawn = dict(
        loss=figures.loss(*ordered, labels=labels),
        metrics=figures.metrics(*ordered, labels=labels),
    )
    if "discrete" in found and "central" in found:
        drawn["comparison"] = figures.comparison(
            found["discrete"], found["central"], stable=found.get("stable")
        )
    names = []
    for name, figure in drawn.items():
        for ending in ("png", "pdf"):
            names.append(f"{name}.{ending}")
            figure.savefig(folder / names[-1], dpi=250)
    return names


def trajectories(log: Log) -> dict[str, Trajectory]:
    """The processes with their series. Their weights are points in the plane that are
    as far from the start and from the discrete run as the weights were."""
    names = log.attributes["processes"].split(",")
    return {name: _trajectory(log, name) for name in names if _rows(log, name)}


_SERIES = (
    "loss",
    "mean_loss",
    "grad_norm_sq",
    "mean_grad_norm_sq",
    "sharpness",
    "oscillation",
    "trace_covariance",
)


def _trajectory(log: Log, name: str) -> Trajectory:
    table, apart = log.tables[name], log.tables["distances"]
    series = {key: table[key] for key in _SERIES if key in table}
    metrics = _metrics(table)
    every = log.tables.get(f"{name}/every_step")
    if every is not None:
        rows = np.searchsorted(every["steps"], table["steps"])

        def spread(logged):
            """What is known at some steps only is unknown at the others."""
            full = np.full((every["steps"].size, *logged.shape[1:]), np.nan)
            full[rows] = logged
            return full

        metrics = {key: spread(logged) for key, logged in metrics.items()}
        series = {
            key: every[key] if key in every else spread(logged)
            for key, logged in series.items()
        }
        table = every
    for key in ("loss", "grad_norm_sq"):
        series.setdefault(f"mean_{key}", series[key])
    unknown = series.get("sharpness", table["steps"][:, None]) * np.nan
    for key in ("sharpness", "oscillation"):
        series.setdefault(key, unknown)
    travelled = apart.get("start-discrete", np.zeros(apart["steps"].size))
    aside = np.zeros_like(travelled)
    if name != "discrete":
        key = f"discrete-{name}"
        aside = apart[key] if key in apart else apart[f"start-{name}"]
    real = lambda x: None if x is None else jnp.asarray(x, jnp.result_type(float))
    return Trajectory(
        times=real(table["steps"]),
        **{key: real(values) for key, values in series.items()},
        metrics={key: real(values) for key, values in metrics.items()},
        weight_times=real(apart["steps"]),
        weights=real(np.stack([travelled, aside], axis=1)),
        model=None,
        optimizer_state=None,
        critical_sharpness=log.attributes["critical_sharpness"],
        result=RESULTS.successful,
        stats=_stats(log.tables.get(f"{name}/work", {})),
    )


def _metrics(table: Table) -> dict[str, np.ndarray]:
    """Of a flow, their predicted averages, where they are known."""
    known = lambda name: table.get(f"mean_{name}", table.get(name))
    names = ("test_loss", "accuracy", "test_accuracy")
    found = {name.replace("_", " "): known(name) for name in names if name in table}
    outputs = known("outputs")
    few = range(min(3, outputs.shape[1]))  # of many examples, a figure shows the first
    return found | {f"outputs, example {i + 1} of --watch": outputs[:, i] for i in few}


def _stats(work: Table) -> dict[str, Any]:
    return {name: x.sum() for name, x in work.items() if name != "steps"}


def _rows(log: Log, name: str) -> int:
    return len(log.tables[name]["steps"]) if name in log.tables else 0


def _read(folder: Path) -> Log:
    try:
        log = Log.read(folder)
    except ValueError as error:
        raise wrong("FOLDER", str(error)) from error
    if not any(_rows(log, name) for name in log.tables):
        raise wrong(
            "FOLDER",
            f"the run in {folder} has not come to its first checkpoint: there is "
            f"nothing to show. If it was killed, centralflow run --output {folder} "
            "--resume goes on.",
        )
    return log
