"""Where the time of a prediction goes.

    python -m benchmarks.breakdown

Each piece of a long step is compiled and timed alone, with the weights and as many
vectors as the prediction has, and multiplied by how often it occurs, as counted in
`Trajectory.stats`. What is left of the wall time is 'other': vector operations on the
state and the observables, and what the pieces take longer for inside one large
program. All Hessian-vector products have the price of one in a block of six. What it
costs to report the state at every optimizer step is found by leaving that out. All
times are the shortest of several. Takes about two minutes. Writes out/breakdown.png.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from matplotlib.figure import Figure

from centralflow.eigen import top_eigenpairs
from centralflow.krylov import krylov
from centralflow.sdcp import solve_sdcp
from centralflow.solvers.rkc import polynomial, rkc2

from . import problems
from .report import heading, table

BLOCK, PRODUCTS = 8, 6


def seconds(fn: Callable, *args: Any, repeat: int = 30) -> float:
    """The shortest time of one call, compiled: others may use the machine, too."""
    fn = eqx.filter_jit(fn)
    jax.block_until_ready(fn(*args))
    samples = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        samples.append(time.perf_counter() - start)
    return min(samples)


def time_pieces(problem: problems.Problem, model: Any, critical: int) -> dict:
    """The seconds of one of each."""
    w, flat = problem.objective.flatten(model)
    V = jnp.linalg.qr(jr.normal(jr.key(0), (w.size, BLOCK), w.dtype))[0].T
    k, pairs = critical, critical * (critical + 1) // 2

    def rkc(f, w, R):
        slope = lambda w: -0.2 * f.grad(w)
        return rkc2(slope, w, slope(w), jnp.asarray(1.0, w.dtype), R)

    # Operators that cost next to nothing: what is left is the iteration itself.
    scale = jnp.linspace(0, 1, w.size, dtype=w.dtype)
    rows = lambda V, m: jnp.where(jnp.arange(len(V))[:, None] < m, V * scale, 0)
    eigen = lambda V: top_eigenpairs(
        rows, V, k + 2, k + 1, tolerance=0.0, max_sweeps=1, key=jr.key(1)
    )
    space = lambda v: krylov(lambda v: v * scale, v, PRODUCTS, PRODUCTS)
    # A of both signs, and B the Gram matrix of as many vectors as there are pairs
    D = jr.normal(jr.key(2), (BLOCK, BLOCK, 200), w.dtype)
    D = (D + D.transpose(1, 0, 2)) / 2
    A = jnp.diag(jnp.linspace(-1, 1, BLOCK, dtype=w.dtype))
    B = jnp.einsum("ijn,kln->ijkl", D, D) / 200
    used = jnp.arange(BLOCK) < k
    stages = jax.tree.map(jnp.asarray, polynomial(jnp.asarray(30.0, w.dtype))[0])
    s = int(stages.stages)
    return dict(
        gradient=seconds(lambda f, w: f.grad(w), flat, w),
        stage=seconds(rkc, flat, w, stages) / s,
        stages=s,
        hvp=seconds(lambda f, w, V: f.hvps(w, V, PRODUCTS), flat, w, V) / PRODUCTS,
        third=seconds(lambda f, w, V: f.thirds(w, V, k), flat, w, V) / max(pairs, 1),
        eigen=seconds(eigen, V),
        krylov=seconds(space, V[0]),
        sdcp=seconds(solve_sdcp, A, B, used),
    )


def draw(parts: dict[str, float], total: float) -> Figure:
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    names = list(parts)[::-1]
    shares = [100 * parts[name] / total for name in names]
    colors = ["#999999" if name == "other" else "C0" for name in names]
    bars = axes.barh(names, shares, color=colors)
    axes.bar_label(bars, [f"{x:.0f} %" for x in shares], padding=3, fontsize=8)
    axes.set_xlabel("share of the wall time of a prediction")
    axes.axvline(0, color="black", lw=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("gradient_descent", "many_critical", "rmsprop", "scalar_rmsprop")
    parser.add_argument("--problem", choices=names, default="gradient_descent")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--critical", type=int, help="default: the most there are")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("out/breakdown.png"))
    arguments = parser.parse_args()
    problem = getattr(problems, arguments.problem)()

    flow = problem.predict(arguments.steps)
    edge = 0.99 * float(flow.critical_sharpness)
    critical = arguments.critical or max(1, int((flow.sharpness > edge).sum(1).max()))
    one, walls = time_pieces(problem, flow.model, critical), []
    ends = []
    problem.predict(arguments.steps, times=[0, arguments.steps])
    for _ in range(arguments.repeat):
        silent = problem.predict(arguments.steps, times=[0, arguments.steps])
        flow = problem.predict(arguments.steps)
        ends.append(silent.stats["seconds"])
        walls.append(flow.stats["seconds"])
    total, stats = min(walls), flow.stats
    tried = int(stats["accepted_steps"] + stats["rejected_steps"])

    # name: seconds of one, and how many
    pieces = {
        "RKC stages (gradients)": (one["stage"], int(stats["gradients"])),
        "Hessian-vector products": (one["hvp"], int(stats["hvps"])),
        "third derivatives": (one["third"], int(stats["third_derivatives"])),
        "eigensolver, without products": (one["eigen"], tried),
        "Krylov space, without products": (one["krylov"], tried),
        "complementarity problem": (one["sdcp"], tried),
    }
    parts = {name: each * count for name, (each, count) in pieces.items()}
    parts["reports at every step"] = total - min(ends)
    parts["other"] = total - sum(parts.values())
    rows = [
        [
            name,
            *(
                [f"{1e3 * pieces[name][0]:.3f} ms", str(pieces[name][1])]
                if name in pieces
                else ["", ""]
            ),
            f"{part:.2f} s",
            f"{100 * part / total:.0f} %",
        ]
        for name, part in parts.items()
    ]
    rows.append(["prediction", "", "", f"{total:.2f} s", "100 %"])
    heading(
        f"{problem.name}, {arguments.steps:,} steps: {tried} steps of the flow tried, "
        f"pieces timed with {critical} critical eigenvalues"
    )
    table(["piece", "each", "times", "together", "share"], rows)
    ms = {name: f"{1e3 * one[name]:.3f} ms" for name in ("gradient", "hvp", "third")}
    print(
        f"\nA gradient alone takes {ms['gradient']}, in a step of {one['stages']} RKC "
        f"stages {1e3 * one['stage']:.3f} ms; a Hessian-vector product "
        f"{one['hvp'] / one['gradient']:.1f} and a third derivative "
        f"{one['third'] / one['gradient']:.1f} gradients."
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    draw(parts, total).savefig(arguments.output, dpi=150)


if __name__ == "__main__":
    main()
