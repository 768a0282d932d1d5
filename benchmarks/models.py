"""Every model at the edge of stability, and how well its run is predicted.

    python -m benchmarks.models
    python -m benchmarks.models --model CNN LSTM --optimizer RMSProp

Small networks: images are digits, 1,000 for the MLP and 200 for the others, sequences
200 of the sorting task. For each model, optimizer and loss, rates of a coarse grid are
tried in a fixed order, from the middle one outwards, each in a run of up to four times
the steps to compare. It is at the edge where the largest eigenvalue of P^-1 H is from
0.95 to 1.25 of the critical value. A comparison may start at a measurement that is
within 2 % of the critical value, the edge having been held for 50 steps up to it: past
the first overshoot. The first rate and start are taken from which on the run is at the
edge in three quarters of the measurements; else those with the most. Nothing of the
prediction enters these choices. The run is then predicted with the defaults of
`CentralFlow` and of `StableFlow`, from the midpoint at the start, where the oscillation
cancels. Failures are rows, too. Each row is made in a process of its own, in one to two
minutes on one core, most of which is compilation. The table is written to
docs/models.md; its other rows are kept if they are of the same machine, versions and
settings.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np

import centralflow as cf

from .report import machine, table_lines

EDGE, NEAR, ENOUGH = (0.95, 1.25), 0.02, 0.75  # of the critical value; of the run
EVERY, COUNT = 10, 4  # of the measured eigenvalues
HELD = 50  # steps at the edge before the comparison
PARTS = 4  # of a run, each with the steps of a comparison
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
    "steps",
    "loss of the run",
    "at the edge",
    "top eigenvalue of the run: mean, most",
    "critical eigenvalues of the flow: mean, most",
    "loss error: central, stable flow",
    "weight distance: central, stable flow",
    "top eigenvalue error",
    "gradient-equivalents per step",
    "remarks",
]


def rates(optimizer: str, objective: cf.Objective, model: Any) -> list[float]:
    """In the order in which they are tried. For gradient descent, the first is half of
    that at which the start is critical."""
    if optimizer == "RMSProp":
        middle = 8e-4
    else:
        plain = cf.GradientDescent(1.0)
        state = plain.init(objective.flatten(model)[0])
        middle = 1 / float(cf.sharpness(objective, model, plain, state).values[0])
    return [middle * 2**k for k in (0, 1, -1, 2, -2, 3, -3)]


def at_edge(values: np.ndarray) -> np.ndarray:
    return (values >= EDGE[0]) & (values <= EDGE[1])


def stretch(values: np.ndarray, compared: int) -> tuple[float, int]:
    """The share of the measurements at the edge in a stretch to compare, and the step
    at which that starts: the first with enough, else the one with most; (0, 0) if there
    is nowhere to start."""
    best, held = (0.0, 0), HELD // EVERY
    for i in range(held, len(values) - compared):
        if at_edge(values[i - held : i + 1]).all() and abs(values[i] - 1) <= NEAR:
            share = float(at_edge(values[i : i + compared + 1]).mean())
            best = max(best, (share, i * EVERY), key=lambda x: x[0])
            if share >= ENOUGH:
                break
    return best


def find_edge(objective, model, optimizer, recorded) -> tuple[float, int, float]:
    """The share of the run at the edge, the step to start at, and the rate."""
    best = (0.0, 0, 0.0)
    for rate in rates(optimizer, objective, model):
        rule, at, state = OPTIMIZERS[optimizer](rate), model, None
        values = np.zeros(0)
        for _ in range(PARTS):
            run = cf.train(objective, at, rule, optimizer_state=state, **recorded)
            if run.result != cf.RESULTS.successful:
                break
            at, state = run.model, run.optimizer_state
            tops = run.sharpness[::EVERY, 0] / run.critical_sharpness
            # The start of a part is the end of that before, but without a midpoint.
            values = np.append(values, tops[min(len(values), 1) :])
            found = stretch(values, len(tops) - 1)
            best = max(best, (*found, rate), key=lambda x: x[0])
            if best[0] >= ENOUGH:
                return best
    if best[0] == 0:
        raise RuntimeError("the run holds the edge at none of the rates tried")
    return best


def measure(name: str, optimizer: str, loss: str, steps: int) -> dict:
    data = (
        cf.data.digits(1000 if name == "MLP" else 200)
        if name in IMAGES
        else cf.data.sorting(200, LENGTH, VOCABULARY, key=jax.random.key(1))
    )
    objective = cf.Objective(getattr(cf.losses, loss), data)
    model = MODELS[name](jax.random.key(0))
    recorded = dict(
        steps=steps,
        sharpness_every=EVERY,
        sharpness_count=COUNT,
        weight_times=[1],
        throw=False,
    )
    share, first, rate = find_edge(objective, model, optimizer, recorded)
    rule = OPTIMIZERS[optimizer](rate)
    warm = cf.train(objective, model, rule, first, weight_times=[first - 1])
    state = warm.optimizer_state
    run = cf.train(objective, warm.model, rule, optimizer_state=state, **recorded)
    around = np.stack([warm.weights[1], warm.weights[2], run.weights[1]])
    start = objective.flatten(model)[1].model(cf.midpoints(around)[0])
    remarks = []
    if run.result != cf.RESULTS.successful:
        remarks.append(f"the run diverges at step {float(run.times[-1]):g}")
    if share < ENOUGH:
        remarks.append("no rate of those tried is at the edge for longer")
    most = float(np.nanmax(run.sharpness[:, 0]))
    if most > EDGE[1] * float(run.critical_sharpness):
        remarks.append("the run jumps: its top eigenvalue is above 2.5 in between")
    flows = []
    for kind in (cf.CentralFlow(), cf.StableFlow()):
        flow = cf.predict(
            objective, start, rule, steps, flow=kind, optimizer_state=state, throw=False
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
    top = np.asarray(run.sharpness)[::EVERY, 0]
    sharpness = np.nan_to_num(np.asarray(central.sharpness))
    critical = np.sum(sharpness >= 0.99 * float(run.critical_sharpness), axis=1)
    averaged = cf.time_average(np.asarray(run.loss), report.window)
    return dict(
        rate=rate,
        first=first,
        steps=steps,
        ends=(averaged[report.window], averaged[-1 - report.window]),
        share=share,
        top=(float(np.nanmean(top)), float(np.nanmax(top))),
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
        f"{m['first']} to {m['first'] + m['steps']}",
        "{:.2g} to {:.2g}".format(*m["ends"]),
        f"{100 * m['share']:.0f} %",
        "{:.2f}, {:.2f}".format(*m["top"]),
        "{:.1f}, {}".format(*m["critical"]),
        ", ".join(map(percent, m["loss"])),
        ", ".join(map(percent, m["distance"])),
        percent(m["sharpness"]),
        f"{m['work']:.3g}",
        m["remarks"],
    ]


def in_a_process(cell: tuple[str, str, str], arguments: argparse.Namespace) -> dict:
    steps = str(arguments.steps)
    command = [sys.executable, "-m", "benchmarks.models", "--cell", *cell, steps]
    try:
        done = subprocess.run(
            command, timeout=arguments.limit, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        busy = f"{os.getloadavg()[0]:.1f}"
        return dict(failure=f"not finished in {arguments.limit:g} s, at load {busy}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = lines[-1].removeprefix("RuntimeError: ").replace("|", "/")
        return dict(failure=reason[:200])
    return json.loads(done.stdout.splitlines()[-1])


def page(rows: dict, arguments: argparse.Namespace) -> str:
    """The page, with the rows of an earlier one that are as these."""
    before = (PARTS - 1) * arguments.steps
    conditions = (
        f"{arguments.steps} steps compared, at most {before} before; "
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
            FINDINGS,
            *([f"Not measured: {', '.join(missing)}.", ""] if missing else []),
            '??? note "benchmarks/models.py"',
            "",
            "    ```{ .py }",
            '    --8<-- "benchmarks/models.py"',
            "    ```",
            "",
        ]
    )


INTRODUCTION = """# Every model

Where the run stays at the edge, which are the 20 rows without a remark, the central
flow follows every kind of network, with one critical eigenvalue as with four: its loss
is within 3 %, and its final weights are 4 to 31 times nearer than the stable flow's. On
stretches as short as these, 300 steps, that costs 1 to 15 gradient-equivalents per step
of the run.

The other eight are of cross-entropy, seven of them with gradient descent, and the
remarks say why. The sharpness falls with the loss, and most runs leave the edge: those
of the MLP, the ResNet and the ViT hold it at no rate, those of the CNN and the
Transformer for less than a fifth of the steps, that of the Transformer with RMSProp for
two thirds. Those of the LSTM and of Mamba jump, which no average describes: there the
loss of the central flow is off by 7 and 10 %, that of the stable flow by 15 and 46 %,
and the prediction of the jumping Mamba costs 51 gradient-equivalents per step. In the
row of the Transformer with gradient descent both flows are about 10 % off.

What `python -m benchmarks.models` measures: small networks, the MLP on 1,000 digits,
the other three of images on 200, and those of sequences on 200 of the sorting task. A
run is at the edge where its largest eigenvalue is from 1.9 to 2.5; 2 is the critical
value. A comparison may start at a measurement, one in 10 steps, that is from 1.96 to
2.04 with the edge held for 50 steps up to there: past the first overshoot. Rates are
tried from a middle one outwards, 1, 2, 1/2, 4, ..., 1/8 times that, and the first rate
and start are taken from which on the run is at the edge in three quarters of the
measurements; if there are none, those with the most. For gradient descent the middle
rate is half of that at which the initial weights are critical, for RMSProp 8e-4. The
predictions do not enter these choices. They are those of `CentralFlow` and of
`StableFlow` with their defaults, from the midpoint at the start, where the oscillation
cancels. Errors are means over time, the weight distance that at the end over the
distance travelled, as of [`centralflow.Comparison`][].
"""


FINDINGS = """\
The error of the top eigenvalue is that of an average, too: the flow holds all critical
eigenvalues at 2, those of the run move around it, and the largest of several is mostly
above. The error is 2 to 8 % with several, and about 1 % or less with a single one that
is held for the whole stretch.
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
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--limit", type=float, default=600, help="seconds for a row")
    parser.add_argument("--output", type=Path, default=Path("docs/models.md"))
    parser.add_argument("--cell", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        *cell, steps = arguments.cell
        print(json.dumps(measure(*cell, int(steps))))
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
