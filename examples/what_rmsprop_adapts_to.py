"""What RMSProp adapts to: its own oscillation.

python examples/what_rmsprop_adapts_to.py

nu is an average of squared gradients, and at the edge of stability those are mostly
oscillation. The flow predicts each one of them from what keeps the effective sharpness,
the largest eigenvalue of P^-1 H, at 2, while that of H itself is free.
"""

import jax
import numpy as np
from matplotlib.figure import Figure

import centralflow as cf


def main(
    width=64,
    size=1000,
    learning_rate=2e-4,
    warm_start=100,
    steps=500,
    every=20,
    output="what_rmsprop_adapts_to.png",
):
    """Train, predict, compare; returns the comparison."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(size))
    model = cf.models.MLP(64, 10, width, key=jax.random.key(0))
    weights, flat = objective.flatten(model)
    optimizer = cf.RMSProp(learning_rate, 0.99, 1e-7, bias_correction=True)

    warm = cf.train(objective, model, optimizer, warm_start)
    problem = (objective, warm.model, optimizer, steps)
    options = dict(
        optimizer_state=warm.optimizer_state,
        coordinates=np.linspace(0, weights.size - 1, min(300, weights.size), dtype=int),
        weight_times=np.arange(0, steps + 1, every),
    )
    run = cf.train(*problem, **options, sharpness_every=every)
    central = cf.predict(*problem, **options, flow=cf.CentralFlow(substeps=2))
    stable = cf.predict(*problem, **options, flow=cf.StableFlow())

    # The eigenvalues of H itself are those in the units of gradient descent.
    plain = cf.GradientDescent(1.0)
    state = plain.init(weights)
    raw = [
        float(cf.sharpness(objective, flat.model(w), plain, state).values[0])
        for w in central.weights
    ]
    draw(run, central, stable, raw).savefig(output, dpi=150)
    return cf.compare(run, central)


def draw(run, central, stable, raw):
    """The squared gradients against each other, and the two sharpnesses."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    a, b, c = figure.subplots(1, 3)
    # Averages past the first fifth, in which the oscillations set in.
    late = np.asarray(run.times) >= 0.2 * float(run.times[-1])
    mean = lambda series: np.mean(np.asarray(series)[late], axis=0)
    observed = mean(run.gradient_sq)
    for flow, colour, label in (
        (stable, "#009E73", "stable flow"),
        (central, "#D55E00", "central flow"),
    ):
        predicted = mean(flow.gradient_sq)
        a.loglog(
            predicted, observed, "o", ms=3, mew=0, alpha=0.6, c=colour, label=label
        )
    limits = observed.min() / 2, observed.max() * 2
    a.plot(limits, limits, color="black", lw=0.8)
    a.set(
        xlim=limits,
        ylim=limits,
        xlabel="predicted",
        ylabel="observed",
        title="mean of $g_i^2$",
    )
    a.legend(fontsize=8, frameon=False)

    b.plot(
        central.times, central.sharpness[:, 0], color="#D55E00", label="central flow"
    )
    measured = np.isfinite(np.asarray(run.sharpness)[:, 0])
    times, values = (np.asarray(x)[measured] for x in (run.times, run.sharpness[:, 0]))
    b.plot(times, values, "o", ms=3, color="#0072B2", label="run, at midpoints")
    b.axhline(2, color="black", lw=0.8, ls=":")
    b.set(title="effective sharpness $\\lambda(P^{-1}H)$", ylim=(0, None))
    b.legend(fontsize=8, frameon=False, loc="lower right")

    c.plot(central.weight_times, raw, "o-", ms=3, color="#D55E00")
    c.set(title="raw sharpness $\\lambda(H)$ of the flow", ylim=(0, None))
    for axes in (b, c):
        axes.set_xlabel("optimizer step")
    for axes in (a, b, c):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    print(main())
