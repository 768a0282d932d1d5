"""CIFAR-10 from files that are missing, damaged or malicious."""

import gzip
import os
import pickle
import tarfile

import numpy as np
import pytest

import centralflow as cf

from .cifar10_files import (
    examples,
    official_files,
    python2,
    python3,
    write_archive,
    write_folder,
)


@pytest.mark.parametrize("version", ["binary", python2])
def test_cifar10_one_missing_file(tmp_path, version):
    files = official_files(version)
    (missing,) = [name for name in files if "data_batch_3" in name]
    del files[missing]
    path = write_archive(tmp_path, files)
    message = f"no `{missing.split('/')[1]}` in `{path}`.* https://www.cs.toronto.edu"
    with pytest.raises(FileNotFoundError, match=message):
        cf.data.cifar10(path)


def test_cifar10_no_files(tmp_path):
    for path in (tmp_path, tmp_path / "none", write_archive(tmp_path, {})):
        message = f"There is no .*`{path}`.* https://www.cs.toronto.edu"
        with pytest.raises(FileNotFoundError, match=message):
            cf.data.cifar10(path)


def test_archives_write_nothing_and_follow_no_links(tmp_path):
    files = official_files("binary")
    test = files["cifar-10-batches-bin/test_batch.bin"]
    path = write_archive(tmp_path, {"../../test_batch.bin": test})
    before = sorted(tmp_path.parent.rglob("*"))
    assert len(cf.data.cifar10(path, split="test")[0]) == 12
    assert sorted(tmp_path.parent.rglob("*")) == before

    write_folder(tmp_path, {"secret": test})
    link = tarfile.TarInfo("test_batch.bin")
    link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret")
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(link)
    with pytest.raises(FileNotFoundError, match="no `test_batch`"):
        cf.data.cifar10(path, split="test")


class _MakeFolder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_is_executed(tmp_path):
    pixels, labels = examples("test_batch")
    created = tmp_path / "created"
    content = python3(
        {b"data": pixels, b"labels": labels.tolist(), b"more": _MakeFolder(created)}
    )
    path = write_folder(tmp_path / "files", {"test_batch": content})
    message = r"`test_batch` in .* refers to `posix.mkdir`.* not executed"
    with pytest.raises(ValueError, match=message):
        cf.data.cifar10(path, split="test")
    assert not created.exists()
    pickle.loads(content)  # would have
    assert created.exists()


@pytest.mark.parametrize(
    "name",
    ["__builtin__ eval", "builtins getattr", "os system", "numpy load", "numpy.f2py x"],
)
def test_other_names_are_refused(tmp_path, name):
    module, attribute = name.split()
    call = f"c{module}\n{attribute}\n(S'1'\ntR.".encode()
    (tmp_path / "test_batch").write_bytes(call)
    with pytest.raises(ValueError, match=f"refers to `{module}.{attribute}`"):
        cf.data.cifar10(tmp_path, split="test")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"c_codecs\nencode\n(V1\nVrot13\ntR.",
        python2({b"data": np.zeros((2, 3072), np.uint8)}),
        python2({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}),
        python2({b"data": np.zeros((2, 3071), np.uint8), b"labels": [1, 2]}),
        python2({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
        python2({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 10]}),
        python2({b"data": np.zeros((1, 3072), np.uint8), b"labels": [b"1"]}),
        python2({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}),
        python2({b"data": np.zeros(1, object), b"labels": [1]}),
        python2([1, 2]),
        official_files(python2)["cifar-10-batches-py/test_batch"][:-5000],
        # A shape with more entries than there are.
        python2({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1] * 9}).replace(
            b"K\x02M\x00\x0c", b"K\x09M\x00\x0c"
        ),
    ],
)
def test_damaged_pickles(tmp_path, content):
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=f"`test_batch` in `{tmp_path}`"):
        cf.data.cifar10(tmp_path, split="test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes"),
        (b"\0" * 6145, "has 6145 bytes, not a multiple of 3073"),
        (b"\x0a" * 3073, "has the label 10"),
    ],
)
def test_damaged_binaries(tmp_path, content, message):
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"`test_batch.bin` in .* {message}"):
        cf.data.cifar10(tmp_path, split="test")


@pytest.mark.parametrize("damage", ["truncated", "altered", "no archive", "no tar"])
def test_damaged_archives(tmp_path, damage):
    path = write_archive(tmp_path, official_files("binary"))
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "altered": content[:middle] + b"\xff" * 99 + content[middle + 99 :],
            "no archive": b"<html>",
            "no tar": gzip.compress(b"<html>" * 1000),
        }[damage]
    )
    with pytest.raises(ValueError, match=f"`{path}` is damaged or no .tar.gz"):
        cf.data.cifar10(path)
