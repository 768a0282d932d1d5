"""What a run leaves behind so that another process can go on with it."""

import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from .files import (
    by_path,
    check_folder,
    from_paths,
    read_arrays,
    remove_left_over,
    write_arrays,
)
from .objective import FlatObjective
from .optimizers import AbstractOptimizer
from .running import probe
from .sharding import Processes, on_host

# By default a run is written down every half minute, and less often if that would take
# more than a twentieth of the time.
_SECONDS, _SHARE = 30.0, 0.05
# On another machine the loss may be rounded differently.
_SAME_LOSS = 1e-3


class Checkpoint:
    """The file from which a run goes on after its process has ended. Without a path, it
    does nothing. Of several processes the first writes and all read."""

    path: Path | None
    every: int | None
    settings: dict[str, Any]

    def __init__(
        self,
        path: str | os.PathLike | None,
        every: int | None,
        traced: bool,
        processes: Processes,
        settings: Callable[[], dict[str, Any]],
    ):
        if every is not None:
            whole = isinstance(every, int | np.integer) and not isinstance(every, bool)
            if not whole or every < 1:
                raise ValueError(
                    f"`checkpoint_every` must be a positive integer, got {every!r}."
                )
            if path is None:
                raise ValueError(
                    f"`checkpoint_every` is {every}, but there is no file to write: "
                    "give its path as `checkpoint`."
                )
        if path is not None:
            if not isinstance(path, str | os.PathLike):
                raise ValueError(
                    f"`checkpoint` must be the path of a file, got {path!r}."
                )
            if traced:
                raise ValueError(
                    f"`checkpoint` is {os.fspath(path)!r}, but under `jax.jit` and "
                    "`jax.vmap` no file can be written: leave it out."
                )
            path = processes.attempt(lambda: check_folder("checkpoint", path))
        self.path, self.every, self.processes = path, every, processes
        self.settings = {} if path is None else settings()
        self._next, self._time, self._cost = 0, -np.inf, 0.0

    def read(self) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
        """Header and arrays, if there is a file. Raises `ValueError` unless it is of
        this very run."""
        if self.path is None:
            return None
        if self.processes.is_first:
            remove_left_over(self.path)
        exists = self.path.exists()
        if not self.processes.agree(exists):
            raise ValueError(
                f"`checkpoint`: {str(self.path)!r} is there in some processes and not "
                "in others. It must be on a file system that all of them share."
            )
        return self.processes.attempt(self._read) if exists else None

    def _read(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        header, arrays = read_arrays("checkpoint", self.path, "checkpoint")
        found, wanted = header.get("settings", {}), self.settings
        names = [k for k in wanted | found if not _same(found.get(k), wanted.get(k))]
        if names:
            raise ValueError(
                f"`checkpoint`: {str(self.path)!r}, written by centralflow "
                f"{header.get('version')}, is that of another run, with other "
                f"{', '.join(f'`{k}`' for k in names)}. Remove it, or choose another "
                "file."
            )
        return header, arrays

    def stop(self, step: int | float) -> int | float:
        """Where, after `step`, the run must pause to be written."""
        if self.path is None or self.every is None:
            return np.inf
        return (step // self.every + 1) * self.every

    def due(self, step: int | float) -> bool:
        """Whether it is time to write. At once at first: a file that cannot be written
        is an error now, and not in an hour."""
        if self.path is None:
            return False
        if self.every is None:
            wait = max(_SECONDS, self._cost / _SHARE)
            return self.processes.first(time.monotonic() - self._time > wait)
        return step >= self._next

    def write(
        self, step: int | float, header: dict[str, Any], trees: dict[str, PyTree]
    ) -> None:
        """Replace the file by the run after `step` steps."""
        if self.path is None:
            return
        start, arrays = time.monotonic(), {}
        for name, tree in trees.items():
            arrays |= by_path(name, tree)
        header = dict(settings=self.settings, step=step) | header
        if self.processes.is_first:
            write = lambda: write_arrays(self.path, "checkpoint", header, arrays)
        else:
            write = lambda: None
        self.processes.attempt(write)
        self._next, self._time = self.stop(step), time.monotonic()
        self._cost = self._time - start

    def restore(
        self,
        name: str,
        like: PyTree,
        arrays: dict[str, np.ndarray],
        shapes: bool = True,
    ) -> PyTree[np.ndarray]:
        """The tree that was written under this name, of the structure and, with
        `shapes`, the shapes of `like`."""
        try:
            return from_paths(name, like, arrays, shapes)
        except ValueError as error:
            raise ValueError(
                f"`checkpoint`: {str(self.path)!r} was written by another version of "
                f"centralflow or of a package that it uses: of `{name}`, {error}"
            ) from error


def settings_of(
    flat: FlatObjective,
    weights: Float[Array, " n"],
    optimizer: AbstractOptimizer,
    optimizer_state: PyTree,
    steps: int,
    **others: Any,
) -> dict[str, Any]:
    """What tells a run from others, by the names of the arguments, for JSON.

    Functions have no fingerprint that a new process would find again. Instead of that
    of the loss there are its value and gradient norm at the start; of a schedule, the
    rates at a few steps.
    """
    loss, gradient, _ = probe(flat, weights, optimizer, optimizer_state)
    numbers = dict(steps=int(steps), loss_fn=[float(loss), float(gradient @ gradient)])
    if callable(optimizer.learning_rate):
        first = float(optimizer.updates(optimizer_state))
        times = jnp.asarray(np.linspace(0, steps, 33).round() + first, loss.dtype)
        rates = [float(optimizer.learning_rate(t)) for t in times]
        numbers["learning_rate"] = rates
    trees = dict(
        model=(weights, flat.static),
        data=flat.objective.data,
        optimizer=optimizer,
        optimizer_state=optimizer_state,
    )
    return numbers | {name: _digest(tree) for name, tree in (trees | others).items()}


def _digest(tree: PyTree) -> str:
    """A hash of all arrays, values and names in a tree, the same in every process."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    hashed = hashlib.blake2b(_plain(structure), digest_size=16)
    for path, leaf in leaves:
        hashed.update(_plain(jax.tree_util.keystr(path)))
        if eqx.is_array_like(leaf) and hasattr(leaf, "dtype"):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf = jax.random.key_data(leaf)
            hashed.update(_plain((leaf.dtype, leaf.shape)))
            hashed.update(on_host(leaf).tobytes())
        elif callable(leaf):
            hashed.update(
                _plain(getattr(leaf, "__qualname__", type(leaf).__qualname__))
            )
        else:
            hashed.update(_plain(leaf))
    return hashed.hexdigest()


def _plain(x: Any) -> bytes:
    # The address of an object in memory is that of one process.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(x)).encode()


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and np.allclose(
            found, wanted, rtol=_SAME_LOSS, atol=0
        )
    return found == wanted
