"""Predict the training of a network of your own.

python examples/own_network.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import centralflow as cf


class Network(eqx.Module):
    """Two tanh layers with a residual connection."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear
    last: eqx.nn.Linear

    def __init__(self, width, key):
        keys = jax.random.split(key, 3)
        self.first = eqx.nn.Linear(64, width, key=keys[0])
        self.second = eqx.nn.Linear(width, width, key=keys[1])
        self.last = eqx.nn.Linear(width, 10, key=keys[2])

    def __call__(self, image):
        x = jnp.tanh(self.first(jnp.ravel(image)))
        return self.last(x + jnp.tanh(self.second(x)))


def loss(model, batch):
    """Must be a mean over the examples of the batch."""
    images, labels = batch
    return jnp.mean((jax.vmap(model)(images) - labels) ** 2)


def main(
    width=40,
    size=500,
    learning_rate=0.5,
    warm_start=20,
    steps=300,
    output="own_network.png",
):
    """Train, predict, compare; returns the comparison."""
    objective = cf.Objective(loss, cf.data.digits(size))
    model = Network(width, jax.random.key(0))
    optimizer = cf.GradientDescent(learning_rate)

    warm = cf.train(objective, model, optimizer, warm_start)
    start = dict(
        steps=steps,
        optimizer_state=warm.optimizer_state,
        weight_times=range(0, steps + 1, 4),
    )
    run = cf.train(
        objective, warm.model, optimizer, **start, sharpness_every=10, sharpness_count=4
    )
    prediction = cf.predict(objective, warm.model, optimizer, **start)
    report = cf.compare(run, prediction)
    cf.plot.comparison(run, prediction).savefig(output, dpi=150)
    return report


if __name__ == "__main__":
    print(main())
