"""A convolutional network at the edge of stability, by cross-entropy.

python examples/cnn.py

Gradient descent overshoots the edge on its way into it; the prediction starts after
that. The top eigenvalue then stays just below 2, which is the critical value, while the
loss falls to a third. The central flow goes through the averaged loss, holds the
eigenvalue and gives the size of the oscillation. Without the oscillation the stable
flow goes elsewhere: its weights are soon several times farther away from the run's.
"""

import jax

import centralflow as cf


def main(
    widths=(8, 16),
    size=500,
    learning_rate=0.1,
    warm_start=290,
    steps=300,
    output="cnn.png",
):
    """Train, predict, compare; returns the comparison."""
    objective = cf.Objective(cf.losses.cross_entropy, cf.data.digits(size))
    model = cf.models.CNN((8, 8), 10, widths, key=jax.random.key(0))
    optimizer = cf.GradientDescent(learning_rate)

    warm = cf.train(objective, model, optimizer, warm_start)
    problem = (objective, warm.model, optimizer, steps)
    start = dict(
        optimizer_state=warm.optimizer_state, weight_times=range(0, steps + 1, 4)
    )
    run = cf.train(*problem, **start, sharpness_every=10, sharpness_count=4)
    prediction = cf.predict(*problem, **start)
    stable = cf.predict(*problem, **start, flow=cf.StableFlow())
    cf.plot.comparison(run, prediction, stable=stable).savefig(output, dpi=150)
    return cf.compare(run, prediction)


if __name__ == "__main__":
    print(main())
