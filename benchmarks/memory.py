"""The memory that a prediction needs, next to a formula.

    python -m benchmarks.memory                # what XLA plans, nothing is run
    python -m benchmarks.memory --measure 8    # and what a process takes, up to 8 GB

Of the compiled integration XLA says how much memory it takes for its arguments, its
results and in between. That, and on Linux the peak of a process that predicts a few
steps, or of the GPU that it uses, is compared with the formulas of docs/scale.md, in
vectors of n numbers. The process is run twice: so that all memory which is given back
is gone at once, and as it is, with what glibc keeps. Networks of a million and ten
million parameters, with 64 examples, so that the vectors outweigh the activations.
"""

import argparse
import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import centralflow as cf
from centralflow import integrate
from centralflow.solvers import Pause

from .report import heading, table

OPTIMIZERS = dict(
    GradientDescent=cf.GradientDescent(0.1), RMSProp=cf.RMSProp(1e-3, 0.99, 1e-8)
)


def vectors(k: int, state: int) -> int:
    """How many vectors of n numbers the compiled integration has at once, for blocks of
    k eigenvectors and an optimizer state of so many vectors."""
    critical = max(k - 2, 1)
    eigenvectors = 17 * k
    third = critical * (critical + 1) // 2
    response = third + 48 + 3 * k + 26
    turned = 3 * third + 3 * k + 26
    most = max(eigenvectors, response, turned)
    return 3 * carried(k, state) + 2 * state + 16 + most


def carried(k: int, state: int) -> int:
    """How many there are in the state of the solver."""
    critical = max(k - 2, 1)
    return 2 * k + critical * (critical + 1) // 2 + 24 + 4 * state


def besides(k: int, state: int) -> int:
    """How many more a process has: what matrix products need to rearrange blocks, and
    the start and the saved weights."""
    at_once = 2 if state else 1
    return at_once * (3 * k + 1) + 4 + state


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
    p = integrate.Problem(flow, flat, optimizer, {}, jnp.zeros(0, jnp.int32), rtol)
    end = jnp.asarray(100.0, w.dtype)
    begin = lambda *start: integrate._begin(p, *start, None, end, None)[0]
    now = eqx.filter_eval_shape(begin, w, optimizer.init(w))
    pause = Pause(jnp.int32(10), jnp.int32(100), end, end)
    arguments = (p, now, jnp.arange(101.0), jnp.array([0.0, 100.0]), pause)
    is_array = lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct)
    dynamic, static = eqx.partition(arguments, is_array)

    def stretch(dynamic):
        part = integrate._integrate.__wrapped__(*eqx.combine(dynamic, static))
        return eqx.filter(part, eqx.is_array)

    plan = jax.jit(stretch).lower(dynamic).compile().memory_analysis()
    total = (
        plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes
    )
    return w.size, total / (w.size * w.dtype.itemsize)


def measured(
    width: int, k: int, microbatch: int | None, name: str, **environment: str
) -> float:
    """The peak of a process that predicts five steps, in vectors, less what it has
    before."""
    arguments = [str(width), str(k), str(microbatch or 0), name]
    command = [sys.executable, "-m", "benchmarks.memory", "--one", *arguments]
    found = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    return float(found.stdout.split()[-1])


def one(width: int, k: int, microbatch: int, name: str) -> None:
    objective, model = problem(width, microbatch or None)
    n = objective.flatten(model)[0].size
    # To what tolerance does not matter here, but for the time that it takes.
    flow = cf.CentralFlow(block_size=k, eigen_tolerance=0.2)
    predict = lambda optimizer, most: cf.predict(
        objective, model, optimizer, 5, flow=flow, max_steps=most, throw=False
    )
    # One step, to compile, and to see where the edge is. Well below it the block need
    # not be enlarged.
    rate = lambda optimizer: optimizer.learning_rate
    scaled = lambda x: eqx.tree_at(rate, OPTIMIZERS[name], x * rate(OPTIMIZERS[name]))
    below = predict(scaled(jnp.float32(1)), 1)
    optimizer = scaled(0.5 * below.critical_sharpness / below.sharpness[0, 0])
    del below
    gc.collect()
    peak = peak_of_device if jax.devices()[0].memory_stats() else peak_of_process
    print(peak(lambda: predict(optimizer, 5)) / (4 * n))


def peak_of_process(fn: Callable) -> int:
    """In bytes, what it takes to call `fn` more than is taken now."""
    ctypes.CDLL(None).malloc_trim(0)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    fn()
    return 1024 * (kilobytes("VmHWM") - before)


def peak_of_device(fn: Callable) -> int:
    """Likewise on a GPU. The peak is that since the process began."""
    stats = jax.devices()[0].memory_stats
    before = stats()["bytes_in_use"]
    fn()
    return stats()["peak_bytes_in_use"] - before


def kilobytes(what: str) -> int:
    """An entry of the process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(what))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[970, 3120])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--measure", type=float, default=0, metavar="GB")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        *numbers, name = arguments.one
        return one(*map(int, numbers), name)
    least = arguments.widths[0]
    cases = [
        (width, k, None, "GradientDescent")
        for width in arguments.widths
        for k in arguments.blocks
    ]
    cases += [(least, 8, 16, "GradientDescent"), (least, 8, None, "RMSProp")]
    rows = []
    for width, k, microbatch, name in cases:
        n, peak = planned(width, k, microbatch, name)
        state = 1 if name == "RMSProp" else 0
        formula = vectors(k, state)
        bound = formula + besides(k, state)
        taken, kept, gigabytes = "-", "-", 4e-9 * n * bound
        if gigabytes <= arguments.measure:
            case = width, k, microbatch, name
            taken = f"{measured(*case, MALLOC_MMAP_THRESHOLD_='1000000'):.0f}"
            # It never keeps blocks of more than 32 MiB, as a single vector is.
            small = 4 * n < 2**25
            kept = f"{measured(*case):.0f}" if small else taken
        cells = [f"{n:,}", str(k), str(microbatch or "-"), name, f"{formula}"]
        cells += [f"{peak:.0f}", f"{bound}", taken, f"{gigabytes:.1f} GB"]
        rows.append([*cells, f"{bound + carried(k, state)}", kept])
        print(rows[-1], file=sys.stderr, flush=True)
    heading("Memory of a prediction, in vectors of n numbers")
    table(
        [
            "n",
            "block size",
            "microbatch",
            "optimizer",
            "formula of the plan",
            "planned by XLA",
            "formula of a process",
            "taken by a process",
            "in float32",
            "at most with glibc",
            "taken with glibc",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
