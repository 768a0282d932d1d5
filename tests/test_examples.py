"""The examples, in short forms."""

import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf
from centralflow.optimizers.rmsprop import SecondMoment

pytestmark = pytest.mark.usefixtures("full_precision")

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {
    "cnn": dict(widths=(2,), size=20, learning_rate=0.05, warm_start=3, steps=12),
    "learning_rates": dict(
        width=5, size=30, rates=(0.02, 0.05), warm_start=3, steps=12
    ),
    "own_network": dict(width=5, size=30, learning_rate=0.1, warm_start=3, steps=12),
    "own_optimizer": dict(width=5, size=30, learning_rate=1e-3, warm_start=3, steps=12),
    "sorting_transformer": dict(
        width=2,
        size=10,
        length=2,
        vocabulary=2,
        learning_rate=0.05,
        warm_start=3,
        steps=12,
    ),
    "what_rmsprop_adapts_to": dict(width=5, size=30, warm_start=20, steps=12, every=6),
}


# These take a minute or more to compile.
SLOW = ("cnn", "sorting_transformer")


def _paths():
    for path in sorted(EXAMPLES.glob("*.py")):
        marks = [pytest.mark.slow] if path.stem in SLOW else []
        yield pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", list(_paths()))
def test_example(path, tmp_path):
    main = runpy.run_path(str(path))["main"]
    figure = tmp_path / "figure.png"
    main(**SHORT[path.stem], output=figure)
    assert figure.stat().st_size > 10_000


def test_the_optimizer_of_the_example_is_rmsprop():
    """With the power 1/2 and RMSProp's eps: the same runs and flows."""
    kind = runpy.run_path(str(EXAMPLES / "own_optimizer.py"))["PowerRMSProp"]
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(30))
    model = cf.models.MLP(64, 10, 5, key=jax.random.key(0))
    ours, theirs = kind(0.005, 0.9, 0.5, 1e-6), cf.RMSProp(0.005, 0.9, 1e-6)
    w, flat = objective.flatten(model)
    nu = flat.grad(w) ** 2
    starts = ((ours, nu), (theirs, SecondMoment(jnp.zeros(()), nu, jnp.zeros(()))))
    for fn in (cf.train, partial(cf.predict, flow=cf.StableFlow(), rtol=1e-5)):
        a, b = (fn(objective, model, o, 30, optimizer_state=s) for o, s in starts)
        np.testing.assert_allclose(a.loss, b.loss, rtol=3e-5)
        assert a.loss[-1] < 0.9 * a.loss[0]


def test_the_example_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (EXAMPLES.parent / "README.md").read_text()
    code = "".join(part.split("```")[0] for part in readme.split("```python")[1:])
    # Smaller, and below the edge from the first step, as the full one is after its 86.
    for long, short in (
        ("(1000)", "(20)"),
        ("=0.7", "=0.1"),
        ("steps=86", "steps=3"),
        ("=400", "=12"),
        ("=100", "=3"),
        ("=500", "=12"),
        ("100:", "2:"),
    ):
        assert long in code
        code = code.replace(long, short)
    exec(code, {})
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
