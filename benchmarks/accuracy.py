"""How accurate a prediction is, against published runs and against the optimizer.

    python -m benchmarks.accuracy

First, the flow of gradient descent and of RMSProp on digits against published runs of
the same fixed-step scheme. Then averages over 400 steps of gradient descent with two to
three critical eigenvalues, past the first 100 steps, against the predicted ones.
"""

import jax
import numpy as np

import centralflow as cf
from centralflow.compare import variances
from tests.problems import reference

from .report import heading, table


def published(name: str, optimizer: cf.AbstractOptimizer) -> list[str]:
    """The largest and the mean difference from a published run, as a row."""
    arrays, config, objective, model = reference(name)
    state = None
    if config["warm_start"]:
        warm = cf.train(objective, model, optimizer, config["warm_start"])
        model, state = warm.model, warm.optimizer_state
    steps = config["steps"] - 1
    flow = cf.CentralFlow(substeps=config["flow_substeps"])
    ours = cf.predict(
        objective, model, optimizer, steps, flow=flow, optimizer_state=state
    )
    relative = lambda a, b: np.abs(np.asarray(a) / b - 1)
    sharpness = np.abs(ours.sharpness[:, 0] - arrays["central_sharpness"][:, 0])
    theirs = np.nansum(arrays["central_variances"], axis=1)
    shown = theirs > 1e-5
    sums = np.sum(ours.oscillation, axis=1)
    errors = (
        relative(ours.loss, arrays["central_loss"]),
        relative(ours.mean_loss, arrays["central_mean_loss"]),
        sharpness,
        relative(sums[shown], theirs[shown]),
    )
    return [name, *(f"{np.max(e):.1e}, {np.mean(e):.1e}" for e in errors)]


def averages() -> list[str]:
    """The run's averages over the predicted ones, minus one."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(1000))
    model = cf.models.MLP(64, 10, key=jax.random.key(0))
    optimizer = cf.GradientDescent(0.7)
    warm = cf.train(objective, model, optimizer, 86)
    problem = (objective, warm.model, optimizer, 500)
    run = cf.train(*problem, sharpness_every=10, sharpness_count=6)
    flow = cf.predict(*problem, flow=cf.CentralFlow(substeps=2))
    mean = lambda series: float(np.mean(np.asarray(series)[100:]))
    observed, predicted = variances(run, flow)
    ratios = (
        mean(run.loss) / mean(flow.mean_loss),
        mean(run.grad_norm_sq) / mean(flow.mean_grad_norm_sq),
        np.sum(observed[10:]) / np.sum(predicted[10:]),
    )
    return [f"{100 * (ratio - 1):+.1f} %" for ratio in ratios]


def main() -> None:
    rows = [
        published("gd_mlp_digits", cf.GradientDescent(0.2)),
        published("rmsprop_mlp_digits", cf.RMSProp(2e-4, 0.99, 1e-7, True)),
    ]
    heading("Difference from published runs of the flow: largest, mean")
    table(["run", "loss", "mean loss", "top eigenvalue", "sum of variances"], rows)
    print("\nThe run's averages over 400 steps, next to the predicted ones")
    table(["E[L]", "E|g|^2", "sum of variances"], [averages()])


if __name__ == "__main__":
    main()
