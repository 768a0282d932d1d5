"""Every model at the edge of stability, and how well its run is predicted.

    python -m benchmarks.models
    python -m benchmarks.models --model CNN LSTM --optimizer RMSProp

Small networks: images are 200 digits, sequences 200 of the sorting task. For each
model, optimizer and loss, rates are tried from small to large, each with a warm start,
until the largest eigenvalue of P^-1 H, once it has reached the critical value, is at
most 5 % below or above it in half of the measurements of the run, and at most 2 % above
at its start. Nothing of the prediction enters this choice. The run is then predicted
with the defaults of `CentralFlow` and of `StableFlow`. Failures are rows, too. Each row
is made in a process of its own, in one to four minutes on an idle machine. The table is
written to docs/models.md; its other rows are kept if they are of the same machine,
versions and settings.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

import centralflow as cf

from .report import machine, table_lines

EDGE, ABOVE, ENOUGH = 0.95, 1.02, 0.5
EVERY, COUNT = 10, 4  # of the measured eigenvalues
LENGTH, VOCABULARY = 4, 4  # of the sequences

_TOKENS = (VOCABULARY + 1, VOCABULARY + 1)
MODELS = {
    "MLP": lambda key: cf.models.MLP(64, 10, 24, key=key),
    "CNN": lambda key: cf.models.CNN((8, 8), 10, (6, 12), key=key),
    "ResNet": lambda key: cf.models.ResNet((8, 8), 10, (4, 8), groups=2, key=key),
    "ViT": lambda key: cf.models.ViT((8, 8), 10, 4, 12, 1, 2, key=key),
    "LSTM": lambda key: cf.models.LSTM(*_TOKENS, 16, key=key),
    "Transformer": lambda key: cf.models.Transformer(
        *_TOKENS, 2 * LENGTH, 12, 1, 2, key=key
    ),
    "Mamba": lambda key: cf.models.Mamba(*_TOKENS, 8, 1, 4, key=key),
}
IMAGES = ("MLP", "CNN", "ResNet", "ViT")
OPTIMIZERS = {
    "GD": cf.GradientDescent,
    "RMSProp": lambda rate: cf.RMSProp(rate, 0.99, 1e-7, bias_correction=True),
}
LOSSES = ("squared_error", "cross_entropy")
HEAD = [
    "model",
    "optimizer",
    "loss",
    "rate",
    "run at the edge",
    "largest eigenvalue of the run",
    "critical eigenvalues of the flow (mean, most)",
    "loss error: central, stable flow",
    "weight distance: central, stable flow",
    "top eigenvalue error",
    "gradient-equivalents per step",
    "remarks",
]


def rates(optimizer: str, objective: cf.Objective, model: Any) -> list[float]:
    """For gradient descent, around the rate at which the start is critical."""
    if optimizer == "RMSProp":
        return [1e-4 * 2**k for k in range(9)]
    plain = cf.GradientDescent(1.0)
    state = plain.init(objective.flatten(model)[0])
    first = float(cf.sharpness(objective, model, plain, state).values[0])
    return [2 / first * 2 ** (k / 2) for k in range(-7, 9)]


def find_edge(objective, model, optimizer, warm_start, steps, kept) -> dict:
    """The first rate whose run is at the edge; else the one that is there longest."""
    best = None
    for rate in rates(optimizer, objective, model):
        rule = OPTIMIZERS[optimizer](rate)
        warm = cf.train(objective, model, rule, warm_start, throw=False)
        if warm.result != cf.RESULTS.successful:
            break
        start = dict(optimizer_state=warm.optimizer_state, weight_times=kept)
        run = cf.train(
            objective,
            warm.model,
            rule,
            steps,
            **start,
            sharpness_every=EVERY,
            sharpness_count=COUNT,
            throw=False,
        )
        values = np.asarray(run.sharpness)[::EVERY, 0] / float(run.critical_sharpness)
        reached = np.fmax.accumulate(values) >= 1
        whole = run.result == cf.RESULTS.successful
        found = dict(
            rate=rate,
            rule=rule,
            model=warm.model,
            start=start,
            run=run,
            share=float(np.mean((values >= EDGE) & reached)),
            first=float(values[0]),
            largest=float(np.nanmax(values)),
        )
        found["rank"] = (whole, min(found["share"], ENOUGH), found["first"] <= ABOVE)
        if best is None or found["rank"] > best["rank"]:
            best = found
        if found["rank"] == (True, ENOUGH, True) or not whole:
            break
    if best is None:
        raise RuntimeError("the warm start diverges at every rate")
    return best


def measure(name: str, optimizer: str, loss: str, warm_start: int, steps: int) -> dict:
    data = (
        cf.data.digits(200)
        if name in IMAGES
        else cf.data.sorting(200, LENGTH, VOCABULARY, key=jax.random.key(1))
    )
    objective = cf.Objective(getattr(cf.losses, loss), data)
    model = MODELS[name](jax.random.key(0))
    kept = range(0, steps + 1, EVERY)
    edge = find_edge(objective, model, optimizer, warm_start, steps, kept)
    run, rule, start = edge["run"], edge["rule"], edge["start"]
    remarks = []
    if run.result != cf.RESULTS.successful:
        remarks.append(f"the run diverges at step {float(run.times[-1]):g}")
    if edge["share"] < ENOUGH:
        remarks.append("no rate of those tried is at the edge for half of the run")
    if edge["first"] > ABOVE:
        remarks.append(f"starts at {2 * edge['first']:.2f}")
    flows = []
    for kind in (cf.CentralFlow(), cf.StableFlow()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the start is remarked on above
            flow = cf.predict(
                objective, edge["model"], rule, steps, flow=kind, **start, throw=False
            )
        flows.append(flow)
        if flow.result != cf.RESULTS.successful:
            ends, which = float(flow.times[-1]), type(kind).__name__
            message = str(cf.RESULTS[flow.result]).split(".")[0]
            remarks.append(f"{which} ends at step {ends:g}: {message}")
    central = flows[0]
    if unconverged := int(central.stats["unconverged"]):
        remarks.append(f"{unconverged} solves unconverged")
    report, other = (cf.compare(run, flow) for flow in flows)
    sharpness = np.nan_to_num(np.asarray(central.sharpness))
    critical = np.sum(sharpness >= 0.99 * float(run.critical_sharpness), axis=1)
    return dict(
        rate=edge["rate"],
        share=edge["share"],
        largest=edge["largest"] * float(run.critical_sharpness),
        critical=(float(critical.mean()), int(critical.max())),
        loss=(report.loss_error, other.loss_error),
        distance=(report.weight_distance, other.weight_distance),
        sharpness=report.sharpness_error,
        work=float(central.gradient_equivalents) / steps,
        remarks="; ".join(remarks),
    )


def row(cell: tuple[str, str, str], m: dict) -> list[str]:
    name, optimizer, loss = cell
    names = [name, optimizer, loss.replace("_", " ").replace("cross e", "cross-e")]
    if "failure" in m:
        return [*names, *[""] * (len(HEAD) - 4), m["failure"]]
    percent = lambda x: "none" if math.isnan(x) else f"{100 * x:.3g} %"
    return [
        *names,
        f"{m['rate']:.3g}",
        percent(m["share"]),
        f"{m['largest']:.2f}",
        "{:.1f}, {}".format(*m["critical"]),
        ", ".join(map(percent, m["loss"])),
        ", ".join(map(percent, m["distance"])),
        percent(m["sharpness"]),
        f"{m['work']:.3g}",
        m["remarks"],
    ]


def in_a_process(cell: tuple[str, str, str], arguments: argparse.Namespace) -> dict:
    settings = [str(arguments.warm_start), str(arguments.steps)]
    command = [sys.executable, "-m", "benchmarks.models", "--cell", *cell, *settings]
    try:
        done = subprocess.run(
            command, timeout=arguments.limit, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        busy = f"{os.getloadavg()[0]:.1f}"
        return dict(failure=f"not finished in {arguments.limit:g} s, at load {busy}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return dict(failure=lines[-1].replace("|", "/")[:200])
    return json.loads(done.stdout.splitlines()[-1])


def page(rows: dict, arguments: argparse.Namespace) -> str:
    """The page, with the rows of an earlier one that are as these."""
    conditions = (
        f"{arguments.warm_start} steps of warm start, {arguments.steps} steps; "
        f"float32; {machine()}."
    )
    path = arguments.output
    if path.exists() and conditions in (text := path.read_text("utf-8")):
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if line.startswith("|") and cells[0] in MODELS and len(cells) == len(HEAD):
                rows = {tuple(cells[:3]): cells} | rows
    every = [tuple(row(cell, dict(failure=""))[:3]) for cell in cells_of()]
    missing = [" ".join(name) for name in every if name not in rows]
    return "\n".join(
        [
            INTRODUCTION,
            conditions,
            "",
            *table_lines(HEAD, [rows[name] for name in every if name in rows]),
            "",
            f"Not measured: {', '.join(missing) or 'none'}.",
            "",
            '??? note "benchmarks/models.py"',
            "",
            "    ```{ .py }",
            '    --8<-- "benchmarks/models.py"',
            "    ```",
            "",
        ]
    )


INTRODUCTION = """# Every model

What `python -m benchmarks.models` measures: small networks, on 200 digits the first
four and on 200 sequences of the sorting task the last three. A run is at the edge where
its largest eigenvalue has reached 2, the critical value, and is above 1.9. The rate is
the first of a grid, from small to large, with half of the run there and the start below
2.04; if there is none, that with the largest share, up to a half. The predictions do
not enter this choice. They are those of `CentralFlow` and of `StableFlow` with their
defaults. Errors are means over time, the weight distance that at the end over the
distance travelled, as of [`centralflow.Comparison`][]. Failures and large errors are
rows like the others.
"""


def cells_of(models=MODELS, optimizers=OPTIMIZERS, losses=LOSSES):
    return list(product(models, optimizers, losses))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS)
    )
    parser.add_argument("--loss", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--warm-start", type=int, default=100)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=float, default=900, help="seconds for a row")
    parser.add_argument("--output", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--cell", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        *cell, warm_start, steps = arguments.cell
        print(json.dumps(measure(*cell, int(warm_start), int(steps))))
        return
    rows = {}
    cells = cells_of(arguments.model, arguments.optimizer, arguments.loss)
    for cell in cells:
        cells_row = row(cell, in_a_process(cell, arguments))
        rows[tuple(cells_row[:3])] = cells_row
        arguments.output.write_text(page(rows, arguments), "utf-8")
        print(" | ".join(cells_row), flush=True)


if __name__ == "__main__":
    main()
