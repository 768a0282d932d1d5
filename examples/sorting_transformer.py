"""A Transformer learns to sort, at the edge of stability.

python examples/sorting_transformer.py

The inputs are random symbols, a separator and the same symbols in ascending order; only
the predictions of the latter count (the mask of the data). The central flow follows the
averaged loss, but not the run's jump at step 45, where its eigenvalues are far above 2;
the stable flow learns faster than the run does. What a metric h of the
model is on average over the oscillation is predicted as E[h] = h + <hess h, Sigma> / 2.
The output at the right symbol, which should be 1, has such a correction. The accuracy
is piecewise constant and has none: it is that at the weights of the flow.
"""

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import centralflow as cf


def main(
    width=16,
    size=300,
    length=4,
    vocabulary=5,
    learning_rate=0.4,
    warm_start=75,
    steps=300,
    output="sorting_transformer.png",
):
    """Train, predict, compare; returns the comparison."""
    data = cf.data.sorting(size, length, vocabulary, key=jax.random.key(1))
    objective = cf.Objective(cf.losses.squared_error, data)
    tokens = vocabulary + 1
    model = cf.models.Transformer(
        tokens, tokens, 2 * length, width, depth=1, heads=2, key=jax.random.key(0)
    )
    optimizer = cf.GradientDescent(learning_rate)

    def scores(model):
        """The accuracy and the mean output at the right symbol, in one pass."""
        inputs, targets, mask = data
        outputs = jax.vmap(model)(inputs)
        correct = jnp.argmax(outputs, axis=-1) == jnp.argmax(targets, axis=-1)
        right = jnp.sum(targets * outputs, axis=-1)
        return jnp.stack([jnp.mean(x, where=mask) for x in (correct, right)])

    warm = cf.train(objective, model, optimizer, warm_start)
    problem = (objective, warm.model, optimizer, steps)
    options = dict(
        optimizer_state=warm.optimizer_state,
        metrics=dict(scores=scores),
        weight_times=range(0, steps + 1, 4),
    )
    run = cf.train(*problem, **options, sharpness_every=10, sharpness_count=2)
    central = cf.predict(*problem, **options)
    stable = cf.predict(*problem, **options, flow=cf.StableFlow())
    draw(run, central, stable).savefig(output, dpi=150)
    return cf.compare(run, central)


def draw(run, central, stable):
    """Loss, scores and eigenvalues."""
    blue, orange, green = "#0072B2", "#D55E00", "#009E73"
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    a, b, c = figure.subplots(1, 3)
    window = cf.compare(run, central).window

    def lines(axes, series):
        observed = np.asarray(series(run), float)
        average = cf.time_average(observed, window)
        axes.plot(run.times, observed, color=blue, lw=0.6, alpha=0.4)
        axes.plot(
            run.times, average, color=blue, lw=2.5, alpha=0.6, label="run, averaged"
        )
        axes.plot(stable.times, series(stable), color=green, label="stable flow")
        axes.plot(
            central.times, series(central), "--", color=orange, label="central flow"
        )

    lines(a, lambda x: x.mean_loss)
    a.set_yscale("log")
    a.set_title("squared error")
    a.legend(fontsize=8, frameon=False)
    for i, text in enumerate(("accuracy", "output")):
        lines(b, lambda x, i=i: x.metrics["scores"][:, i])
        height = float(central.metrics["scores"][-1, i])
        b.text(1.02 * float(run.times[-1]), height, text, fontsize=8, va="center")
    b.set_title("accuracy, and output at the right symbol")

    measured = np.isfinite(np.asarray(run.sharpness)[:, 0])
    for i in range(run.sharpness.shape[1]):
        c.plot(central.times, central.sharpness[:, i], color=orange)
        c.plot(run.times[measured], run.sharpness[measured, i], "o", ms=3, color=blue)
    c.axhline(2, color="black", lw=0.8, ls=":")
    c.set_title("top eigenvalues of $P^{-1}H$; dots: run")
    for axes in (a, b, c):
        axes.title.set_fontsize(10)
        axes.set_xlabel("optimizer step")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    print(main())
