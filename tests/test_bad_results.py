"""What a caller gets wrong about results, files, losses, data and models: as
`test_bad_input.py`."""

import dataclasses
import json
import zipfile
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .test_compare import _trajectory

# As users run it, without the checks of types that the tests install.
pytestmark = pytest.mark.usefixtures("untyped")

KEY = jax.random.key(0)
NAN, INF = float("nan"), float("inf")


# Trajectories.

TIMES = np.arange(11.0)
RUN = _trajectory(TIMES, np.exp(-TIMES))
OTHER = _trajectory(TIMES, np.exp(-TIMES), weights=((0.0,) * 3, (1.0,) * 3))
HALF = _trajectory(TIMES / 2, np.exp(-TIMES))
BATCH = jax.tree.map(
    lambda x: jnp.stack([x, x]) if eqx.is_array(x) else x,
    dataclasses.replace(RUN, result=None),
)
_BATCH = r"`jax.tree.map\(lambda x: x\[i\]"
comparison = cf.plot.comparison

TRAJECTORIES = {
    "run is None": (lambda: cf.compare(None, RUN), "`run` must be a Trajectory.* None"),
    "batch of runs": (lambda: cf.compare(BATCH, RUN), f"`run` .*{_BATCH}"),
    "batch of predictions": (
        lambda: cf.compare(RUN, BATCH),
        f"`prediction` .*{_BATCH}",
    ),
    "run at half steps": (
        lambda: cf.compare(HALF, RUN),
        "`run` must be reported at whole steps",
    ),
    "nothing in common": (
        lambda: cf.compare(RUN, _trajectory(TIMES + 20, np.exp(-TIMES))),
        "`run` covers steps 0 to 10 and `prediction` 20 to 30",
    ),
    "window is True": (lambda: cf.compare(RUN, RUN, window=True), "`window` .* True"),
    "window is zero": (lambda: cf.compare(RUN, RUN, window=0), "`window` .* got 0"),
    "window is 4.0": (lambda: cf.compare(RUN, RUN, window=4.0), "`window` .* got 4.0"),
    "average of a matrix": (
        lambda: cf.time_average(np.ones((3, 3)), 2),
        r"`values` must be .* \[T\], got .* \(3, 3\)",
    ),
    "average of text": (lambda: cf.time_average("abc", 2), "`values` must be"),
    "negative window": (
        lambda: cf.time_average(TIMES, -3),
        "`window` must be a positive integer, got -3",
    ),
    "infinite window": (lambda: cf.time_average(TIMES, INF), "`window` .* got inf"),
    "figure of nothing": (lambda: comparison(None, RUN), "`run` must be a Trajectory"),
    "figure of numbers": (lambda: comparison(RUN, 3.0), "`prediction` must be .* 3.0"),
    "figure of a batch": (lambda: comparison(RUN, BATCH), f"`prediction` .*{_BATCH}"),
    "stable is a flow": (
        lambda: comparison(RUN, RUN, stable=cf.StableFlow()),
        "`stable` must be a Trajectory",
    ),
    "figure of other models": (
        lambda: comparison(RUN, OTHER),
        "`run` has 2 parameters and `prediction` 3",
    ),
    "stable of another model": (
        lambda: comparison(RUN, RUN, stable=OTHER),
        "`run` has 2 parameters and `stable` 3",
    ),
    "window of a figure": (
        lambda: comparison(RUN, RUN, window=-1),
        "`window` must be a positive integer, got -1",
    ),
    "a list of runs": (
        lambda: cf.plot.loss([RUN, RUN]),
        r"`trajectories\[0\]` must be a Trajectory",
    ),
    "losses of a batch": (
        lambda: cf.plot.loss(RUN, BATCH),
        rf"`trajectories\[1\]` .*{_BATCH}",
    ),
    "labels are a number": (lambda: cf.plot.loss(RUN, labels=3), "`labels` .* got 3"),
    "one label too many": (
        lambda: cf.plot.loss(RUN, labels=["a", "b"]),
        "`labels` must name all 1",
    ),
}


# Losses, data, models.

BATCH_2 = (jnp.ones((3, 2)), jnp.ones((3, 2)))
moons, circles = partial(cf.data.moons, key=KEY), partial(cf.data.circles, key=KEY)
MLP = partial(cf.models.MLP, key=KEY)

LIBRARY = {
    "batch of one": (
        lambda: cf.losses.squared_error(jnp.sin, BATCH_2[:1]),
        r"`batch` must be \(inputs, targets\) or \(inputs, targets, mask\), .* 1",
    ),
    "batch is an array": (
        lambda: cf.losses.accuracy(jnp.sin, jnp.ones((3, 2))),
        "`batch` must be .* got ArrayImpl",
    ),
    "model is no function": (
        lambda: cf.losses.cross_entropy(dict(w=jnp.ones(2)), BATCH_2),
        "`model` must be callable, got dict",
    ),
    "model returns a pair": (
        lambda: cf.losses.squared_error(lambda x: (x, x), BATCH_2),
        "`model` must return one array .* got tuple",
    ),
    "model returns a number": (
        lambda: cf.losses.squared_error(jnp.sum, BATCH_2),
        r"`targets` .* got \(3,\) and \(3, 2\)",
    ),
    "targets are a list": (
        lambda: cf.losses.squared_error(jnp.sin, (BATCH_2[0], [1.0, 2.0, 3.0])),
        "`targets` must be an array, got list",
    ),
    "labels are not one-hot": (
        lambda: cf.losses.cross_entropy(jnp.sin, (BATCH_2[0], jnp.arange(3))),
        r"`targets` must have one shape.* got \(3, 2\) and \(3,\)",
    ),
    "other numbers of examples": (
        lambda: cf.losses.cross_entropy(jnp.sin, (BATCH_2[0], jnp.ones((4, 2)))),
        r"`targets` must have one shape.* got \(3, 2\) and \(4, 2\)",
    ),
    "digits of text": (lambda: cf.data.digits("all"), "`size` .* got 'all'"),
    "half a digit": (lambda: cf.data.digits(0.5), "`size` .* got 0.5"),
    "True digits": (lambda: cf.data.digits(True), "`size` .* got True"),
    "too many digits": (lambda: cf.data.digits(1798), "`size` .* 1797, got 1798"),
    "noise is text": (lambda: moons(4, "x"), "`noise` must be .* got 'x'"),
    "noise is infinite": (lambda: moons(4, INF), "`noise` must be .* got inf"),
    "size is infinite": (lambda: circles(INF), "`size` must be .* got inf"),
    "ratio is None": (lambda: circles(4, ratio=None), "`ratio` must be .* got None"),
    "key is a number": (
        lambda: cf.data.moons(4, key=3),
        r"`key` must be .*`jax.random.key\(0\)`, got 3",
    ),
    "keys of sorting": (
        lambda: cf.data.sorting(4, 3, 2, key=jax.random.split(KEY)),
        "`key` must be one",
    ),
    "length is True": (
        lambda: cf.data.copying(4, True, 2, key=KEY),
        "`length` must be .* got True",
    ),
    "features are NaN": (
        lambda: cf.data.random_classification(4, NAN, 2, key=KEY),
        "`features` must be .* got nan",
    ),
    "classes of CIFAR-10": (
        lambda: cf.data.cifar10("nowhere", classes=2.5),
        "`classes` must be .* got 2.5",
    ),
    "path of CIFAR-10": (lambda: cf.data.cifar10(None), "`path` must be .* got None"),
    "path of a text": (
        lambda: cf.data.text_classification(3.5),
        "`path` must be .* got 3.5",
    ),
    "no words": (
        lambda: cf.data.frequent_words("nowhere", 0),
        "`count` must be .* got 0",
    ),
    "no inputs": (lambda: MLP(0, 2), "`in_size` must be .* got 0"),
    "outputs are text": (lambda: MLP(2, "2"), "`out_size` must be .* got '2'"),
    "width is half": (lambda: MLP(2, 2, 0.5), "`width` must be .* got 0.5"),
    "depth is negative": (lambda: MLP(2, 2, depth=-1), "`depth` must be .* got -1"),
    "no key": (lambda: cf.models.MLP(2, 2, key=None), "`key` must be .* got None"),
    "key of a CNN": (
        lambda: cf.models.CNN((8, 8), 2, key="seed"),
        "`key` must be .* got 'seed'",
    ),
    "scale is text": (
        lambda: cf.models.Mamba(3, 2, last_scale="x", key=KEY),
        "`last_scale` must be .* got 'x'",
    ),
    "scale is NaN": (
        lambda: cf.models.LSTM(3, 2, last_scale=NAN, key=KEY),
        "`last_scale` must be .* got nan",
    ),
    "patches are zero": (
        lambda: cf.models.ViT((8, 8), 2, 0, key=KEY),
        "`patch_size` must be .* got 0",
    ),
    "shape is a number": (
        lambda: cf.models.ResNet(8, 2, key=KEY),
        r"`in_shape` must be \(height, width\) .* got 8",
    ),
    "heads are NaN": (
        lambda: cf.models.Transformer(3, 2, 4, heads=NAN, key=KEY),
        "`heads` must be .* got nan",
    ),
}

CALLS = TRAJECTORIES | LIBRARY


@pytest.mark.parametrize("name", CALLS)
def test_value_error(name):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


# Files.


def _zip(path, **entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


def _saved(path, edit):
    """A trajectory on disk, edited."""
    RUN.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays["header"]))
    edit(arrays, header)
    np.savez(path, **(arrays | dict(header=np.array(json.dumps(header)))))


def _one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


UNREADABLE = {
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(999)),
    "another zip": lambda path: _zip(path, letter="Dear Sir"),
    "header alone": lambda path: np.savez(path, header=np.array("[]")),
    "one array": _one_array,
    "a folder": lambda path: path.mkdir(),
    "cut short": lambda path: (
        RUN.save(path),
        path.write_bytes(path.read_bytes()[:-200]),
    ),
    "a series is missing": lambda path: _saved(path, lambda a, h: a.pop("loss")),
    "a metric is missing": lambda path: _saved(
        path, lambda a, h: h.update(metrics=["f"])
    ),
    "unknown result": lambda path: _saved(path, lambda a, h: h.update(result="fine")),
    "no result": lambda path: _saved(path, lambda a, h: h.pop("result")),
    "lengths that differ": lambda path: _saved(
        path, lambda a, h: a.update(loss=a["loss"][:-1])
    ),
    "text for numbers": lambda path: _saved(
        path, lambda a, h: a.update(loss=np.array(["a"] * 11))
    ),
}


@pytest.mark.parametrize("content", UNREADABLE)
def test_files_that_are_no_trajectory(content, tmp_path):
    path = tmp_path / "run.npz"
    UNREADABLE[content](path)
    with pytest.raises(ValueError, match=r"`path`: '.*run.npz'.* is not a trajectory"):
        cf.Trajectory.load(path)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path`: .*none.npz"):
        cf.Trajectory.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match="`path`: there is no folder"):
        RUN.save(tmp_path / "none" / "run.npz")
    with pytest.raises(IsADirectoryError, match=r"`path`: .* is a folder"):
        RUN.save(tmp_path)
    for path in (None, 3.5):
        for call in (cf.Trajectory.load, RUN.save):
            with pytest.raises(ValueError, match=f"`path` must be .* got {path}"):
                call(path)
    with pytest.raises(ValueError, match=f"batch of trajectories.*{_BATCH}"):
        BATCH.save(tmp_path / "batch.npz")
    with pytest.raises(FileNotFoundError, match="no file"):
        cf.data.text_classification(tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing temporary is left


def test_load_into_other_objects(tmp_path):
    RUN.save(tmp_path / "run.npz")
    for name in ("model", "optimizer_state"):
        with pytest.raises(ValueError, match=f"`{name}` does not fit the file"):
            cf.Trajectory.load(tmp_path / "run.npz", **{name: jnp.ones(3)})
