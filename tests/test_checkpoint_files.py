"""Which files a run goes on from, and which arguments are refused."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .problems import tiny_loss, tiny_network
from .short_runs import METRICS, assert_same, problem, run

_other = [
    (dict(steps=31), "steps"),
    (dict(optimizer=cf.RMSProp(0.02, 0.9, 2e-6, bias_correction=True)), "optimizer"),
    (dict(optimizer=cf.RMSProp(0.02, 0.9, 1e-6)), "optimizer"),
    (dict(optimizer=cf.RMSProp(lambda t: 0.02, 0.9, 1e-6, True)), "learning_rate"),
    (dict(optimizer=cf.GradientDescent(0.02)), "optimizer"),
    (dict(model=tiny_network(jnp.float32, seed=1)[0]), "model"),
    (dict(metrics=None), "metrics"),
    (dict(metrics=dict(other=METRICS["norm"])), "metrics"),
    (dict(weight_times=[7]), "weight_times"),
    (dict(coordinates=None), "coordinates"),
    (dict(objective=cf.Objective(tiny_loss, tiny_network(float, seed=2)[1])), "data"),
    (
        dict(
            objective=cf.Objective(
                lambda m, batch: 2 * tiny_loss(m, batch), problem()["objective"].data
            )
        ),
        "loss_fn",
    ),
]
_other_train = [
    (dict(sharpness_every=6), "sharpness_every"),
    (dict(sharpness_count=1), "sharpness_count"),
]
_other_predict = [
    (dict(times=[0.5, 29]), "times"),
    (dict(rtol=1e-4), "rtol"),
    (dict(flow=cf.CentralFlow(1)), "flow"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of each."""
    folder = tmp_path_factory.mktemp("files")
    paths = {fn: folder / fn.__name__ for fn in (cf.train, cf.predict)}
    for fn, path in paths.items():
        run(fn, checkpoint=path)
    return paths


@pytest.mark.parametrize(
    ("fn", "change", "name"),
    [(fn, *case) for fn in (cf.train, cf.predict) for case in _other]
    + [(cf.train, *case) for case in _other_train]
    + [(cf.predict, *case) for case in _other_predict],
)
def test_another_run_is_refused(files, fn, change, name):
    path = files[fn]
    before = path.read_bytes()
    message = rf"`checkpoint`.*centralflow \d.*another run, with other .*`{name}`"
    with pytest.raises(ValueError, match=message):
        run(fn, checkpoint=path, **change)
    assert path.read_bytes() == before


def test_the_other_function_is_refused(files):
    with pytest.raises(ValueError, match=r"`checkpoint`.*`function`"):
        run(cf.train, checkpoint=files[cf.predict])


@pytest.mark.parametrize("fn", [cf.train, cf.predict])
def test_smaller_microbatches_go_on(files, fn):
    wanted = run(fn)
    data = problem()["objective"].data
    objective = cf.Objective(tiny_loss, data, microbatch_size=4)
    assert_same(run(fn, objective=objective, checkpoint=files[fn]), wanted)


def test_the_same_schedule_goes_on(tmp_path):
    """Two functions that are the same are not the same object."""
    for _ in range(2):
        rate = lambda step: 0.02 / (1 + step)
        run(
            cf.train,
            optimizer=cf.GradientDescent(rate),
            checkpoint=tmp_path / "run.ckpt",
        )
    with pytest.raises(ValueError, match="`learning_rate`"):
        run(
            cf.train,
            optimizer=cf.GradientDescent(lambda step: 0.02 / (1.1 + step)),
            checkpoint=tmp_path / "run.ckpt",
        )


class _Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "npz", "npy", "cut", "text", "trajectory"])
def test_other_files_are_refused_and_nothing_in_them_runs(files, kind, tmp_path):
    path, made = tmp_path / "file", tmp_path / "made"
    pickled = np.array([_Payload(made)], dtype=object)
    with path.open("wb") as file:
        if kind == "pickle":
            pickle.dump(_Payload(made), file)
        elif kind == "npz":
            np.savez(file, header=pickled, loss=pickled)
        elif kind == "npy":
            np.save(file, pickled)
        elif kind == "cut":
            whole = files[cf.train].read_bytes()
            file.write(whole[: len(whole) // 2])
        elif kind == "text":
            file.write(b"loss,step\n1.0,1\n")
    if kind == "trajectory":
        run(cf.train).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"`checkpoint`: .*file'"):
        run(cf.train, checkpoint=path)
    if kind != "trajectory":
        with pytest.raises(ValueError, match=r"`path`: .*file'"):
            cf.Trajectory.load(path)
    assert not made.exists()
    assert path.read_bytes() == before
    if kind == "pickle":  # it would have
        pickle.loads(before)
        assert made.exists()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("fn", [cf.train, cf.predict])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(checkpoint=3), ValueError, "`checkpoint`.*3"),
        (dict(checkpoint="a/b"), FileNotFoundError, "`checkpoint`.*'a'"),
        (dict(checkpoint="."), IsADirectoryError, "`checkpoint`.* is a folder"),
        (dict(checkpoint_every=3), ValueError, "`checkpoint_every` is 3.*`checkpoint`"),
        (dict(checkpoint="a", checkpoint_every=0), ValueError, "`checkpoint_every`"),
        (dict(checkpoint="a", checkpoint_every=2.5), ValueError, "`checkpoint_every`"),
    ],
)
def test_bad_arguments(fn, arguments, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        run(fn, **arguments)


@pytest.mark.parametrize("fn", [cf.train, cf.predict])
def test_not_under_jit(fn, tmp_path):
    def loss(rate):
        optimizer = cf.GradientDescent(rate)
        return run(fn, optimizer=optimizer, checkpoint=tmp_path / "run.ckpt").loss

    with pytest.raises(ValueError, match=r"`checkpoint`.*`jax\.jit`"):
        jax.jit(loss)(0.1)
