"""Losses of a model on a batch, each a mean over the examples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def squared_error(
    model: Callable, batch: tuple[Float[Array, "N ..."], Float[Array, "N out"]]
) -> Float[Array, ""]:
    """Half the squared error, summed over the outputs: (1/2) mean |model(x) - y|^2."""
    inputs, targets = batch
    errors = jax.vmap(model)(inputs) - targets
    return 0.5 * jnp.mean(jnp.sum(errors**2, axis=-1))


def cross_entropy(
    model: Callable, batch: tuple[Float[Array, "N ..."], Float[Array, "N out"]]
) -> Float[Array, ""]:
    """The cross-entropy of softmax(model(x)) with the target distributions y."""
    inputs, targets = batch
    log_probabilities = jax.nn.log_softmax(jax.vmap(model)(inputs))
    return -jnp.mean(jnp.sum(targets * log_probabilities, axis=-1))
