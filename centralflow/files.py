"""Files of plain arrays, each replaced as a whole: whoever reads one, at any time,
after any accident, reads a complete one. Nothing in them is executed."""

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from .sharding import on_host

_FORMATS = dict(
    trajectory="centralflow trajectory 1", checkpoint="centralflow checkpoint 1"
)


def package_version(name: str = "centralflow") -> str:
    """That of the package `name`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a copy of the source
        return "unknown"


def check_folder(name: str, path: str | os.PathLike) -> Path:
    """`path`, the caller's argument `name`, once there is a folder for it."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`{name}`: there is no folder {str(path.parent)!r}.")
    if path.is_dir():
        raise IsADirectoryError(
            f"`{name}`: {str(path)!r} is a folder; give the path of a file in it."
        )
    return path


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file in a way that leaves, at any moment, the old one or the new one."""
    # Two processes that write one file, by mistake, do not share the temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_left_over(path: Path) -> None:
    """Remove what processes have left that were killed while they wrote the file."""
    for other in path.parent.iterdir():
        name = other.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if name.isdecimal() and other.name == f".{path.name}.{name}.tmp":
            other.unlink(missing_ok=True)


def write_arrays(
    path: Path, kind: str, header: dict[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    """One `.npz` file of arrays, with what JSON can say in an array `header`."""
    # Of types that are not NumPy's own, such as bfloat16, it writes the bytes alone.
    others = {k: x for k, x in arrays.items() if x.dtype.isbuiltin == 2}
    bits = {k: x.view(f"uint{8 * x.dtype.itemsize}") for k, x in others.items()}
    dtypes = {k: x.dtype.name for k, x in others.items()}
    told = dict(format=_FORMATS[kind], version=package_version(), dtypes=dtypes)
    header = told | header
    arrays = arrays | bits | dict(header=np.array(json.dumps(header)))

    def write(temporary):
        with temporary.open("wb") as file:
            np.savez(file, **arrays)

    replace(path, write)


def read_arrays(
    name: str, path: str | os.PathLike, kind: str
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays of a file of that kind. Raises `ValueError`, naming the
    caller's argument `name`, if it is another file, or damaged."""
    shown, ours = repr(os.fspath(path)), package_version()
    try:
        # Opened here, for NumPy does not close what turns out to be damaged.
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = dict(file)
        header = json.loads(str(arrays.pop("header")))
        found = header["format"]
        for key, dtype in header.get("dtypes", {}).items():
            arrays[key] = arrays[key].view(jnp.dtype(dtype))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`{name}`: there is no file {shown}.") from error
    except Exception as error:  # files can be wrong in many ways
        raise ValueError(
            f"`{name}`: {shown} is not a {kind} that centralflow {ours} can read, or "
            "it is damaged."
        ) from error
    if found != _FORMATS[kind]:
        raise ValueError(
            f"`{name}`: {shown} has the format {found!r}, written by centralflow "
            f"{header.get('version', 'of unknown version')}; centralflow {ours} reads "
            f"{_FORMATS[kind]!r}."
        )
    return header, arrays


def by_path(prefix: str, tree: PyTree) -> dict[str, np.ndarray]:
    """The arrays of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keystr = jax.tree_util.keystr
    return {prefix + keystr(key): on_host(leaf) for key, leaf in leaves}


def from_paths(
    prefix: str, like: PyTree, arrays: dict[str, np.ndarray], shapes: bool = True
) -> PyTree[np.ndarray]:
    """The inverse: a tree of the structure of `like`, whose leaves are arrays or their
    shapes; without `shapes`, these need not agree. Raises `ValueError`."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like)
    names = [prefix + jax.tree_util.keystr(key) for key, _ in paths]
    found = {k: (v.shape, v.dtype) for k, v in arrays.items() if k.startswith(prefix)}
    wanted = {
        name: (leaf.shape, leaf.dtype)
        for name, (_, leaf) in zip(names, paths, strict=True)
    }
    if found != wanted and (shapes or found.keys() != wanted.keys()):
        raise ValueError(f"it has the arrays {found}, not {wanted}.")
    return jax.tree.unflatten(treedef, [arrays[name] for name in names])
