"""The memory that a prediction needs, next to a formula.

    python -m benchmarks.memory             # what XLA plans, without running anything
    python -m benchmarks.memory --measure   # and what a process takes, at the smallest n

Of the compiled integration XLA says how much memory it takes for its arguments, its
results and in between. In units of a vector of n numbers that is compared with

    VECTORS,

which docs/numerics.md derives. Networks of a million and ten million parameters, with
64 examples, so that the vectors outweigh the activations. Takes about four minutes.
"""

import argparse
import importlib
import resource
import subprocess
import sys
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import centralflow as cf

from .report import heading, table

# The functions that `predict` runs, of which the second has nearly all the work.
predict = importlib.import_module("centralflow.predict")

OPTIMIZERS = dict(
    GradientDescent=cf.GradientDescent(0.1), RMSProp=cf.RMSProp(1e-3, 0.99, 1e-8)
)


def vectors(k: int, state: int) -> int:
    """How many vectors of n numbers are alive at once, for blocks of k eigenvectors and
    an optimizer state of so many vectors."""
    raise NotImplementedError


def problem(width: int, microbatch: int | None) -> tuple[cf.Objective, Any]:
    keys = jr.split(jr.key(0), 3)
    data = (jr.normal(keys[0], (64, 64)), jr.normal(keys[1], (64, 10)))
    objective = cf.Objective(
        cf.losses.squared_error, data, microbatch_size=microbatch
    )
    return objective, cf.models.MLP(64, 10, width, key=keys[2])


def planned(width: int, k: int, microbatch: int | None, name: str) -> tuple[int, float]:
    """The number of parameters, and XLA's peak in vectors."""
    optimizer = OPTIMIZERS[name]
    objective, model = problem(width, microbatch)
    w, flat = objective.flatten(model)
    flow = cf.CentralFlow(block_size=k)
    rtol = jnp.asarray(flow.tolerance(None), w.dtype)
    p = predict._Problem(flow, flat, optimizer, {}, jnp.zeros(0, jnp.int32), rtol)
    y = eqx.filter_eval_shape(predict._first, p, w, optimizer.init(w))
    state = eqx.filter_eval_shape(predict._start, p, y, None)
    time = lambda *t: jnp.asarray(t, w.dtype)
    times = (time(0.0)[0], time(100.0)[0], jnp.arange(101.0), time(0.0, 100.0))
    arguments = (p, state, *times, diffrax.NoProgressMeter())
    is_array = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    dynamic, static = eqx.partition(arguments, is_array)

    def integrate(dynamic):
        part = predict._integrate.__wrapped__(*eqx.combine(dynamic, static))
        return eqx.filter(part, eqx.is_array)

    plan = jax.jit(integrate).lower(dynamic).compile().memory_analysis()
    total = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )
    return w.size, total / (w.size * w.dtype.itemsize)


def measured(width: int, k: int, microbatch: int | None, name: str) -> float:
    """The peak of a process that predicts five steps, in vectors, less what it has
    before."""
    arguments = [str(width), str(k), str(microbatch or 0), name]
    command = [sys.executable, "-m", "benchmarks.memory", "--one", *arguments]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(found.stdout.split()[-1])


def one(width: int, k: int, microbatch: int, name: str) -> None:
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Compilation takes memory too: that of the same program for a small network.
    for small in (16, width):
        objective, model = problem(small, microbatch or None)
        w, _ = objective.flatten(model)
        before = peak()
        cf.predict(
            objective, model, OPTIMIZERS[name], 5, flow=cf.CentralFlow(block_size=k)
        )
    print((peak() - before) / (w.size * w.dtype.itemsize))
