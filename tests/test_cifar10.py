"""CIFAR-10 from small files of its formats."""

import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .cifar10_files import (
    NAMES,
    expected,
    official_files,
    python2,
    python3,
    write_archive,
    write_folder,
    write_unzipped_archive,
)


def _check(data, other_data):
    for array, other in zip(data, other_data, strict=True):
        assert array.shape == other.shape
        assert array.dtype == jnp.result_type(float)
        np.testing.assert_allclose(array, other, rtol=1e-5, atol=1e-6)  # float32


@pytest.mark.parametrize("write", [write_folder, write_archive, write_unzipped_archive])
@pytest.mark.parametrize("version", ["binary", python2, python3])
def test_cifar10_reads_every_version(tmp_path, version, write):
    path = write(tmp_path, official_files(version))
    before = sorted(tmp_path.rglob("*"))
    _check(cf.data.cifar10(path), expected(NAMES[:5]))
    _check(cf.data.cifar10(str(path), split="test"), expected(NAMES[5:]))
    assert sorted(tmp_path.rglob("*")) == before  # nothing was unpacked
    if write is write_folder:
        (inside,) = tmp_path.iterdir()
        _check(cf.data.cifar10(inside), expected(NAMES[:5]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("cifar"), official_files("binary"))


@pytest.mark.parametrize(
    ("arguments", "labels", "size"),
    [
        (dict(size=7), range(10), 7),
        (dict(classes=3), range(3), None),
        (dict(classes=[7, 2], size=5), [7, 2], 5),
    ],
)
def test_cifar10_subsets(folder, arguments, labels, size):
    data = cf.data.cifar10(folder, **arguments)
    _check(data, expected(NAMES[:5], labels, size))


@pytest.mark.usefixtures("x64")
def test_double_precision(folder):
    images, labels = cf.data.cifar10(folder, 2)
    assert images.dtype == labels.dtype == jnp.float64
    np.testing.assert_allclose(images, expected(NAMES[:5], size=2)[0], rtol=1e-12)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(size=0), "`size` must be a positive integer, got 0"),
        (dict(size=True), "`size` must be a positive integer, got True"),
        (dict(size=61), "60 train images .* too few for `size` 61"),
        (dict(split="valid"), "`split` must be .* got 'valid'"),
        (dict(classes=0), "`classes` must be .* got 0"),
        (dict(classes=11), "`classes` must be .* got 11"),
        (dict(classes=[]), r"`classes` must be .* got \[\]"),
        (dict(classes=[1, 1]), r"`classes` must be .* got \[1, 1\]"),
        (dict(classes=[1, 10]), r"`classes` must be .* got \[1, 10\]"),
        (dict(classes=[1.0]), r"`classes` must be .* got \[1.0\]"),
    ],
)
def test_cifar10_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        cf.data.cifar10(folder, **arguments)
