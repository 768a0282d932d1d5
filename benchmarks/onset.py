"""The onset: how much of the error of each flow comes from it, and a hand-over.

    python -m benchmarks.onset
    python -m benchmarks.onset --case "MLP, GD" "CNN, Adam" --figure onset.png

The tables of the section on the onset in docs/which_model.md, of those of the cases of
benchmarks.flows in which the oscillation starts from little, and with the same onset
windows. The hand-over: the central flow until its sharpness is half of the critical
one; then rod flow, until the sharpness at its centre has been above critical and is
back; then the central flow from there. It uses nothing of the run. Next to these is
another run, from weights that differ in the last binary digit. A case takes up to eight
minutes on one core, mostly compilation.
"""

import argparse
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import centralflow as cf

from .flows import CASES, EVERY, FLOWS, ONSET, WINDOW, average, onset_window
from .problems import Problem
from .report import heading, table

NEAR = 0.5  # of the critical sharpness: where rod flow takes over
POINTS, KEPT = 301, 31  # reported losses, and weights, of the central flow's pieces
# The rule of the hand-over was chosen on these, marked with a star.
CHOSEN_ON = {
    "MLP, GD",
    "MLP, Scalar RMSProp",
    "Transformer, RMSProp",
    "Transformer, Nesterov",
}
SHARES = [
    "case",
    "stable",
    "central",
    "rod",
    "edge",
    "later loss error of central; from the run's weights",
    "distance of central after the window; at the end; from the run's weights",
]
HANDED = [
    "case",
    "rod flow",
    "loss error",
    "in the onset window",
    "after it",
    "weight distance / that of stable",
    "gradient-equivalents per step",
]
LINES = [
    ("central", "central flow", "#D55E00"),
    ("rod", "rod flow", "#56B4E9"),
    ("handed", "hand-over", "#009E73"),
]


class Piece(NamedTuple):
    """A prediction or a part of one: its mean loss at each step, weights at some times,
    its work, and, of the central flow, the sharpness at each step over critical."""

    loss: np.ndarray
    times: np.ndarray
    weights: np.ndarray
    work: float
    sharpness: np.ndarray | None = None

    def then(self, other: "Piece") -> "Piece":
        return Piece(
            np.r_[self.loss[:-1], other.loss],
            np.r_[self.times, self.times[-1] + other.times[1:]],
            np.r_[self.weights, other.weights[1:]],
            self.work + other.work,
        )

    def at(self, time: int) -> np.ndarray:
        j = int(np.clip(np.searchsorted(self.times, time), 1, len(self.times) - 1))
        (a, b), (u, v) = self.times[j - 1 : j + 1], self.weights[j - 1 : j + 1]
        return u + (time - a) / (b - a) * (v - u)


def fly(problem: Problem, steps: int, flow: cf.AbstractFlow) -> tuple[Piece, Problem]:
    """A prediction, and the problem at its end. One program makes all, however long."""
    grid = lambda count: np.linspace(0, steps, count)
    flown = problem.predict(
        steps, flow=flow, times=grid(POINTS), weight_times=grid(KEPT)
    )
    whole, times = np.arange(steps + 1), np.asarray(flown.times)
    sharpness = flown.sharpness[:, 0] / flown.critical_sharpness
    piece = Piece(
        np.exp(np.interp(whole, times, np.log(flown.mean_loss))),
        np.asarray(flown.weight_times),
        np.asarray(flown.weights, float),
        float(flown.gradient_equivalents),
        np.interp(whole, times, sharpness),
    )
    return piece, _at_end(problem, flown)


def rod_flow(problem: Problem, steps: int, back: bool) -> tuple[Piece, Problem]:
    """Rod flow, in pieces of `EVERY` steps; if `back`, until the sharpness at the end
    of one has been above critical and is so no more."""
    whole, above, state = None, False, None
    for _ in range(steps // EVERY):
        flown = problem.predict(EVERY, flow=FLOWS["rod"], solver_state=state)
        problem, state = _at_end(problem, flown), flown.solver_state
        piece = Piece(
            np.asarray(flown.mean_loss, float),
            np.asarray(flown.weight_times),
            np.asarray(flown.weights, float),
            float(flown.gradient_equivalents),
        )
        whole = piece if whole is None else whole.then(piece)
        if back:
            found, critical = cf.sharpness(*problem[1:5]), flown.critical_sharpness
            whole = whole._replace(work=whole.work + 2 * float(found.products))
            if above and found.values[0] <= critical:
                break
            above = above or bool(found.values[0] > critical)
    return whole, problem


def hand_over(problem: Problem, steps: int, central: Piece) -> tuple[Piece, int, int]:
    """Central, rod and central flow; and when rod flow begins and ends. `central` is
    the prediction by the central flow alone."""
    begin, first = int(np.argmax(central.sharpness >= NEAR)), None
    if begin:
        first, problem = fly(problem, begin, FLOWS["central"])
    rod, problem = rod_flow(problem, steps - begin - EVERY, True)
    end = begin + len(rod.loss) - 1
    last, _ = fly(problem, steps - end, FLOWS["central"])
    return (rod if first is None else first.then(rod)).then(last), begin, end


def averaged(problem: Problem, step: int) -> Problem:
    """The run at a step: its weights and its state, averaged as its loss is."""
    half = WINDOW // 2
    near = [problem.after(step - half)]
    for _ in range(WINDOW):
        near.append(near[-1].after(1))
    kernel = [cf.time_average(unit, WINDOW)[half] for unit in np.eye(WINDOW + 1)]
    split = [eqx.partition(x[2:], eqx.is_inexact_array) for x in near]
    mean = lambda *x: jnp.tensordot(jnp.asarray(kernel, x[0].dtype), jnp.stack(x), 1)
    arrays = jax.tree.map(mean, *(arrays for arrays, _ in split))
    model, _, state = eqx.combine(arrays, split[half][1])
    return problem._replace(model=model, optimizer_state=state)


def another(problem: Problem, steps: int) -> Piece:
    """The run from weights whose last binary digit is another."""
    next_to = lambda x: jnp.nextafter(x, jnp.inf) if eqx.is_inexact_array(x) else x
    near = problem._replace(model=jax.tree.map(next_to, problem.model))
    run = near.train(steps, weight_times=range(steps + 1))
    weights = np.asarray(run.weights, float)
    return Piece(np.asarray(run.loss), np.asarray(run.weight_times), weights, steps)


def _at_end(problem: Problem, flown: cf.Trajectory) -> Problem:
    return problem._replace(model=flown.model, optimizer_state=flown.optimizer_state)


class Found(NamedTuple):
    """All that was found of a case."""

    loss: np.ndarray
    onset: int
    window: tuple[int, int]
    weights: tuple[np.ndarray, np.ndarray]  # averages of the run after it, at the end
    flows: dict[str, Piece]
    handed: tuple[int, int]

    def error(self, flow: str) -> np.ndarray:
        return np.abs(average(self.flows[flow].loss) / average(self.loss) - 1)

    def parts(self, flow: str) -> tuple[float, float, float]:
        """The mean loss error: all, in the onset window, and after it."""
        error, (begin, end) = self.error(flow), self.window
        return tuple(map(np.mean, (error[1:-1], error[begin:end], error[end:-1])))

    def shares(self, flow: str) -> tuple[float, float]:
        """The shares of the summed error: before the onset window, and in it."""
        error, (begin, end) = self.error(flow), self.window
        before, within = error[1:begin].sum(), error[begin:end].sum()
        return before / error[1:-1].sum(), within / error[1:-1].sum()

    def distances(self, flow: str) -> tuple[float, float]:
        """From the run, after the window and at the end, over that of stable there."""
        times = self.window[1], len(self.loss) - 1
        far = lambda flow, i: np.linalg.norm(
            self.flows[flow].at(times[i]) - self.weights[i]
        )
        return tuple(far(flow, i) / far("stable", 1) for i in range(2))

    def work(self, flow: str) -> float:
        return self.flows[flow].work / (len(self.loss) - 1)


def find(name: str) -> Found | None:
    """None where the oscillation does not start from little."""
    case = CASES[name]
    problem, steps = case.problem(), case.steps
    run = problem.train(steps, weight_times=range(steps + 1))
    onset, begin, end = onset_window(run)
    if onset <= ONSET // 4:
        return None
    around = np.asarray(run.weights, float)[end - WINDOW // 2 :]
    after = np.stack([average(x)[WINDOW // 2] for x in around[: WINDOW + 1].T])
    flows = {}
    for flow in ("stable", "central", "edge"):
        if flow != "edge" or isinstance(case.optimizer, cf.GradientDescent):
            flows[flow], _ = fly(problem, steps, FLOWS[flow])
    flows["rod"], _ = rod_flow(problem, steps, False)
    central = flows["central"]
    flows["handed"], *handed = hand_over(problem, steps, central)
    rest, _ = fly(averaged(problem, end), steps - end, FLOWS["central"])
    first = Piece(central.loss[: end + 1], np.array([0, end]), central.weights[:2], 0)
    flows["from the run"] = first.then(rest)
    flows["another run"] = another(problem, steps)
    weights = after, around[-1]
    return Found(
        np.asarray(run.loss), onset, (begin, end), weights, flows, tuple(handed)
    )


def percent(*values: float) -> str:
    return "; ".join(f"{float(f'{100 * x:.2g}'):g} %" for x in values)


def rows(name: str, found: Found) -> tuple[list[str], list[str]]:
    """Of both tables."""
    shares = lambda flow: percent(*found.shares(flow)) if flow in found.flows else "-"
    both = "central", "from the run"
    (after, end), (_, anew) = map(found.distances, both)
    first = [
        f"{name} (onset {found.onset})",
        *map(shares, FLOWS),
        percent(*(found.parts(flow)[2] for flow in both)),
        f"{after:.2f}; {end:.2f}; {anew:.2f}",
    ]
    three = "central", "rod", "handed"
    four = *three, "another run"
    parts = np.array([found.parts(flow) for flow in four])
    second = [
        name + " *" * (name in CHOSEN_ON),
        "{} to {}".format(*found.handed),
        *(percent(*column) for column in parts.T),
        "; ".join(f"{found.distances(flow)[1]:.2f}" for flow in four),
        "; ".join(f"{float(f'{found.work(flow):.2g}'):g}" for flow in three),
    ]
    return first, second


def figure(found: dict[str, Found]) -> Figure:
    """The averaged loss around the onset, and by how much the predictions are off."""
    drawing = Figure(figsize=(3.8 * len(found), 4.2), layout="constrained")
    axes = drawing.subplots(2, len(found), sharex="col", squeeze=False)
    drawing.get_layout_engine().set(hspace=0.05)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, which="both")
    for (above, below), (name, one) in zip(axes.T, found.items(), strict=True):
        begin, end = max(1, one.window[0] - ONSET // 2), one.window[1] + ONSET
        run, steps = average(one.loss)[begin:end], np.arange(begin, end)
        above.plot(steps, run, color="#0072B2", lw=2, label="optimizer, averaged")
        below.axhline(0, color="#0072B2", lw=2)
        for flow, label, colour in LINES:
            loss = average(one.flows[flow].loss)[begin:end]
            above.plot(steps, loss, color=colour, lw=1, label=label)
            below.plot(steps, 100 * (loss / run - 1), color=colour, lw=1)
        for axis in (above, below):
            axis.axvline(one.handed[1], color="#666666", lw=0.8, ls=":")
        above.set_title(name, loc="left", fontsize=10)
        below.set_xlabel("optimizer step", fontsize=9)
    axes[0, 0].set_ylabel("loss", fontsize=9)
    axes[1, 0].set_ylabel("off by, %", fontsize=9)
    axes[0, 0].legend(fontsize=8, frameon=False)
    return drawing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--figure", metavar="PATH", help="draw the cases, too")
    arguments = parser.parse_args()
    heading("The onset")
    tables, drawn = [], {}
    for name in arguments.case:
        found = find(name)
        if found is None:
            print(f"{name}: the run oscillates from the start on", flush=True)
            continue
        drawn[name] = found
        tables.append(rows(name, found))
        print("\n".join("; ".join(row) for row in tables[-1]), flush=True)
    for head, lines in zip((SHARES, HANDED), zip(*tables, strict=True), strict=True):
        print("\nShares of the summed error" if head is SHARES else "\nHand-over")
        table(head, list(lines))
    if arguments.figure:
        figure(drawn).savefig(arguments.figure, dpi=150)


if __name__ == "__main__":
    main()
