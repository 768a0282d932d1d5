"""`centralflow run`: the processes side by side, in blocks, each with a checkpoint."""

import contextlib
import platform
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from jaxtyping import PyTree
from tqdm.auto import tqdm

from ..files import package_version
from ..flows.base import FlowState
from ..running import check_start, show_progress
from ..train import train
from . import store
from .errors import RunFailed, blame, wrong
from .options import Settings
from .problem import Problem, build
from .processes import Block, advance, initial_state, no_rows, state_like
from .settings import complete, from_json, to_json, with_options
from .show import draw

_PACKAGES = ("centralflow", "jax", "jaxlib", "equinox", "diffrax", "numpy", "h5py")


@with_options
def run(
    given: set[str],
    output: Annotated[
        Path,
        typer.Option(
            file_okay=False, metavar="FOLDER", help="The folder for the results."
        ),
    ],
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the last checkpoint in the folder, with its settings.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run in the folder.")
    ] = False,
    progress: Annotated[
        bool | None,
        typer.Option(
            "--progress/--no-progress",
            help="Show a progress bar; by default if the session is interactive.",
            show_default=False,
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Run an optimizer and its flows side by side and keep what they do.

    The folder gets results.h5, complete up to the last checkpoint at any time,
    config.json, checkpoint.h5 and, at the end, figures.
    """
    if resume:
        if overwrite:
            raise wrong("overwrite", "it excludes --resume: give one of the two.")
        chosen = _saved_settings(
            output, {k: v for k, v in settings.items() if k in given}
        )
    else:
        chosen = complete(Settings(**settings))
        if store.exists(output) and not overwrite:
            raise wrong(
                "output", f"{output} holds a run: --resume goes on, --overwrite it."
            )
    with _precision(chosen.float64):
        _run(output, chosen, resume, progress)


def _saved_settings(folder: Path, given: dict[str, Any]) -> Settings:
    """Those of the run in the folder, once what is given again agrees with them."""
    with blame("resume"):
        config = store.read_config(folder)
    try:
        saved = from_json(config["settings"])
        before = config["versions"]
    except (KeyError, TypeError, ValueError) as error:
        raise wrong("resume", f"{folder / store.CONFIG} is damaged: {error}") from error
    for name, value in given.items():
        kept = getattr(saved, name)
        if value != kept:
            raise wrong(name, f"the run to resume has {kept}, not {value}.")
    if before != _versions():
        typer.echo("warning: other versions of packages than at the start.", err=True)
    return saved


def _run(folder: Path, s: Settings, resume: bool, progress: bool | None) -> None:
    problem = build(s)
    model = problem.flat.model(problem.weights)
    names = s.processes.split(",")
    with blame("optimizer", vars(s)):
        problem.flow.tolerance(s.rtol)
        total = s.warm_start + s.steps
        _, weights, state = check_start(
            problem.objective, model, problem.optimizer, total, None
        )
        if "central" in names:
            problem.flow.check(problem.optimizer, FlowState(weights, state, {}))
    advancing = [name for name in names if name != "midpoint"]
    log, step, states = None, 0, None
    if resume:
        like = lambda step: _like(problem, s, advancing, step)
        with blame("resume"):
            found = store.read_checkpoint(folder, like)
            if found is not None:
                step, states = found
                log = store.Log.read(folder) if step else None
    else:
        with blame("output"):
            _prepare(folder, s)
    if log is None:
        log = store.Log({}, {})
    log.truncate(step)
    log.attributes = dict(
        steps=s.steps,
        processes=s.processes,
        critical_sharpness=float(problem.optimizer.critical_sharpness),
        parameters=problem.weights.size,
        status="running",
    )
    if step == 0:
        log.tables = _without_rows(problem, names)
        log.write(folder)
    if states is None:
        states = _warm(problem, s, advancing)
        store.write_checkpoint(folder, 0, states)
    with tqdm(
        total=s.steps * len(advancing),
        initial=step * len(advancing),
        disable=not show_progress(progress),
        unit="step",
    ) as bar:
        while step < s.steps:
            size = min(s.checkpoint_every, s.steps - step)
            blocks: dict[str, Block] = {}
            for name in advancing:
                bar.set_description(name)
                blocks |= advance(name, problem, s, states[name], size)
                bar.update(size)
            _append(log, blocks, names, step, states["start"])
            failed = {k: b.failed for k, b in blocks.items() if b.failed is not None}
            step += size
            if failed:
                log.attributes["status"] = "failed"
            elif step == s.steps:
                log.attributes["status"] = "finished"
            log.write(folder)
            if failed:
                _fail(folder, log, failed)
            # Plain arrays, so that going on is the same here and after reading them.
            states |= {k: _plain(blocks[k].state) for k in advancing}
            store.write_checkpoint(folder, step, states)
    written = [store.RESULTS, store.CONFIG, store.CHECKPOINT, *draw(folder, log)]
    typer.echo(f"In {folder}: {', '.join(written)}.")


def _prepare(folder: Path, s: Settings) -> None:
    """The folder with nothing but the configuration."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder: {error}") from error
    store.remove(folder)
    store.write_config(folder, dict(settings=to_json(s), versions=_versions()))


def _warm(problem: Problem, s: Settings, names: list[str]) -> dict[str, PyTree]:
    """The states of all processes after the warm start."""
    weights, optimizer_state = problem.weights, problem.optimizer.init(problem.weights)
    if s.warm_start:
        warm = train(
            problem.objective,
            problem.flat.model(weights),
            problem.optimizer,
            s.warm_start,
            progress=False,
        )
        weights, _ = problem.objective.flatten(warm.model)
        optimizer_state = warm.optimizer_state
    state = _plain(initial_state(weights, optimizer_state))
    return {name: state for name in names} | dict(start=state["weights"])


def _like(
    problem: Problem, s: Settings, names: list[str], step: int
) -> dict[str, PyTree]:
    states = {name: state_like(problem, s, name, step) for name in names}
    return states | dict(start=problem.weights)


def _without_rows(problem: Problem, names: list[str]) -> dict[str, store.Table]:
    """The tables of the logged steps, as they are at the start."""
    tables = {name: no_rows(problem, name) for name in names}
    pairs = [f"{a}-{b}" for a, b in combinations(("start", *names), 2)]
    apart = dict(steps=np.arange(0)) | {pair: np.zeros(0) for pair in pairs}
    return tables | dict(distances=apart)


def _append(
    log: store.Log,
    blocks: dict[str, Block],
    names: list[str],
    start: int,
    origin: np.ndarray,
) -> None:
    """Add the tables of a block, and how far apart the processes are."""
    for name, block in blocks.items():
        for table, rows in block.tables.items():
            if len(rows["steps"]):
                log.append(f"{name}/{table}".rstrip("/"), rows, start)
    rows = min(len(block.weights) for block in blocks.values())
    steps = next(iter(blocks.values())).tables[""]["steps"][:rows]
    points = {name: np.asarray(blocks[name].weights[:rows], float) for name in names}
    apart = {"steps": steps}
    for a, b in combinations(("start", *names), 2):
        before = origin if a == "start" else points[a]
        apart[f"{a}-{b}"] = np.linalg.norm(points[b] - before, axis=1)
    if rows:
        log.append("distances", apart, start)


def _fail(folder: Path, log: store.Log, failed: dict[str, str]) -> None:
    name, reason = next(iter(failed.items()))
    last = max(log.tables[name]["steps"], default=0)
    raise RunFailed(
        f"{name}: {reason} Everything up to step {last} is in {folder / store.RESULTS}."
    )


def _plain(tree: PyTree) -> PyTree:
    return jax.tree.map(np.asarray, tree)


def _versions() -> dict[str, str]:
    found = {name: package_version(name) for name in _PACKAGES}
    return dict(python=platform.python_version()) | found


@contextlib.contextmanager
def _precision(float64: bool) -> Iterator[None]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", float64)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
