"""Short runs of `train` and `predict` that several files of tests repeat."""

import jax
import jax.numpy as jnp
import numpy as np

import centralflow as cf

from .problems import tiny_loss, tiny_network

STEPS = 30
KEPT = dict(weight_times=[7, 20], coordinates=[0, 3])
METRICS = dict(norm=lambda m: jnp.sum(m["A"] ** 2))
MEASURED = dict(sharpness_every=5, sharpness_count=2)


def problem(dtype=jnp.float32):
    model, data = tiny_network(dtype)
    optimizer = cf.RMSProp(0.02, 0.9, 1e-6, bias_correction=True)
    return dict(
        objective=cf.Objective(tiny_loss, data),
        model=model,
        optimizer=optimizer,
        steps=STEPS,
        metrics=METRICS,
        **KEPT,
    )


def run(fn, **changes):
    """A run of `train`, or of the flow that is quickest to compile."""
    chosen = MEASURED if fn is cf.train else dict(flow=cf.StableFlow(), times=[0.5, 30])
    return fn(**(problem() | chosen | changes))


def assert_same(found, wanted):
    """Bit by bit; but it may have taken another time."""
    for name in vars(wanted):
        if name not in ("stats", "result"):
            a, b = (jax.tree.leaves(getattr(x, name)) for x in (found, wanted))
            assert len(a) == len(b), name
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y, err_msg=name)
    assert found.result == wanted.result
    for name, value in wanted.stats.items():
        assert "seconds" in name or found.stats[name] == value, name
