"""Saving and loading."""

import json
from importlib.metadata import version

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .problems import tiny_loss, tiny_network


@pytest.fixture(scope="module")
def run():
    model, data = tiny_network(jnp.float32)
    metrics = {"norm": lambda m: jnp.sum(m["b"] ** 2), "C": lambda m: m["C"]}
    objective = cf.Objective(tiny_loss, data)
    return cf.train(objective, model, cf.GradientDescent(0.1), 12, metrics=metrics)


def test_round_trip(run, tmp_path):
    run.save(tmp_path / "run.npz")
    loaded = cf.Trajectory.load(
        tmp_path / "run.npz", model=run.model, optimizer_state=run.optimizer_state
    )
    for name in ("times", "loss", "mean_loss", "sharpness", "weights", "weight_times"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(run, name))
    assert eqx.tree_equal(loaded.model, run.model)
    assert eqx.tree_equal(loaded.optimizer_state, run.optimizer_state)
    assert eqx.tree_equal(loaded.metrics, run.metrics)
    assert loaded.result == cf.RESULTS.successful
    assert loaded.stats == {k: np.asarray(v).item() for k, v in run.stats.items()}
    assert str(loaded) == str(run)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]  # nothing temporary left


def test_types_that_numpy_does_not_know(run, tmp_path):
    A = run.model["A"].astype(jnp.bfloat16)
    small = eqx.tree_at(lambda r: r.model["A"], run, A)
    small.save(tmp_path / "run.npz")
    loaded = cf.Trajectory.load(tmp_path / "run.npz", model=small.model)
    assert loaded.model["A"].dtype == jnp.bfloat16
    assert eqx.tree_equal(loaded.model, small.model)


@pytest.mark.parametrize(
    ("missing", "change"),
    [("loss", {}), ("metrics1", {}), ("", dict(result="promote")), ("", dict(stats=3))],
)
def test_load_refuses_incomplete_files(run, missing, change, tmp_path):
    """And says which version wrote them."""
    path = tmp_path / "run.npz"
    run.save(path)
    with np.load(path) as file:
        arrays = {k: v for k, v in file.items() if k != missing}
    header = json.loads(str(arrays["header"]))
    assert header["version"] == version("centralflow")
    arrays["header"] = np.array(json.dumps(header | change))
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"`path`: .*centralflow \d.*not a trajectory"):
        cf.Trajectory.load(path)


def test_load_without_a_model(run, tmp_path):
    run.save(tmp_path / "run.npz")
    loaded = cf.Trajectory.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(loaded.model["['A']"], run.model["A"])


def test_load_refuses_other_files(run, tmp_path):
    path = tmp_path / "run.npz"
    with pytest.raises(FileNotFoundError):
        cf.Trajectory.load(path)
    path.write_bytes(b"not a zip file")
    with pytest.raises(ValueError, match="not a trajectory"):
        cf.Trajectory.load(path)
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match="not a trajectory"):
        cf.Trajectory.load(path)
    np.savez(path, header=np.array([{"pickled": "object"}], dtype=object))
    with pytest.raises(ValueError, match="not a trajectory"):
        cf.Trajectory.load(path)
    np.savez(path, header=np.array(json.dumps({"format": "centralflow trajectory 99"})))
    with pytest.raises(ValueError, match="trajectory 99"):
        cf.Trajectory.load(path)
    header = dict(format="centralflow trajectory 99", version="9.8.7")
    np.savez(path, header=np.array(json.dumps(header)))
    with pytest.raises(ValueError, match=r"`path`.*written by centralflow 9\.8\.7"):
        cf.Trajectory.load(path)
    run.save(path)
    with pytest.raises(ValueError, match="`model` does not fit"):
        cf.Trajectory.load(path, model=dict(A=jnp.zeros((2, 2))))
