"""The memory that a prediction needs, next to a formula.

    python -m benchmarks.memory             # what XLA plans, nothing is run
    python -m benchmarks.memory --measure   # and what a process takes, for the smallest

Of the compiled integration XLA says how much memory it takes for its arguments, its
results and in between. That is compared with the formula of docs/scale.md, in vectors
of n numbers. Networks of a million and ten million parameters, with
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
    critical = max(k - 2, 1)
    carried = 2 * k + 24 + 4 * state
    eigenvectors = 17 * k
    response = critical * (critical + 1) // 2 + 48 + 3 * k + 16
    return 3 * carried + 2 * state + 16 + max(eigenvectors, response)


def problem(width: int, microbatch: int | None) -> tuple[cf.Objective, Any]:
    keys = jr.split(jr.key(0), 3)
    data = (jr.normal(keys[0], (64, 64)), jr.normal(keys[1], (64, 10)))
    objective = cf.Objective(cf.losses.squared_error, data, microbatch_size=microbatch)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[970, 3120])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        *numbers, name = arguments.one
        return one(*map(int, numbers), name)
    smallest, *others = arguments.widths
    cases = [(smallest, k, None, "GradientDescent") for k in (4, 8, 16)]
    cases += [(smallest, 8, 16, "GradientDescent"), (smallest, 8, None, "RMSProp")]
    cases += [(width, 8, None, "GradientDescent") for width in others]
    rows = []
    for width, k, microbatch, name in cases:
        n, peak = planned(width, k, microbatch, name)
        formula = vectors(k, 1 if name == "RMSProp" else 0)
        taken = "-"
        if arguments.measure and width == smallest:
            taken = f"{measured(width, k, microbatch, name):.0f}"
        cells = [f"{n:,}", str(k), str(microbatch or "-"), name, f"{formula}"]
        rows.append([*cells, f"{peak:.0f}", f"{4e-9 * n * peak:.2f} GB", taken])
        print(rows[-1], file=sys.stderr, flush=True)
    heading("Memory of a prediction, in vectors of n numbers")
    table(
        [
            "n",
            "block size",
            "microbatch",
            "optimizer",
            "formula",
            "planned by XLA",
            "in float32",
            "taken by a process",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
