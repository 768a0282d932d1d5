"""`centralflow run`, `plot` and `compare`."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import centralflow as cf
from centralflow import running
from centralflow.__main__ import app
from centralflow.cli import problem, processes, settings, show, store

pytestmark = pytest.mark.usefixtures("full_precision")

TINY = ("--size", 30, "--test-size", 10, "--width", 5, "--learning-rate", 0.8)
SHORT = (*TINY, "--steps", 12, "--log-every", 2, "--checkpoint-every", 4)
SHORT = (*SHORT, "--eigenvalues", 2)
PROCESSES = {"discrete", "midpoint", "central", "stable"}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def read(folder):
    """All series of a run but the times, by their paths, and the attributes."""
    arrays = {}
    with h5py.File(folder / "results.h5") as file:
        keep = lambda name, x: (
            arrays.update({name: x[()]}) if isinstance(x, h5py.Dataset) else None
        )
        file.visititems(keep)
        attributes = dict(file.attrs)
    return {k: v for k, v in arrays.items() if "seconds" not in k}, attributes


def assert_same(folder, other):
    (found, attributes), (wanted, others) = read(folder), read(other)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert attributes == others


EVERY_STEP = ("--log-every", 1, "--eigenvalues-every", 2)
EVERY_STEP = (*EVERY_STEP, "--processes", "discrete,central,stable")
EVERY_STEP = (*EVERY_STEP, "--eigenvalues-of", "midpoint,discrete,stable")


@pytest.fixture(scope="module")
def logged_at_every_step(tmp_path_factory):
    """The run of `finished`, with eigenvalues of more processes."""
    folder = tmp_path_factory.mktemp("every")
    result = invoke("run", "--output", folder, *SHORT, *EVERY_STEP)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new" / "out"
    result = invoke("run", "--output", folder, *SHORT)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "it/s" not in result.stderr
    return folder, result


def test_what_is_logged(finished):
    folder, result = finished
    arrays, attributes = read(folder)
    assert attributes["status"] == "finished"
    assert attributes["critical_sharpness"] == 2
    logged = [0, 2, 4, 6, 8, 10, 12]
    for name in PROCESSES:
        np.testing.assert_array_equal(arrays[f"{name}/steps"], logged)
        for series in ("loss", "test_loss", "accuracy", "test_accuracy"):
            assert np.all(np.isfinite(arrays[f"{name}/{series}"]))
        assert arrays[f"{name}/loss"][-1] < 0.6 * arrays[f"{name}/loss"][0]
        assert np.all(arrays[f"{name}/grad_norm_sq"] > 0)
        assert arrays[f"{name}/outputs"].shape == (7, 3, 10)
        # All start in one place and stay closer together than they travel.
        travelled = arrays[f"distances/start-{name}"]
        assert travelled[0] == 0
        if name != "discrete":
            apart = arrays[f"distances/discrete-{name}"]
            assert np.all((apart[1:] > 0) & (apart[1:] < 0.5 * travelled[1:]))
    np.testing.assert_array_equal(arrays["discrete/every_step/steps"], range(13))
    np.testing.assert_array_equal(
        arrays["discrete/every_step/loss"][::2], arrays["discrete/loss"]
    )
    assert np.all(np.isfinite(arrays["discrete/sharpness"]))
    # It reaches the edge of stability.
    top = arrays["central/sharpness"][:, 0]
    np.testing.assert_allclose(top[:2], arrays["discrete/sharpness"][:2, 0], rtol=0.1)
    np.testing.assert_allclose(top[-2:], 2, rtol=0.05)
    for series in ("loss", "test_loss", "outputs"):
        plain, mean = arrays[f"central/{series}"], arrays[f"central/mean_{series}"]
        assert not np.allclose(mean[-1], plain[-1], rtol=1e-3)
        np.testing.assert_allclose(mean, plain, atol=0.1)
    figures = (
        f"{x}.{y}" for x in ("comparison", "loss", "metrics") for y in ("png", "pdf")
    )
    for file in figures:
        assert (folder / file).stat().st_size > 5000
        assert file in result.stdout
    config = json.loads((folder / "config.json").read_text())
    assert config["versions"]["jax"] == jax.__version__
    assert config["settings"]["width"] == 5
    assert config["settings"]["depth"] == 2  # the model's default


def test_series_are_those_of_the_library(finished):
    """The blocks make the run of `train`; midpoints and metrics are what they say."""
    arrays, _ = read(finished[0])
    images, labels = cf.data.digits(40)
    model = cf.models.MLP(64, 10, width=5, key=jax.random.key(0))
    objective = cf.Objective(cf.losses.squared_error, (images[:30], labels[:30]))
    optimizer = cf.GradientDescent(0.8)
    run = cf.train(objective, model, optimizer, 13, weight_times=range(14))
    _, flat = objective.flatten(model)
    near = dict(rtol=1e-3, atol=1e-5)
    losses = arrays["discrete/every_step/loss"]
    np.testing.assert_allclose(losses, run.loss[:13], **near)
    points = np.concatenate([run.weights[:1], cf.midpoints(run.weights)])[::2]
    assert len(points) == 7
    for i, w in enumerate(map(jnp.asarray, points)):
        here = flat.model(w)
        batch = (images[30:], labels[30:])
        for name, value in (
            ("loss", flat.loss(w)),
            ("grad_norm_sq", np.sum(np.square(flat.grad(w)))),
            ("accuracy", cf.losses.accuracy(here, (images[:30], labels[:30]))),
            ("test_loss", cf.losses.squared_error(here, batch)),
            ("test_accuracy", cf.losses.accuracy(here, batch)),
            ("outputs", jax.vmap(here)(images[:3])),
        ):
            np.testing.assert_allclose(arrays[f"midpoint/{name}"][i], value, **near)
        np.testing.assert_allclose(
            arrays["distances/start-midpoint"][i],
            np.linalg.norm(w - run.weights[0]),
            **near,
        )


def test_blocks_make_one_flow(finished):
    """A flow goes on after a block as if it had not stopped."""
    arrays, _ = read(finished[0])
    config = json.loads((finished[0] / "config.json").read_text())
    chosen = settings.from_json(config["settings"])
    built = problem.build(chosen)
    state = processes.initial_state(built.weights, jnp.zeros(()))
    for name in ("central", "stable"):
        times = [0, 3, 6, 9, 12] if name == "central" else [0, 6, 12]
        whole = processes._predict(name, built, chosen, state, times, [0, 6, 12])
        for series in ("loss", "mean_loss"):
            found = arrays[f"{name}/{series}"][::3]
            wanted = getattr(whole, series)[:: len(times) // 2]
            np.testing.assert_allclose(found, wanted, rtol=0.02)


class Stop(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("function", "calls"),
    [("write_checkpoint", 1), ("write_checkpoint", 3), ("write_results", 3)],
)
def test_resume(function, calls, finished, tmp_path, monkeypatch):
    """A run that is stopped right after the first files of checkpoints are written, or
    between the two files of one, goes on as if it had not been."""
    count = 0

    def stopping(write):
        def wrapped(*arguments):
            nonlocal count
            write(*arguments)
            count += 1
            if count == calls:
                raise Stop

        return wrapped

    owner, name = store, function
    if function == "write_results":
        owner, name = store.Log, "write"
    monkeypatch.setattr(owner, name, stopping(getattr(owner, name)))
    stopped = invoke("run", "--output", tmp_path, *SHORT)
    assert isinstance(stopped.exception, Stop)
    monkeypatch.undo()
    arrays, attributes = read(tmp_path)
    assert attributes["status"] == "running"
    if calls > 1:
        # Of an unfinished run.
        assert invoke("plot", tmp_path).exit_code == 0
    else:
        final, _ = read(finished[0])
        for name, values in arrays.items():
            # Without rows, and of the kind that they will be of.
            assert values.shape == (0, *final[name].shape[1:])
            assert values.dtype.kind == final[name].dtype.kind
        assert {f"{name}/test_loss" for name in PROCESSES} <= arrays.keys()
        for command in ("plot", "compare"):
            shown = invoke(command, tmp_path)
            assert (shown.exit_code, shown.stderr.count("\n")) == (2, 1)
            assert "first checkpoint" in shown.stderr
    assert invoke("run", "--output", tmp_path, *SHORT).exit_code == 2
    result = invoke("run", "--output", tmp_path, "--resume", "--steps", 12)
    assert result.exit_code == 0, result.stderr
    assert_same(tmp_path, finished[0])
    assert (tmp_path / "comparison.png").exists()


def test_ctrl_c(tmp_path, monkeypatch):
    """Nothing of an interrupted block is kept, and the rest can be made later."""
    arguments = (*SHORT, "--processes", "discrete", "--eigenvalues", 0)

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(running.Pace, "learn", interrupt)
        result = invoke("run", "--output", tmp_path, *arguments)
    assert (result.exit_code, result.stderr) == (130, "error: interrupted.\n")
    result = invoke("run", "--output", tmp_path, "--resume")
    assert result.exit_code == 0, result.stderr
    assert read(tmp_path)[1]["status"] == "finished"


def test_a_finished_run_is_kept(finished):
    folder, _ = finished
    before = (folder / "results.h5").read_bytes()
    result = invoke("run", "--output", folder, *SHORT)
    assert result.exit_code == 2
    assert "--overwrite" in result.stderr
    assert invoke("run", "--output", folder, "--resume").exit_code == 0
    assert (folder / "results.h5").read_bytes() == before


def test_resume_with_other_settings(finished):
    folder, _ = finished
    result = invoke("run", "--output", folder, "--resume", "--learning-rate", 0.2)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "--learning-rate" in result.stderr


def test_plot_and_compare(finished):
    folder, _ = finished
    for figure in folder.glob("*.p*"):
        figure.unlink()
    result = invoke("plot", folder)
    assert result.exit_code == 0, result.stderr
    assert (folder / "comparison.pdf").stat().st_size > 5000
    result = invoke("compare", folder)
    assert result.exit_code == 0, result.stderr
    tables = result.stdout.split("\n\n")
    assert tables[0].startswith("Central flow: prediction against run, 12 steps")
    assert tables[1].startswith("Stable flow: prediction against run, 12 steps")
    arrays, _ = read(folder)
    apart, whole = (
        arrays[f"distances/{pair}"][-1]
        for pair in ("discrete-stable", "start-discrete")
    )
    row = next(x for x in tables[1].splitlines() if "weight distance" in x)
    assert f"{100 * apart / whole:.3g} %" in row
    assert "window 2\n" in tables[1]  # the least
    result = invoke("compare", folder, "--window", 6)
    assert result.stdout.startswith(
        "Central flow: prediction against run, 12 steps, window 6\n"
    )
    result = invoke("compare", folder, "--window", 0)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "'--window': '0' is not" in result.stderr


def test_metrics_of_the_figure(finished):
    """At the logged steps, of a flow its averages; only those are drawn."""
    arrays, _ = read(finished[0])
    found = show.trajectories(store.Log.read(finished[0]))
    for name in ("central", "discrete"):
        series = found[name].metrics
        assert {"test loss", "accuracy", "test accuracy"} < series.keys()
        mean = "mean_" if name == "central" else ""
        for key, logged in (
            ("test loss", arrays[f"{name}/{mean}test_loss"]),
            ("outputs, example 2 of --watch", arrays[f"{name}/{mean}outputs"][:, 1]),
        ):
            np.testing.assert_array_equal(series[key][::2], logged)
            assert np.all(np.isnan(series[key][1::2]))


def test_what_is_compared_does_not_depend_on_what_is_logged(
    finished, logged_at_every_step
):
    """Averages are over optimizer steps, at each of which the losses are kept, whatever
    --log-every is: the same numbers but for the rounding errors of other programs."""
    some, every = (
        show.trajectories(store.Log.read(folder))
        for folder in (finished[0], logged_at_every_step)
    )
    for flow in ("central", "stable"):
        for window in (1, 4, None):  # without any average, too
            found, wanted = (
                cf.compare(runs["discrete"], runs[flow], window=window)
                for runs in (some, every)
            )
            assert (found.window, found.steps) == (wanted.window, wanted.steps)
            for name, value in dataclasses.asdict(wanted).items():
                if name == "seconds_ratio" or (flow, name[:3]) == ("stable", "sha"):
                    continue  # the eigenvalues of this one are known to one run only
                # Differences of numbers that agree to 1e-5, over twelve steps, or, of
                # the eigensolver, to the square of its residual, 1e-2.
                near = dict(rtol=1e-3, atol=2e-4, err_msg=f"{flow}, {name}")
                np.testing.assert_allclose(getattr(found, name), value, **near)


def test_eigenvalues_of_iterates_and_of_the_stable_flow(logged_at_every_step):
    """They are those of the Hessian, which there is small enough to write down."""
    arrays, _ = read(logged_at_every_step)
    model = cf.models.MLP(64, 10, width=5, key=jax.random.key(0))
    images, labels = cf.data.digits(30)
    objective = cf.Objective(cf.losses.squared_error, (images, labels))
    optimizer = cf.GradientDescent(0.8)
    run = cf.train(objective, model, optimizer, 12, weight_times=range(13))
    flow = cf.predict(
        objective, model, optimizer, 12, flow=cf.StableFlow(), weight_times=range(13)
    )
    _, flat = objective.flatten(model)
    for name, weights in (
        ("discrete/iterate_sharpness", run.weights),
        ("stable/sharpness", flow.weights),
    ):
        assert arrays[name].shape == (13, 2)
        measured = np.isfinite(arrays[name]).all(axis=1)
        np.testing.assert_array_equal(measured, np.arange(13) % 2 == 0)
        for step in (0, 6, 12):
            H = np.asarray(jax.jit(jax.hessian(flat.loss))(weights[step]))
            wanted = 0.8 * np.linalg.eigvalsh(H)[::-1][:2]
            # No farther off than the residual, 1e-2 of the largest, and what the flow,
            # here in one stretch, is integrated to, 1e-3.
            error = np.abs(arrays[name][step] - wanted)
            assert np.all(error < 1.2e-2 * wanted[0]), (name, step)


@pytest.mark.parametrize("command", ["plot", "compare"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_no_run(command, damage, finished, tmp_path):
    if damage == "cut":
        whole = (finished[0] / "results.h5").read_bytes()
        (tmp_path / "results.h5").write_bytes(whole[: len(whole) // 2])
    result = invoke(command, tmp_path)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "FOLDER" in result.stderr


def test_failure(tmp_path):
    arguments = (*SHORT, "--processes", "discrete", "--overwrite")
    options = ("--learning-rate", 60, "--eigenvalues", 0, "--steps", 400)
    arguments = (*arguments, *options, "--checkpoint-every", 200, "--test-size", 0)
    result = invoke("run", "--output", tmp_path, *arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: discrete: The run diverged")
    assert "results.h5" in result.stderr
    arrays, attributes = read(tmp_path)
    assert attributes["status"] == "failed"
    assert len(arrays["discrete/every_step/loss"]) > 2
    assert np.all(np.isfinite(arrays["discrete/every_step/loss"]))
    assert invoke("plot", tmp_path).exit_code == 0
    assert invoke("compare", tmp_path).exit_code == 2
    again = invoke("run", "--output", tmp_path, "--resume")
    assert again.exit_code == 1
    assert again.stderr == result.stderr


@pytest.mark.slow
def test_resume_after_a_kill(tmp_path):
    """A run that is killed at some moment leaves a file that can be read, and the rest
    of it gives the numbers of an unbroken one."""
    steps = (*TINY, "--steps", 995, "--log-every", 2, "--checkpoint-every", 10)
    command = [sys.executable, "-m", "centralflow", "run", *map(str, steps)]
    options = dict(
        cwd=Path(__file__).parents[1],
        env=os.environ | dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "cache")),
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*command, "--output", str(whole)], check=True, **options)
    process = subprocess.Popen([*command, "--output", str(broken)], **options)
    try:
        begun = False
        while not begun:
            assert process.poll() is None
            time.sleep(0.01)
            if (broken / "results.h5").exists():
                begun = len(read(broken)[0]["discrete/steps"]) > 0
        for _ in range(random.randint(1, 100)):
            time.sleep(0.03)
            read(broken)  # at any moment
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert read(broken)[1]["status"] == "running"
    command = [sys.executable, "-m", "centralflow", "run", "--output", str(broken)]
    subprocess.run([*command, "--resume"], check=True, **options)
    assert_same(broken, whole)
