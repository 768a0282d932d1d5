"""Which model when: every flow against the real optimizer.

    python -m benchmarks.flows
    python -m benchmarks.flows --case "MLP, GD" "CNN, GD" --flow rod edge

The table of docs/which_model.md. For each case below the optimizer is run, and each
flow predicts the run with its defaults. Errors are those of the predicted mean loss
next to the time-average of the run: over all of it; in the onset window; and after
that. The onset window is 40 steps around the first time that the run's oscillation is
at half of its largest size. Before it, the optimizer may be above the edge and not
oscillate yet. The sharpness, one in 10 steps, is the largest eigenvalue of P^-1 H: of a
flow with its own weights and its own P at that time, of the run with those of its
midpoints and its P. A row takes up to four minutes on one core, mostly compilation.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import centralflow as cf
from centralflow.measure import GUARDS, eigenpairs

from .problems import Problem
from .report import heading, table_lines

FLOWS = {
    "stable": cf.StableFlow(),
    "central": cf.CentralFlow(),
    "rod": cf.RodFlow(),
    "edge": cf.EdgeFlow(),
}
EVERY, WINDOW, ONSET = 10, 10, 40
HEAD = [
    "case",
    "flow",
    "loss error",
    "in the onset window",
    "after it",
    "weight distance / that of stable",
    "sharpness error",
    "gradient-equivalents per step",
]


def mlp() -> tuple[cf.Objective, Any]:
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(200))
    return objective, cf.models.MLP(64, 10, 24, key=jax.random.key(0))


def cnn() -> tuple[cf.Objective, Any]:
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(200))
    return objective, cf.models.CNN((8, 8), 10, (6, 12), key=jax.random.key(0))


def transformer() -> tuple[cf.Objective, Any]:
    length, vocabulary = 4, 4
    data = cf.data.sorting(200, length, vocabulary, key=jax.random.key(1))
    tokens = (vocabulary + 1, vocabulary + 1)
    key = jax.random.key(0)
    model = cf.models.Transformer(*tokens, 2 * length, 12, 1, 2, key=key)
    return cf.Objective(cf.losses.squared_error, data), model


class Case(NamedTuple):
    """A network, an optimizer, real steps before the prediction, predicted steps."""

    network: Callable[[], tuple[cf.Objective, Any]]
    optimizer: cf.AbstractOptimizer
    warm: int
    steps: int

    def problem(self) -> Problem:
        problem = Problem("", *self.network(), self.optimizer)
        return problem.after(self.warm) if self.warm else problem


_scalar = partial(cf.ScalarRMSProp, beta2=0.99, eps=1e-7, bias_correction=True)
_rmsprop = partial(cf.RMSProp, beta2=0.99, eps=1e-7, bias_correction=True)

# Another optimizer is a line each. The rates and starts were chosen by the run alone:
# it reaches the edge within the steps.
CASES = {
    "MLP, GD": Case(mlp, cf.GradientDescent(0.3), 0, 300),
    "CNN, GD": Case(cnn, cf.GradientDescent(0.3), 0, 300),
    "Transformer, GD": Case(transformer, cf.GradientDescent(0.3), 0, 300),
    "MLP, Scalar RMSProp": Case(mlp, _scalar(0.03), 20, 300),
    "CNN, Scalar RMSProp": Case(cnn, _scalar(0.03), 20, 300),
    "Transformer, Scalar RMSProp": Case(transformer, _scalar(0.03), 300, 300),
    "MLP, RMSProp": Case(mlp, _rmsprop(1e-3), 60, 300),
    "CNN, RMSProp": Case(cnn, _rmsprop(1e-3), 100, 300),
    "Transformer, RMSProp": Case(transformer, _rmsprop(1e-3), 130, 300),
    "MLP, heavy ball": Case(mlp, cf.HeavyBall(0.9, 0.9), 380, 300),
    "CNN, heavy ball": Case(cnn, cf.HeavyBall(0.9, 0.9), 80, 300),
    "Transformer, heavy ball": Case(transformer, cf.HeavyBall(0.1, 0.9), 270, 300),
    "MLP, Nesterov": Case(mlp, cf.Nesterov(0.6, 0.9), 200, 300),
    "CNN, Nesterov": Case(cnn, cf.Nesterov(0.3, 0.9), 100, 300),
    "Transformer, Nesterov": Case(transformer, cf.Nesterov(0.1, 0.9), 300, 300),
    "MLP, Adam": Case(mlp, cf.Adam(5e-3, 0.9, 0.99), 100, 300),
    "MLP, Adam, beta2 0.999": Case(mlp, cf.Adam(0.03, 0.9, 0.999), 120, 300),
    "CNN, Adam": Case(cnn, cf.Adam(5e-3, 0.9, 0.99), 100, 300),
    "Transformer, Adam": Case(transformer, cf.Adam(5e-3, 0.9, 0.99), 100, 300),
    "MLP, NAdam": Case(mlp, cf.NAdam(3e-3, 0.9, 0.99), 60, 300),
    "CNN, NAdam": Case(cnn, cf.NAdam(1e-3, 0.9, 0.99), 160, 300),
    "Transformer, NAdam": Case(transformer, cf.NAdam(3e-3, 0.9, 0.99), 140, 300),
}


def average(series: Any) -> np.ndarray:
    """The time-average of a series, as it is compared."""
    return cf.time_average(np.asarray(series), WINDOW)


def onset_window(run: cf.Trajectory) -> tuple[int, int, int]:
    """The onset of the run's oscillation, and where its window begins and ends."""
    size = average(np.r_[0, run.trace_covariance[1:]])
    onset = int(np.argmax(size > size.max() / 2))
    half = ONSET // 2
    return onset, max(1, onset - half), min(len(size) - 1, onset + half)


def rows(name: str, flows: list[str]) -> Iterator[list[str]]:
    """One row for each flow that can be had for the case's optimizer."""
    case = CASES[name]
    problem, steps = case.problem(), case.steps
    times = np.arange(0, steps + 1, EVERY)
    run = problem.train(steps, sharpness_every=EVERY, throw=False)
    label = f"{name} (rate {float(case.optimizer.learning_rate):g}, from {case.warm}"
    if run.result != cf.RESULTS.successful:
        reason = f"the run diverges at step {float(run.times[-1]):g}"
        yield [f"{label})", "-", reason, *[""] * 5]
        return
    onset, begin, end = onset_window(run)
    label = f"{label}; onset {onset})"
    measured = np.asarray(run.sharpness)[times, 0]
    weights, flat = problem.objective.flatten(problem.model)
    # The step sizes at all coordinates are all of P^-1.
    kept = dict(weight_times=times, coordinates=range(weights.size), throw=False)
    stable = problem.predict(steps, flow=FLOWS["stable"], **kept)
    far = cf.compare(run, stable).weight_distance
    for flow in flows:
        if flow == "edge" and not isinstance(case.optimizer, cf.GradientDescent):
            continue
        known = flow == "stable"
        flown = stable if known else problem.predict(steps, flow=FLOWS[flow], **kept)
        if flown.result != cf.RESULTS.successful:
            why = str(cf.RESULTS[flown.result]).split(".")[0]
            reason = f"fails at step {float(flown.times[-1]):g}: {why}"
            yield [label, flow, reason, *[""] * 5]
            continue
        error = np.abs(average(flown.mean_loss) / average(run.mean_loss) - 1)
        P = 1 / flown.step_sizes[times]
        wrong = np.abs(np.asarray(_tops(flat, flown.weights, P)) / measured - 1)
        # Between the steps of a flow its second moments are interpolated: one that is
        # nearly zero may come out negative, and P is not a number.
        wrong = wrong[np.isfinite(wrong)]
        percent = lambda x: f"{float(f'{100 * np.mean(x):.2g}'):g} %"
        yield [
            label,
            flow,
            percent(error[1:-1]),
            percent(error[begin:end]),
            percent(error[end:-1]),
            f"{cf.compare(run, flown).weight_distance / far:.2f}",
            percent(wrong),
            f"{float(f'{float(flown.gradient_equivalents) / steps:.2g}'):g}",
        ]


@eqx.filter_jit
def _tops(flat: Any, weights: jax.Array, P: jax.Array) -> jax.Array:
    """The largest eigenvalue of P^-1 H at each row of weights and of P."""

    def measure(vectors, row):
        found = eigenpairs(flat, *row[:2], vectors, 1, 1e-3, row[2])
        return found.vectors, found.values[0]

    keys = jax.random.split(jax.random.key(1), len(weights))
    start = jnp.zeros((1 + GUARDS, weights.shape[1]), weights.dtype)
    return jax.lax.scan(measure, start, (weights, P, keys))[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--flow", nargs="+", choices=FLOWS, default=list(FLOWS))
    arguments = parser.parse_args()
    heading("Errors of the flows as models of the optimizer")
    found = []
    for name in arguments.case:
        for row in rows(name, arguments.flow):
            print("; ".join(row), flush=True)
            found.append(row)
    print("\n".join(table_lines(HEAD, found)))


if __name__ == "__main__":
    main()
