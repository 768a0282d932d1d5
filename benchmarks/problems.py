"""The problems whose predictions the benchmarks time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import centralflow as cf
from tests.problems import reference


class Problem(NamedTuple):
    name: str
    objective: cf.Objective
    model: Any
    optimizer: cf.AbstractOptimizer
    optimizer_state: Any = None

    def train(self, steps: int, **options: Any) -> cf.Trajectory:
        return cf.train(*self[1:4], steps, optimizer_state=self[4], **options)

    def predict(self, steps: int, **options: Any) -> cf.Trajectory:
        return cf.predict(*self[1:4], steps, optimizer_state=self[4], **options)

    def after(self, steps: int) -> "Problem":
        """The same from where the optimizer is after some steps."""
        run = self.train(steps)
        return self._replace(model=run.model, optimizer_state=run.optimizer_state)


def gradient_descent() -> Problem:
    """8,970 parameters, 1,000 digits; up to three critical eigenvalues."""
    _, config, objective, model = reference("gd_mlp_digits")
    rate = config["learning_rate"]
    return Problem("GD", objective, model, cf.GradientDescent(rate))


def many_critical() -> Problem:
    """Of the same size, with three critical eigenvalues for most of the time."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(1000))
    model = cf.models.MLP(64, 10, key=jax.random.key(0))
    problem = Problem("GD, lr 0.7", objective, model, cf.GradientDescent(0.7))
    return problem.after(86)  # the first steps overshoot the edge


def seven_critical() -> Problem:
    """Six on average; the run starts above the edge, and jumps."""
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(500))
    model = cf.models.MLP(64, 10, key=jax.random.key(0))
    return Problem("GD, lr 1.4", objective, model, cf.GradientDescent(1.4)).after(100)


def rmsprop() -> Problem:
    _, c, objective, model = reference("rmsprop_mlp_digits")
    optimizer = cf.RMSProp(
        c["learning_rate"], c["beta2"], c["eps"], c["bias_correction"]
    )
    return Problem("RMSProp", objective, model, optimizer).after(c["warm_start"])


def scalar_rmsprop() -> Problem:
    """The network of `gradient_descent`, at the edge from about step 400 on."""
    _, _, objective, model = reference("gd_mlp_digits")
    optimizer = cf.ScalarRMSProp(0.01, 0.99, 1e-7, bias_correction=True)
    return Problem("Scalar RMSProp", objective, model, optimizer)


def cross_entropy() -> Problem:
    """At the edge early on only: the sharpness falls with the loss."""
    objective = cf.Objective(cf.losses.cross_entropy, cf.data.digits(500))
    model = cf.models.MLP(64, 10, key=jax.random.key(0))
    return Problem("GD, cross-entropy", objective, model, cf.GradientDescent(0.2))


def _logistic(model, data):
    x, sign = data
    weights, bias = model
    return jnp.mean(jax.nn.softplus(-sign * (x @ weights + bias)))


def separable() -> Problem:
    """A logistic regression, two separable classes: the loss falls to 2e-7 in 4,000
    steps. At the edge in between."""
    rng = np.random.default_rng(7)
    x, teacher = rng.normal(size=(60, 5)), rng.normal(size=5)
    x = x[np.abs(x @ teacher) > 0.3]
    data = jnp.asarray(x, jnp.float32), jnp.asarray(np.sign(x @ teacher), jnp.float32)
    model = jnp.zeros(5, jnp.float32), jnp.zeros((), jnp.float32)
    optimizer = cf.RMSProp(0.02, 0.99, 1e-7, bias_correction=True)
    return Problem("RMSProp", cf.Objective(_logistic, data), model, optimizer)


def convolutional() -> Problem:
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(200))
    model = cf.models.CNN((8, 8), 10, (6, 12), key=jax.random.key(0))
    return Problem("GD, CNN", objective, model, cf.GradientDescent(0.1))


def sorting() -> Problem:
    """A Transformer that sorts four numbers, at the edge."""
    length, vocabulary = 4, 4
    data = cf.data.sorting(200, length, vocabulary, key=jax.random.key(1))
    tokens = (vocabulary + 1, vocabulary + 1)
    model = cf.models.Transformer(*tokens, 2 * length, 12, 1, 2, key=jax.random.key(0))
    objective = cf.Objective(cf.losses.squared_error, data)
    optimizer = cf.GradientDescent(0.116)
    return Problem("GD, Transformer", objective, model, optimizer).after(600)
