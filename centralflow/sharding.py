"""Arrays that are spread over several devices, or several processes."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree


def automatic(tree: PyTree) -> PyTree:
    """Arrays on a mesh with explicit axes, which `jax.make_mesh` makes, on the same
    mesh with automatic ones, where the compiler decides how to shard what is computed
    from them. With explicit ones each reshape and each product over a sharded axis has
    to say it, those of the user's loss too."""

    def moved(x):
        sharding = None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", 0)
        if (
            not isinstance(sharding, NamedSharding)
            or AxisType.Explicit not in sharding.mesh.axis_types
        ):
            return x
        mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
        kind = sharding.memory_kind
        return jax.device_put(x, NamedSharding(mesh, sharding.spec, memory_kind=kind))

    return jax.tree.map(moved, tree)


def sharded_like(tree: PyTree, like: PyTree) -> PyTree:
    """Arrays on the meshes of those of `like`, sharded as these are, if they are on
    meshes. The compiler does not keep that through a flat vector."""

    def moved(x, old):
        traced = isinstance(x, jax.core.Tracer) or isinstance(old, jax.core.Tracer)
        sharding = None if traced else getattr(old, "sharding", None)
        return jax.device_put(x, sharding) if isinstance(sharding, NamedSharding) else x

    return jax.tree.map(moved, tree, automatic(like))


def spread_like(vector: Array, tree: PyTree) -> PyTree:
    """The arrays whose last axis is as long as the vector, vectors and rows of
    matrices, sharded along it as the vector is, if it is on a mesh."""
    sharding = None
    if not isinstance(vector, jax.core.Tracer):
        sharding = getattr(vector, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return tree

    def moved(x):
        if x.shape[-1:] != vector.shape:
            return x
        spec = PartitionSpec(*[None] * (x.ndim - 1), *sharding.spec)
        at, whole = NamedSharding(sharding.mesh, spec), np.asarray(x)
        # (`device_put` compares what the processes have, and NaN with NaN.)
        return jax.make_array_from_callback(x.shape, at, lambda index: whole[index])

    return jax.tree.map(moved, tree)


def on_host(x: Array | np.ndarray) -> np.ndarray:
    """The whole of an array. If no process has all of it, each must call this."""
    if isinstance(x, jax.Array) and not (
        x.is_fully_addressable or x.is_fully_replicated
    ):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def is_first_process() -> bool:
    """Whether this is the process that writes files, warns, and shows progress."""
    return jax.process_index() == 0


class Processes:
    """Those that make a call together: all, if any of its arrays is spread over them;
    else this one, alone. What each decides by its own clock or its own files must be
    the same in all of them; each must call every method."""

    several: bool
    is_first: bool  # whether this is the one that writes

    def __init__(self, tree: PyTree):
        spread = lambda x: (
            isinstance(x, jax.Array)
            and not (isinstance(x, jax.core.Tracer) or x.is_fully_addressable)
        )
        self.several = any(map(spread, jax.tree.leaves(tree)))
        self.is_first = is_first_process() or not self.several

    def first(self, x: int | float | bool) -> int | float | bool:
        """What the first says, in all of them."""
        if not self.several:
            return x
        return type(x)(multihost_utils.broadcast_one_to_all(np.asarray(x)))

    def attempt(self, fn: Callable[[], Any]) -> Any:
        """`fn()`, which raises in all if it does in one."""
        value = error = None
        try:
            value = fn()
        except Exception as e:  # none may stay behind, waiting
            error = e
        if self._all(error is not None).any():
            raise error or RuntimeError("Another of the processes failed.")
        return value

    def agree(self, x: bool) -> bool:
        """Whether all say the same."""
        return len(set(self._all(x).tolist())) == 1

    def _all(self, x: bool) -> np.ndarray:
        if not self.several:
            return np.asarray([x])
        return np.asarray(multihost_utils.process_allgather(np.asarray(x)))
