"""Checkpoints and interrupts of `train` and `predict`: nothing is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf
from centralflow import checkpoint, integrate, running
from centralflow.sharding import Processes

from .short_runs import STEPS, assert_same, problem, run


@pytest.fixture(scope="module", params=[cf.train, cf.predict], ids=["train", "predict"])
def unbroken(request):
    return request.param, run(request.param)


@pytest.fixture
def one_by_one(monkeypatch):
    """Only one step is handed to compiled code at once."""
    monkeypatch.setattr(running, "_CHUNK_SECONDS", 0.0)


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_at(monkeypatch, count, before):
    """Die at the writing of so many files: before the new one stands at the place of
    the old, or after."""
    write, written = os.replace, 0

    def replace(path, target):
        nonlocal written
        written += 1
        if written == count and before:
            raise Killed
        write(path, target)
        if written == count:
            raise Killed

    monkeypatch.setattr(Path, "replace", replace)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_goes_on_to_the_same_numbers(unbroken, count, before, tmp_path, monkeypatch):
    fn, wanted = unbroken
    path = tmp_path / "run.ckpt"
    arguments = dict(checkpoint=path, checkpoint_every=4)
    with monkeypatch.context() as patch:
        kill_at(patch, count, before)
        with pytest.raises(Killed):
            run(fn, **arguments)
    assert path.exists() == (count > 1 or not before)
    assert_same(run(fn, **arguments), wanted)
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_finished_run_is_read(unbroken, tmp_path, monkeypatch):
    fn, wanted = unbroken
    path = str(tmp_path / "run.ckpt")
    first = run(fn, checkpoint=path)
    assert_same(first, wanted)
    before = Path(path).read_bytes()

    def no_work(self, steps, seconds):
        raise AssertionError("no step may be made")

    monkeypatch.setattr(running.Pace, "learn", no_work)
    again = run(fn, checkpoint=path)
    assert_same(again, wanted)
    assert again.stats["seconds"] >= first.stats["seconds"]
    assert Path(path).read_bytes() == before


def test_a_stretch_keeps_the_rows_that_it_reached():
    """Not the memory of those that it did not, which is of the size of all."""
    reached = jnp.array([0.0, 1.0, jnp.inf, jnp.inf])
    (rows,) = integrate._saved(dict(t=reached, weights=jnp.zeros((4, 3))))
    assert {k: x.shape for k, x in rows.items()} == dict(t=(2,), weights=(2, 3))
    assert all(x.base is None for x in rows.values())


@pytest.mark.usefixtures("one_by_one")
def test_one_program(unbroken, tmp_path):
    """Neither pauses nor checkpoints make JAX compile anything."""
    fn, wanted = unbroken
    for folder in ("warm", "cold"):
        compiled = []
        listen = lambda event, *a, seen=compiled, **k: seen.append(event)
        jax.monitoring.register_event_duration_secs_listener(listen)
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "run.ckpt"
        assert_same(run(fn, checkpoint=path, checkpoint_every=1), wanted)
        jax.monitoring.unregister_event_duration_listener(listen)
    assert "/jax/core/compile/backend_compile_duration" not in compiled


def test_a_failed_run_stays_failed(tmp_path):
    objective = cf.Objective(lambda w: jnp.sum(w**4))
    for _ in range(2):
        with pytest.raises(cf.NumericalFailure, match=r"diverged.*at t = 3 .*at t = 2"):
            cf.train(
                objective, jnp.array([1.0, 2.0]), cf.GradientDescent(1.0), 1000,
                checkpoint=tmp_path / "run.ckpt",
            )  # fmt: skip


def test_a_file_that_cannot_be_written_is_an_error_at_once(monkeypatch, tmp_path):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    calls = []
    monkeypatch.setattr(running.Pace, "learn", lambda *arguments: calls.append(1))
    with pytest.raises(OSError, match="No space"):
        run(cf.train, checkpoint=tmp_path / "run.ckpt")
    assert len(calls) == 1


def test_by_default_it_is_written_now_and_then(monkeypatch, tmp_path):
    """Every half minute, or so that it takes a twentieth of the time."""
    now = 0.0
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now)

    def slow(*arguments):
        nonlocal now
        now += cost

    monkeypatch.setattr(checkpoint, "write_arrays", slow)
    for cost, wait in ((0.1, 30.0), (10.0, 200.0)):
        now, file = (
            0.0,
            checkpoint.Checkpoint(tmp_path / "x", None, False, Processes(()), dict),
        )
        assert file.due(0)
        file.write(0, {}, {})
        now = cost + wait
        assert not file.due(1)
        now += 0.1
        assert file.due(1)


def interrupt_after(monkeypatch, calls):
    """Ctrl-C, after so many pieces of work."""
    learn, made = running.Pace.learn, 0

    def wrapped(self, steps, seconds):
        nonlocal made
        learn(self, steps, seconds)
        made += 1
        if made == calls:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(running.Pace, "learn", wrapped)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("throw", [True, False])
def test_ctrl_c_returns_what_there_is(unbroken, throw, tmp_path, monkeypatch):
    fn, wanted = unbroken
    arguments = dict(checkpoint=tmp_path / "run.ckpt")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        with pytest.warns(cf.RunInterrupted, match="interrupted from the keyboard"):
            part = run(fn, throw=throw, **arguments)
    assert part.result == cf.RESULTS.interrupted
    count, kept = len(part.times), len(part.weight_times) - 1
    assert 1 <= count < len(wanted.times)
    np.testing.assert_array_equal(part.loss, wanted.loss[:count])
    np.testing.assert_array_equal(part.weights[:kept], wanted.weights[:kept])
    # Weights and model at the end are those of the last moment.
    last, _ = problem()["objective"].flatten(part.model)
    np.testing.assert_array_equal(part.weights[-1], last)
    assert part.weight_times[-1] >= part.times[-1]
    part.save(tmp_path / "part.npz")
    loaded = cf.Trajectory.load(tmp_path / "part.npz")
    assert loaded.result == cf.RESULTS.interrupted
    if fn is cf.train:
        assert part.times[-1] == part.weight_times[-1] == 11
        rest = run(
            fn,
            model=part.model,
            optimizer_state=part.optimizer_state,
            steps=STEPS - 11,
            weight_times=None,
        )
        np.testing.assert_array_equal(rest.loss, wanted.loss[11:])
    # And the same call goes on.
    assert_same(run(fn, **arguments), wanted)


@pytest.mark.parametrize("fn", [cf.train, cf.predict])
def test_ctrl_c_before_the_first_step(fn, monkeypatch):
    def interrupted(clock, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(running.Clock, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(fn)


def test_ctrl_c_as_an_error(monkeypatch):
    interrupt_after(monkeypatch, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", cf.RunInterrupted)
        with pytest.raises(cf.RunInterrupted):
            run(cf.train)


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize(
    "flow",
    [
        cf.CentralFlow(),
        # Two eigenvalues become critical, and one of them no longer fits.
        pytest.param(cf.CentralFlow(block_size=3), marks=pytest.mark.slow),
        pytest.param(cf.CentralFlow(3), marks=pytest.mark.slow),
    ],
    ids=["adaptive", "enlarged", "fixed"],
)
def test_the_central_flow_goes_on_to_the_same_numbers(flow, tmp_path, monkeypatch):
    """All that its steps depend on is in the file."""
    arguments = dict(flow=flow, times=[0.5, *range(3, STEPS)])
    monkeypatch.setattr(running, "_CHUNK_SECONDS", 1e9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it starts above the edge
        whole = run(cf.predict, **arguments)
        monkeypatch.setattr(running, "_CHUNK_SECONDS", 0.0)
        arguments |= dict(checkpoint=tmp_path / "run.ckpt", checkpoint_every=3)
        kills = 0
        while True:
            try:
                with monkeypatch.context() as patch:
                    kill_at(patch, 2 + kills % 3, kills % 2 == 0)
                    again = run(cf.predict, **arguments)
                break
            except Killed:
                kills += 1
    assert kills > 2
    assert_same(again, whole)
    if flow.block_size == 3:
        assert whole.sharpness.shape[1] > 3


def test_what_another_process_says(tmp_path, monkeypatch):
    """In place of another process, here alone (`test_sharding.py` has two real ones):
    that it sees no file, and that it could not write."""
    path = tmp_path / "run.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "agree", lambda self, x: False)
        with pytest.raises(ValueError, match=r"`checkpoint`: .* in some processes"):
            run(cf.train, checkpoint=path)
    assert not path.exists()
    run(cf.train, checkpoint=path)
    with monkeypatch.context() as patch:
        patch.setattr(Processes, "_all", lambda self, x: np.array([x, not x]))
        with pytest.raises(RuntimeError, match="Another of the processes failed"):
            run(cf.train, checkpoint=path)


SCRIPT = """
import sys, warnings
import jax.numpy as jnp
import centralflow as cf
from tests.problems import tiny_loss, tiny_network

function, steps, every, path, output = sys.argv[1:]
model, data = tiny_network(jnp.float32)
objective = cf.Objective(tiny_loss, data)
optimizer = cf.GradientDescent(0.2)
arguments = dict(steps=int(steps), progress=False)
if path:
    arguments |= dict(checkpoint=path, checkpoint_every=int(every))
if function == "train":
    run = cf.train(objective, model, optimizer, sharpness_every=100, **arguments)
else:
    run = cf.predict(objective, model, optimizer, flow=cf.CentralFlow(1), **arguments)
run.save(output)
"""


def progress(path):
    """How far the run in the file is, which can be read at any moment."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)  # each with its check sum
    return json.loads(str(arrays["header"]))["step"]


@pytest.mark.parametrize(
    ("function", "steps", "every", "kills"),
    [
        ("train", 40_000, 1000, 1),
        pytest.param("train", 400_000, 2000, 20, marks=pytest.mark.slow),
        pytest.param("predict", 12_000, 50, 20, marks=pytest.mark.slow),
    ],
)
def test_killed_again_and_again(function, steps, every, kills, tmp_path):
    """A run that is killed at any moment goes on, and ends as one that was not."""
    command = [sys.executable, "-c", SCRIPT, function, str(steps), str(every)]
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    # (JAX keeps no program that can raise an error from within.)
    environment = dict(
        PYTHONPATH=paths, JAX_COMPILATION_CACHE_DIR=cache, EQX_ON_ERROR="nan"
    )
    options = dict(cwd=root, env=os.environ | environment)
    folder = tmp_path / "run"
    folder.mkdir()
    path, last = folder / "run.ckpt", -1
    written = lambda: path.stat().st_mtime_ns if path.exists() else 0
    killed = 0
    for _ in range(kills):
        before = written()
        process = subprocess.Popen(
            [*command, str(path), str(folder / "out")], **options
        )
        try:
            while written() == before and process.poll() is None:
                time.sleep(0.002)
            time.sleep(random.uniform(0, 0.3))
        finally:
            killed += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        reached = progress(path)
        assert reached >= last
        last = reached
    assert killed > kills / 2
    subprocess.run([*command, str(path), str(folder / "out")], check=True, **options)
    subprocess.run([*command, "", str(tmp_path / "whole")], check=True, **options)
    found, wanted = (
        cf.Trajectory.load(x) for x in (folder / "out", tmp_path / "whole")
    )
    assert_same(found, wanted)
    assert {p.name for p in folder.iterdir()} == {"run.ckpt", "out"}
