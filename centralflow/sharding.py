"""Arrays that are spread over several devices, or several processes."""

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


def rows_like(rows: Array, vector: Array) -> Array:
    """Rows of a matrix, each sharded as the vector is, if it is on a mesh."""
    traced = isinstance(vector, jax.core.Tracer)
    sharding = None if traced else getattr(vector, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return rows
    spec = PartitionSpec(None, *sharding.spec)
    return jax.device_put(rows, NamedSharding(sharding.mesh, spec))


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
