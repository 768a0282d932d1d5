"""Losses of a model on a batch, each a mean over the examples.

A batch is `(inputs, targets)` or `(inputs, targets, mask)`:

- `inputs` is an array, or any PyTree of arrays, with a leading axis of N examples. The
    model is called with one example, which is `x` if `inputs` is one array and
    `(tokens, mask)` if `inputs` is such a pair: so a model that pools over the words of
    a text gets to know which of them are padding.
- `targets` have the shape of the model's outputs on all examples: `[N, out]`, or
    `[N, T, out]` for a model with outputs at each of T positions.
- `mask`, `[N, T]`, holds the weights of the positions, or booleans. The loss of an
    example is the weighted mean over its positions, and the loss the plain mean over
    the examples, as [`centralflow.Objective`][] needs it. Without a mask all weights
    are equal. Positions of weight zero add nothing to the loss or to a derivative, even
    if their outputs or targets are infinite or NaN (the model's own derivatives there
    must be finite). An example that has no others has the loss zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

Inputs = PyTree[Shaped[Array, "N ..."]]
Targets = Float[Array, "N ..."]
Mask = Float[Array, "N ..."] | Int[Array, "N ..."] | Bool[Array, "N ..."]
Batch = tuple[Inputs, Targets] | tuple[Inputs, Targets, Mask]


def squared_error(model: Callable, batch: Batch) -> Float[Array, ""]:
    """Half the squared error, summed over the outputs: (1/2) mean |model(x) - y|^2."""
    outputs, targets, mask = _evaluate(model, batch)
    return 0.5 * _mean(jnp.sum((outputs - targets) ** 2, axis=-1), mask)


def cross_entropy(model: Callable, batch: Batch) -> Float[Array, ""]:
    """The cross-entropy of softmax(model(x)) with the target distributions y."""
    outputs, targets, mask = _evaluate(model, batch)
    log_probabilities = jax.nn.log_softmax(outputs)
    return -_mean(jnp.sum(targets * log_probabilities, axis=-1), mask)


def logistic_loss(model: Callable, batch: Batch) -> Float[Array, ""]:
    """The binary cross-entropy of sigmoid(model(x)) with targets y, which are 0, 1 or
    probabilities between. The model has one output: the last axis has length 1."""
    outputs, targets, mask = _evaluate(model, batch)
    if outputs.shape[-1] != 1:
        raise ValueError(
            "`logistic_loss` is for models with one output, got "
            f"{outputs.shape[-1]}: use `cross_entropy`."
        )
    # softplus(z) - y z is the same, but cancels where z is large and y is 1.
    losses = targets * jax.nn.softplus(-outputs)
    losses += (1 - targets) * jax.nn.softplus(outputs)
    return _mean(losses[..., 0], mask)


def accuracy(model: Callable, batch: Batch) -> Float[Array, ""]:
    """The share of the examples, or of the positions of each, that are classified
    correctly, averaged as the losses are.

    The class is that of the largest output; of one output, as in
    [`centralflow.losses.logistic_loss`][], the sign, where positive stands for targets
    above 1/2.

    As a metric of `train` and `predict`:
    `metrics={"accuracy": lambda model: cf.losses.accuracy(model, data)}`. Its second
    derivatives are zero, so that a flow reports the accuracy at its weights, not the
    average over the oscillation.
    """
    outputs, targets, mask = _evaluate(model, batch)
    if outputs.shape[-1] == 1:
        correct = (outputs > 0)[..., 0] == (targets > 0.5)[..., 0]
    else:
        correct = jnp.argmax(outputs, axis=-1) == jnp.argmax(targets, axis=-1)
    return _mean(correct.astype(outputs.dtype), mask)


def _evaluate(model, batch):
    """The outputs and targets, both zero where the mask is, and the mask or `None`."""
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            "`batch` must be (inputs, targets) or (inputs, targets, mask), got "
            f"{type(batch).__name__}{length}."
        )
    if not callable(model):
        raise ValueError(f"`model` must be callable, got {type(model).__name__}.")
    inputs, targets, mask = batch if len(batch) == 3 else (*batch, None)
    outputs = jax.vmap(model)(inputs)
    if not hasattr(outputs, "shape"):
        raise ValueError(
            f"`model` must return one array for each example, got "
            f"{type(outputs).__name__}."
        )
    if not hasattr(targets, "shape"):
        raise ValueError(f"`targets` must be an array, got {type(targets).__name__}.")
    if outputs.shape != targets.shape or outputs.ndim < 2:
        raise ValueError(
            "The model's outputs on the batch and `targets` must have one shape, [N, "
            f"out] or [N, positions, out], got {outputs.shape} and {targets.shape}: "
            "give each example an axis of outputs, of length 1 if there is one."
        )
    if mask is None:
        return outputs, targets, None
    if mask.shape != outputs.shape[:-1] or mask.ndim < 2:
        raise ValueError(
            f"`mask` must have the shape [N, positions] where the outputs have [N, "
            f"positions, out], got {mask.shape} and {outputs.shape}. Examples are left "
            "out by leaving them out of the data, not by a mask."
        )
    # Replaced rather than multiplied by zero: zero times infinity is no zero.
    keep = (mask != 0)[..., None]
    return jnp.where(keep, outputs, 0), jnp.where(keep, targets, 0), mask


def _mean(values, mask):
    """The mean over examples of the weighted mean over positions."""
    if mask is None:
        return jnp.mean(values)
    positions = tuple(range(1, values.ndim))
    weights = mask.astype(values.dtype)
    total = jnp.sum(weights, axis=positions)
    sums = jnp.sum(weights * values, axis=positions)
    return jnp.mean(sums / jnp.where(total == 0, 1, total))
