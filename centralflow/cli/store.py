"""The files of a run. Each is replaced as a whole, so that whoever reads one, at any
time, after any accident, reads a complete one. Nothing in them is executed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import PyTree

from ..files import by_path, from_paths, remove_left_over, replace

RESULTS, CHECKPOINT, CONFIG = "results.h5", "checkpoint.h5", "config.json"
_FORMAT = "centralflow run 1"

Table = dict[str, np.ndarray]  # series, a row for each of `steps`


def exists(folder: Path) -> bool:
    """Whether there is a run in the folder."""
    return any((folder / name).exists() for name in (RESULTS, CHECKPOINT, CONFIG))


def remove(folder: Path) -> None:
    """Remove a run, the configuration, without which there is none, last."""
    for name in (CHECKPOINT, RESULTS, CONFIG):
        (folder / name).unlink(missing_ok=True)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps(dict(format=_FORMAT) | config, indent=2) + "\n"
    replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def read_config(folder: Path) -> dict[str, Any]:
    """Raises `ValueError` if there is none, or none of ours."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        known = config["format"] == _FORMAT
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"there is no run in {folder}.") from error
    if not known:
        raise ValueError(f"{folder / CONFIG} is of another version.")
    return config


class Log:
    """What is logged: tables by path, a series to a column, and attributes."""

    tables: dict[str, Table]
    attributes: dict[str, Any]

    def __init__(self, tables: dict[str, Table], attributes: dict[str, Any]):
        self.tables, self.attributes = tables, attributes

    def append(self, path: str, rows: Table, start: int) -> None:
        """Add the rows of a block, whose steps are counted from `start`."""
        rows = rows | dict(steps=np.asarray(rows["steps"], np.int64) + start)
        old = self.tables.get(path)
        if old is not None and len(old["steps"]):
            new = rows["steps"] > old["steps"][-1]
            rows = {name: _join(old[name], rows[name][new]) for name in old}
        self.tables[path] = rows

    def truncate(self, step: int) -> None:
        """Forget what is after the step, or, if that is 0, everything."""
        if step == 0:
            self.tables = {}
        for path, table in self.tables.items():
            keep = table["steps"] <= step
            self.tables[path] = {name: x[keep] for name, x in table.items()}

    def write(self, folder: Path) -> None:
        def write(path):
            with h5py.File(path, "w") as file:
                file.attrs.update(dict(format=_FORMAT) | self.attributes)
                for where, table in self.tables.items():
                    for name, values in table.items():
                        file[f"{where}/{name}"] = values

        replace(folder / RESULTS, write)

    @staticmethod
    def read(folder: Path) -> "Log":
        """Raises `ValueError` if there is none, or none of ours."""
        tables: dict[str, Table] = {}

        def visit(name, item):
            if isinstance(item, h5py.Dataset):
                path, _, series = name.rpartition("/")
                tables.setdefault(path, {})[series] = item[()]

        path = folder / RESULTS
        if not path.is_file():
            if not folder.is_dir():
                raise ValueError(f"there is no folder {folder}.")
            raise ValueError(f"there are no results in {folder} yet.")
        try:
            with h5py.File(path) as file:
                attributes = dict(file.attrs)
                file.visititems(visit)
            known = attributes.pop("format") == _FORMAT
        except (OSError, KeyError) as error:
            raise ValueError(f"{path} is damaged, or no run: {error}") from error
        if not known:
            raise ValueError(f"{path} is of another version.")
        return Log(tables, attributes)


def write_checkpoint(folder: Path, step: int, states: dict[str, PyTree]) -> None:
    """The states of the processes after so many steps: arrays by their paths."""

    def write(path):
        with h5py.File(path, "w") as file:
            file.attrs.update(format=_FORMAT, step=step)
            for name, array in by_path("", states).items():
                file[name] = array

    replace(folder / CHECKPOINT, write)


def read_checkpoint(
    folder: Path, like: Callable[[int], dict[str, PyTree]]
) -> tuple[int, dict[str, PyTree]] | None:
    """The step and the states, of the structure of `like(step)`; `None` if there is no
    checkpoint. Raises `ValueError` if it is damaged or of another structure."""
    path = folder / CHECKPOINT
    for name in (RESULTS, CHECKPOINT):
        remove_left_over(folder / name)
    if not path.exists():
        return None
    try:
        with h5py.File(path) as file:
            if file.attrs["format"] != _FORMAT:
                raise KeyError("it is of another version")
            step = int(file.attrs["step"])
            arrays = {name: np.asarray(x[()]) for name, x in file.items()}
    except (OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    try:
        return step, from_paths("", like(step), arrays, shapes=False)
    except ValueError as error:
        message = f"{path} has the arrays of another version: {error}"
        raise ValueError(message) from error


def _join(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Rows below rows; of tracked eigenvalues there may be more, later."""
    if old.ndim == 2 and old.shape[1] != new.shape[1]:
        width = max(old.shape[1], new.shape[1])
        pad = lambda x: np.pad(
            x, ((0, 0), (0, width - x.shape[1])), constant_values=np.nan
        )
        old, new = pad(old), pad(new)
    return np.concatenate([old, new])
