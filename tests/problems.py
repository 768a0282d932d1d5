"""Problems that the tests share."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import centralflow as cf
from centralflow.precision import full_precision


def tiny_network(dtype, width=6, examples=11, inputs=3, outputs=2, seed=0):
    """A network of two tanh layers with random data, and its objective's arguments."""
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    model = dict(
        A=array(width, inputs), b=array(width), C=array(outputs, width) / width
    )
    data = (array(examples, inputs), array(examples, outputs))
    return model, data


@full_precision
def tiny_loss(model, batch):
    x, y = batch
    hidden = jnp.tanh(x @ model["A"].T + model["b"])
    return 0.5 * jnp.mean(jnp.sum((hidden @ model["C"].T - y) ** 2, axis=1))


def parabola(eps):
    """f(x, y) = (y + x) x^2 / 2 - eps (x + y). The sharpness is y to leading order."""
    return cf.Objective(lambda w: (w[1] + w[0]) * w[0] ** 2 / 2 - eps * (w[0] + w[1]))


def reference(name):
    """A published run: its arrays, its configuration, the objective and the weights."""
    with np.load(Path(__file__).parent / "reference" / f"{name}.npz") as file:
        arrays = dict(file)
    config = json.loads(str(arrays["config"]))
    model, start = {}, 0
    for layer, shape in config["layers"]:
        size = int(np.prod(shape))
        model[layer] = jnp.asarray(arrays["w0"][start : start + size].reshape(shape))
        start += size
    data = (
        jnp.asarray(arrays["x"].reshape(len(arrays["x"]), -1)),
        jax.nn.one_hot(arrays["y"], 10),
    )

    @full_precision
    def loss(model, batch):
        x, y = batch
        for layer in ("1", "3"):
            x = x @ model[f"{layer}.weight"].T + model[f"{layer}.bias"]
            x = jax.nn.gelu(x, approximate=False)
        x = x @ model["5.weight"].T + model["5.bias"]
        return 0.5 * jnp.mean(jnp.sum((x - y) ** 2, axis=1))

    return arrays, config, cf.Objective(loss, data), model
