"""The command line."""

from importlib.metadata import version

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import centralflow as cf
import centralflow.__main__ as cli
from centralflow import integrate
from centralflow.cli import errors
from centralflow.flows.base import FlowState
from centralflow.trajectory import Trajectory


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_help():
    result = invoke("--help")
    assert result.exit_code == 0
    assert "demo" in result.stdout


def test_help_of_demo():
    result = invoke("demo", "--help")
    assert result.exit_code == 0
    assert "--learning-rate" in result.stdout


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout == f"centralflow {version('centralflow')}\n"


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ((), "command"),
        (("nonsense",), "nonsense"),
        (("--nonsense",), "--nonsense"),
        (("demo",), "--output"),
        (("demo", "--output", "{folder}", "--steps", 1), "--steps"),
        (("demo", "--output", "{folder}", "--steps", "many"), "--steps"),
        (("demo", "--output", "{folder}", "--learning-rate", 0), "--learning-rate"),
        (("demo", "--output", "{folder}", "--learning-rate", "nan"), "--learning-rate"),
        (("demo", "--output", "{folder}", "--size", 1798), "--size"),
        (("demo", "--output", "{folder}", "--substeps", 0), "--substeps"),
        (("demo", "--output", "{file}"), "--output"),
        (("demo", "--output", "{file}/folder"), "folder"),
    ],
)
def test_wrong_argument(arguments, cause, tmp_path):
    file = tmp_path / "file"
    file.touch()
    names = dict(folder=tmp_path / "folder", file=file)
    result = invoke(*[str(a).format(**names) for a in arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert cause in result.stderr
    assert not (tmp_path / "folder").exists()


def test_diverging_run(tmp_path):
    arguments = ("--learning-rate", 1e6, "--steps", 20, "--size", 10)
    result = invoke("demo", "--output", tmp_path, *arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: The run diverged")


@pytest.mark.filterwarnings("default")
def test_warnings_say_what_can_be_done_on_the_command_line(capsys):
    sharpness = dict(smooth=dict(sharpness=jnp.array([3.0])))
    y = FlowState(jnp.zeros(1), jnp.zeros(()), sharpness)
    with errors._short_warnings():
        integrate._warn_if_unstable(y, cf.GradientDescent(0.1))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: The sharpness at the start, 3, is above")
    assert line.endswith("Take another --warm-start, or lower the learning rate.")


def test_demo(tmp_path):
    output = tmp_path / "new" / "out"
    options = ("--steps", 12, "--size", 20, "--substeps", 1, "--no-progress")
    result = invoke("demo", "--output", output, *options)
    assert result.exit_code == 0, result.stderr
    assert "it/s" not in result.stderr
    table = (output / "comparison.txt").read_text(encoding="utf-8")
    assert result.stdout.startswith(table)
    for text in ("Central flow: prediction", "Stable flow: prediction", "compile s"):
        assert text in table
    for name in ("comparison.png", "comparison.pdf"):
        assert (output / name).stat().st_size > 10_000
        assert name in result.stdout
    for name in ("run", "central", "stable"):
        trajectory = Trajectory.load(output / f"{name}.npz")
        np.testing.assert_array_equal(trajectory.times, np.arange(13))
        np.testing.assert_array_equal(trajectory.weight_times, np.arange(13))
        assert f"{name}.npz" in result.stdout


def test_main(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["centralflow", "--version"])
    with pytest.raises(SystemExit) as info:
        cli.main()
    assert info.value.code in (None, 0)
    assert capsys.readouterr().out.startswith("centralflow ")
