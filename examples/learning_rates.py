"""What a learning rate will do, for many of them in one call.

python examples/learning_rates.py

`jax.vmap` over the learning rate makes one program of the whole sweep. Its predictions
step together until the slowest has come to its end, and under `vmap` both sides of
every decision are computed for all of them: it costs the number of rates times more
than the *dearest* of them alone, whose gradients are printed. Separate calls with one
rate each share one compiled program, too, and cost the sum: on a CPU they may well be
cheaper. The sweep is for accelerators, whose small products cost nothing, and for use
inside `jit`. Nothing can grow under `vmap`, so `CentralFlow(block_size=...)` must
suffice for all.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

import centralflow as cf

RATES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6)


def main(
    width=32,
    size=500,
    rates=RATES,
    warm_start=40,
    steps=600,
    output="learning_rates.png",
):
    """Predict all, train all, compare; returns the final losses, predicted and real."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(size))
    model = cf.models.MLP(64, 10, width, key=jax.random.key(0))
    # All runs begin below their edge: from where the smallest rate has led.
    model = cf.train(objective, model, cf.GradientDescent(min(rates)), warm_start).model
    parameters, static = eqx.partition(model, eqx.is_inexact_array)
    times = np.unique(np.linspace(0, steps, 201).round())

    @jax.jit
    @jax.vmap
    def sweep(rate):
        model = eqx.combine(parameters, static)
        flow = cf.predict(
            objective, model, cf.GradientDescent(rate), steps, times=times
        )
        return flow.mean_loss, flow.stats["gradients"], flow.result

    predicted, gradients, results = sweep(jnp.asarray(rates))
    assert jnp.all(results == cf.RESULTS.successful), "nothing is raised under vmap"
    runs = [
        cf.train(objective, model, cf.GradientDescent(rate), steps, throw=False)
        for rate in rates
    ]
    draw(rates, times, predicted, runs).savefig(output, dpi=150)
    return [
        dict(rate=rate, predicted=_end(loss), real=_end(run.loss), gradients=int(count))
        for rate, loss, run, count in zip(
            rates, predicted, runs, gradients, strict=True
        )
    ]


def _end(losses):
    """The mean over the last tenth, which takes the oscillations out of a run's."""
    losses = np.asarray(losses)
    return float(np.mean(losses[-max(len(losses) // 10, 1) :]))


def draw(rates, times, predicted, runs):
    """The predicted curves over the runs, and the final losses against the rate."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    a, b = figure.subplots(1, 2)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(rates)))
    for rate, loss, run, colour in zip(rates, predicted, runs, colours, strict=True):
        real = np.asarray(run.loss)
        a.semilogy(run.times, real, color=colour, lw=3, alpha=0.3)
        a.semilogy(times, loss, color=colour, lw=1.2, label=f"{rate:g}")
    a.set(xlabel="optimizer step", title="training loss: predicted, and runs (broad)")
    a.legend(title="learning rate", fontsize=8, title_fontsize=8, frameon=False)
    final = [_end(loss) for loss in predicted]
    b.loglog(rates, final, "-", color="#D55E00", label="predicted")
    ends = [_end(run.loss) for run in runs]
    b.plot(rates, ends, "o", color="#0072B2", label="run")
    title = f"mean loss of the last tenth of {times[-1]:g} steps"
    b.set(xlabel="learning rate", title=title)
    b.set_xticks(rates, [f"{rate:g}" for rate in rates])
    b.minorticks_off()
    b.legend(fontsize=8, frameon=False)
    for axes in (a, b):
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    for row in main():
        print(row)
