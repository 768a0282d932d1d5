"""The figures of these pages.

python docs/figures.py            those of the page on the idea, a minute or two
python docs/figures.py gallery    those of the gallery, from the examples
"""

import io
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

import centralflow as cf

HERE = Path(__file__).parent
RUN, CENTRAL, STABLE, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
RATES = {0.25: "#56B4E9", 0.6: "#0072B2", 1.2: "#CC79A7"}


def save(figure, path):
    """With a palette of 128 colours, a third of the bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, facecolor="white")
    compress(buffer, path)


def compress(source, path):
    image = Image.open(source).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def axes_of(figure, columns):
    for axes in (all_axes := figure.subplots(1, columns)):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, which="both")
    return all_axes


def network(width=32, size=500):
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(size))
    return objective, cf.models.MLP(64, 10, width, key=jax.random.key(0))


def edge(steps=500, every=10):
    """The loss and the top eigenvalue of H at three learning rates."""
    objective, model = network()
    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    a, b = axes_of(figure, 2)
    for rate, colour in RATES.items():
        optimizer = cf.GradientDescent(rate)
        run = cf.train(objective, model, optimizer, steps, sharpness_every=every)
        measured = np.isfinite(run.sharpness[:, 0])
        times, values = run.times[measured], run.sharpness[measured, 0] / rate
        a.semilogy(run.times, run.loss, color=colour, lw=1, label=f"{rate:g}")
        b.plot(times, values, "o-", ms=2, lw=1, color=colour)
        b.axhline(2 / rate, color=colour, lw=0.8, ls=":")
        label = dict(color=colour, fontsize=8, va="center", clip_on=False)
        b.text(1.02 * steps, 2 / rate, f"2/{rate:g}", **label)
    a.legend(title="learning rate", fontsize=8, title_fontsize=8, frameon=False)
    a.set_title("(a) Training loss", loc="left", fontsize=10)
    b.set_title("(b) Largest eigenvalue of the Hessian", loc="left", fontsize=10)
    b.set(xlim=(0, steps), ylim=(0, None))
    for axes in (a, b):
        axes.set_xlabel("optimizer step", fontsize=9)
    return figure


def valley(rate=0.3, pull=0.01, steps=300):
    """A valley whose floor is at x = 0 and whose curvature y the loss pulls up."""

    def loss(model):
        x, y = model["x"], model["y"]
        return 0.5 * y * x**2 - pull * y

    model = dict(x=jnp.array(0.1), y=jnp.array(1.98 / rate))
    problem = (cf.Objective(loss), model, cf.GradientDescent(rate), steps)
    every = dict(weight_times=range(steps + 1))
    run = cf.train(*problem, **every)
    central = cf.predict(*problem, flow=cf.CentralFlow(substeps=4), **every)
    stable = cf.predict(*problem, flow=cf.StableFlow(), **every)

    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    a, b = axes_of(figure, 2)
    x, y = run.weights.T
    a.plot(x, y, color=RUN, lw=0.3, alpha=0.5)
    a.plot(x, y, "o", ms=1.8, mew=0, color=RUN, label="gradient descent")
    for flow, colour, label in (
        (stable, STABLE, "gradient flow"),
        (central, CENTRAL, "central flow"),
    ):
        a.plot(*flow.weights.T, color=colour, lw=2, label=label)
        b.plot(flow.times, flow.weights[:, 1], color=colour, lw=2, label=label)
    b.plot(run.times, y, color=RUN, lw=1.2, label="gradient descent")
    spread = np.sqrt(np.asarray(central.trace_covariance))
    for sign in (-1, 1):
        label = "predicted $\\pm\\sigma$" if sign == 1 else None
        late = spread > 0
        edge = sign * spread[late]
        a.plot(edge, central.weights[late, 1], "|", ms=9, color=CENTRAL, label=label)
    a.set_xlabel("x, across the valley", fontsize=9)
    a.set_ylabel("y = curvature across the valley", fontsize=9)
    b.set_xlabel("optimizer step", fontsize=9)
    for axes in (a, b):
        axes.set_ylim(6.54, 6.96)
        axes.axhline(2 / rate, color="black", lw=0.8, ls=":")
    a.set_title("(a) In the plane", loc="left", fontsize=10)
    b.set_title("(b) The curvature; dotted: 2/$\\eta$", loc="left", fontsize=10)
    a.legend(fontsize=7.5, frameon=False, loc="upper right")
    return figure


def average(rate=0.7, warm_start=86, steps=400, shown=(100, 300), window=40):
    """A short stretch of a run, its time average, and what the flow predicts of it."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(1000))
    model = cf.models.MLP(64, 10, key=jax.random.key(0))
    optimizer = cf.GradientDescent(rate)
    warm = cf.train(objective, model, optimizer, warm_start)
    start = dict(steps=steps, optimizer_state=warm.optimizer_state)
    run = cf.train(objective, warm.model, optimizer, **start)
    central = cf.predict(objective, warm.model, optimizer, **start)

    figure = Figure(figsize=(7.6, 3.0), layout="constrained")
    a, b = axes_of(figure, 2)
    part = slice(shown[0], shown[1] + 1)
    mean = cf.time_average(np.asarray(run.loss), window)
    a.plot(run.times[part], run.loss[part], ".-", ms=3, lw=0.5, color=RUN, label="run")
    a.plot(run.times[part], mean[part], lw=2.5, alpha=0.5, color=RUN, label="averaged")
    predicted = central.mean_loss[part]
    a.plot(central.times[part], predicted, "--", color=CENTRAL, label="predicted mean")
    label = "at the flow's weights"
    a.plot(central.times[part], central.loss[part], color=GREY, lw=1.2, label=label)
    a.set_title("(a) Loss, a part of the run", loc="left", fontsize=10)

    # The first value of a run is unknown.
    trace = np.asarray(run.trace_covariance)[1:]
    b.semilogy(run.times[1:], trace, color=RUN, lw=0.5, alpha=0.5, label="run")
    mean = cf.time_average(trace, window)
    b.plot(run.times[1:], mean, lw=2.5, alpha=0.5, color=RUN, label="averaged")
    positive = np.asarray(central.trace_covariance) > 0
    times, values = central.times[positive], central.trace_covariance[positive]
    b.plot(times, values, "--", color=CENTRAL, label="predicted")
    b.set_title("(b) Squared distance from the average", loc="left", fontsize=10)
    for axes in (a, b):
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.legend(fontsize=7.5, frameon=False)
    return figure


def gallery():
    for path in sorted((HERE.parent / "examples").glob("*.py")):
        buffer = io.BytesIO()
        runpy.run_path(str(path))["main"](output=buffer)
        compress(buffer, HERE / "gallery" / f"{path.stem}.png")


if __name__ == "__main__":
    if sys.argv[1:] == ["gallery"]:
        gallery()
    else:
        for draw in (edge, valley, average):
            save(draw(), HERE / f"{draw.__name__}.png")
