"""The files of CIFAR-10: where they are and what they hold."""

import gzip
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from .plain_pickle import load_plain, uint8_array

FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
FOLDERS = ("cifar-10-batches-bin", "cifar-10-batches-py", ".")
PIXELS = 3 * 32 * 32  # the red plane, the green and the blue
SOURCE = "https://www.cs.toronto.edu/~kriz/cifar.html"


def read_examples(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The images `[N, 3072]` and the labels `[N]`, of type uint8, of a split."""
    binary = [f"{name}.bin" for name in FILES[split]]
    contents = _contents(path, {*binary, *FILES[split]})
    names, parse = (
        (binary, _binary) if contents.keys() & {*binary} else (FILES[split], _pickled)
    )
    for name in names:
        if name not in contents:
            raise _missing(f"`{name}` in `{path}`")
    parts = [parse(f"`{name}` in `{path}`", contents[name]) for name in names]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return images, labels


def _missing(what: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"There is no {what}. Download the binary version or the Python version of "
        f"CIFAR-10 from {SOURCE} and give the path of the archive, or of the folder "
        "that it is unpacked to."
    )


def _contents(path: Path, names: set[str]) -> dict[str, bytes]:
    """The contents of those of the named files that there are."""
    if path.is_dir():
        files = (path / folder / name for folder in FOLDERS for name in names)
        return {file.name: file.read_bytes() for file in files if file.is_file()}
    if not path.exists():
        raise _missing(f"`{path}`")
    contents = {}
    try:
        with path.open("rb") as start:
            zipped = start.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    # A member's folder is of no interest: nothing is written anywhere.
                    name = PurePosixPath(member.name).name
                    if name in names and member.isfile():
                        contents[name] = archive.extractfile(member).read()
            while file.read(2**20):  # the checksum is compared at the very end only
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"`{path}` is damaged or no .tar.gz or .tar archive ({error}): download it "
            f"again from {SOURCE}."
        ) from error
    return contents


def _binary(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    if not content or len(content) % (1 + PIXELS):
        raise ValueError(
            f"{where} has {len(content)} bytes, not a multiple of {1 + PIXELS}, which "
            "one label and one image have: it is truncated or something else."
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)
    images, labels = records[:, 1:], records[:, 0]
    if labels.max() > 9:
        raise ValueError(
            f"{where} is not of CIFAR-10's binary version: it has the label "
            f"{labels.max()}, and labels are at most 9."
        )
    return images, labels


def _pickled(where: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    match load_plain(where, content):
        case {b"data": data, b"labels": [_, *_] as labels}:
            images = uint8_array(data)
            valid = all(isinstance(x, int) and 0 <= x <= 9 for x in labels)
            if valid and np.shape(images) == (len(labels), PIXELS):
                return images, np.array(labels, np.uint8)
    raise ValueError(
        f"{where} is not of CIFAR-10's Python version: a dictionary with uint8 `data` "
        f"[N, {PIXELS}] and N `labels` from 0 to 9."
    )
