"""From settings to what the library takes: data, model, loss, optimizer, flow."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

from .. import data, losses
from ..flows import CentralFlow
from ..objective import FlatObjective, Objective
from ..optimizers import (
    AbstractOptimizer,
    Adam,
    GradientDescent,
    HeavyBall,
    NAdam,
    Nesterov,
    RMSProp,
    ScalarRMSProp,
)
from .errors import blame, wrong
from .options import MODELS, Settings
from .settings import integers

_IMAGES, _POINTS, _TOKENS = "images", "points", "tokens"
_KINDS = {
    "digits": _IMAGES,
    "cifar10": _IMAGES,
    "text": _TOKENS,
    "sorting": _TOKENS,
    "copying": _TOKENS,
    "moons": _POINTS,
    "circles": _POINTS,
    "random": _POINTS,
}
_TAKES = {
    "mlp": (_IMAGES, _POINTS),
    "cnn": (_IMAGES,),
    "resnet": (_IMAGES,),
    "vit": (_IMAGES,),
    "lstm": (_TOKENS,),
    "transformer": (_TOKENS,),
    "mamba": (_TOKENS,),
}
_LOSSES = {
    "squared-error": losses.squared_error,
    "cross-entropy": losses.cross_entropy,
    "logistic": losses.logistic_loss,
}
# With the options that each has besides the learning rate.
_OPTIMIZERS = {
    "gradient-descent": (GradientDescent, ()),
    "rmsprop": (RMSProp, ("beta2", "eps", "bias_correction")),
    "scalar-rmsprop": (ScalarRMSProp, ("beta2", "eps", "bias_correction")),
    "heavy-ball": (HeavyBall, ("beta", "averaged")),
    "nesterov": (Nesterov, ("beta", "averaged")),
    "adam": (Adam, ("beta1", "beta2", "eps", "bias_correction")),
    "nadam": (NAdam, ("beta1", "beta2", "eps", "bias_correction")),
}
_DIGITS = 1797


class Schedule(eqx.Module):
    """A linear rise to `peak` in `warm_up` steps; from there, constant or, along half a
    period of a cosine or a line, down to `final` times the peak at step `end`."""

    peak: float
    warm_up: int
    end: int
    final: float | None
    shape: str = eqx.field(static=True, default="cosine")

    def __call__(self, step: Float[Array, ""]) -> Float[Array, ""]:
        rate = jnp.asarray(self.peak, step.dtype)
        if self.final is not None:
            share = (step - self.warm_up) / max(self.end - self.warm_up, 1)
            left = 1 - jnp.clip(share, 0, 1)
            if self.shape == "cosine":
                left = (1 - jnp.cos(jnp.pi * left)) / 2
            rate = rate * (self.final + (1 - self.final) * left)
        if self.warm_up:  # the first step already moves
            rise = (step + 1) / (self.warm_up + 1)
            rate = jnp.where(step < self.warm_up, self.peak * rise, rate)
        return rate


class Mean(eqx.Module):
    """The mean of a function of model and batch over a data set, as a metric."""

    objective: Objective

    def __call__(self, model: PyTree) -> Float[Array, ""]:
        weights, flat = self.objective.flatten(model)
        return flat.loss(weights)


class Outputs(eqx.Module):
    """The outputs of the model on a few examples, as a metric."""

    inputs: PyTree

    def __call__(self, model: Callable) -> Float[Array, "..."]:
        return jax.vmap(model)(self.inputs)


@dataclasses.dataclass(frozen=True)
class Problem:
    """`plain` are the metrics that are logged; `predicted` those with a predicted
    time-average that differs, which is logged too."""

    objective: Objective
    optimizer: AbstractOptimizer
    flow: CentralFlow
    flat: FlatObjective
    weights: Float[Array, " n"]
    plain: dict[str, Callable]
    predicted: dict[str, Callable]


def build(settings: Settings) -> Problem:
    """Raises `typer.BadParameter` with the name of an option."""
    s = settings
    train, test = _data(s)
    model = _model(s, train)
    loss = _LOSSES[s.loss]
    on = lambda fn, batch: Objective(fn, batch, microbatch_size=s.microbatch_size)
    objective = on(loss, train)
    weights, flat = objective.flatten(model)
    watched = jnp.asarray(integers(s.watch))
    predicted = dict(outputs=Outputs(jax.tree.map(lambda x: x[watched], train[0])))
    plain = predicted | dict(accuracy=Mean(on(losses.accuracy, train)))
    if test is not None:
        predicted["test_loss"] = plain["test_loss"] = Mean(on(loss, test))
        plain["test_accuracy"] = Mean(on(losses.accuracy, test))
    with blame("block_size", vars(s)):
        flow = CentralFlow(s.substeps, block_size=s.block_size)
    for name in ("eigenvalues", "block_size"):
        if (value := getattr(s, name)) > weights.size:
            raise wrong(
                name,
                f"{value} is more than the model has parameters: give {weights.size} "
                "or less.",
            )
    return Problem(objective, _optimizer(s), flow, flat, weights, plain, predicted)


def _optimizer(s: Settings) -> AbstractOptimizer:
    rate: Any = s.learning_rate
    if s.schedule != "constant" or s.warm_up:
        end = s.warm_start + s.steps
        rate = Schedule(rate, s.warm_up, end, s.final_rate, str(s.schedule))
    kind, names = _OPTIMIZERS[s.optimizer]
    with blame("optimizer", vars(s)):
        return kind(rate, **{name: getattr(s, name) for name in names})


def _model(s: Settings, batch: tuple) -> PyTree:
    kind = _KINDS[s.data]
    if kind not in _TAKES[s.model]:
        fitting = [name for name, taken in _TAKES.items() if kind in taken]
        raise wrong(
            "model", f"{s.model} is not for --data {s.data}: {', '.join(fitting)} is."
        )
    inputs, targets = batch[:2]
    out = targets.shape[-1]
    names = ("width", "depth", "groups", "heads", "state_size", "kernel_size")
    sizes = {k: v for k in names if (v := getattr(s, k)) is not None}
    if s.widths is not None:
        sizes["widths"] = tuple(integers(s.widths))
    for name in ("patch_size", "last_scale"):
        if getattr(s, name) is not None:
            sizes[name] = getattr(s, name)
    if s.model == "mlp":
        shape = (int(np.prod(inputs.shape[1:])), out)
    elif kind == _IMAGES:
        shape = (inputs.shape[1:], out)
    else:
        # Of a task, the symbols and the separator.
        tokens = s.vocabulary if s.data == "text" else s.vocabulary + 1
        sizes["pool"] = s.data == "text"
        shape = (tokens, out)
        if s.model == "transformer":
            sizes["length"] = jax.tree.leaves(inputs)[0].shape[1]
    with blame("model", vars(s)):
        return MODELS[s.model](*shape, **sizes, key=jr.key(s.seed))


def _data(s: Settings) -> tuple[tuple, tuple | None]:
    """Training and test data, the latter `None` if there are none."""
    with blame("data" if s.path is None else "path", vars(s)):
        train, test = _READERS[s.data](s)
    if s.loss == "logistic":
        if train[1].shape[-1] != 2:
            raise wrong(
                "loss",
                f"logistic is for 2 classes, and --data {s.data} has "
                f"{train[1].shape[-1]}: take another.",
            )
        one = lambda batch: None if batch is None else (batch[0], batch[1][..., 1:])
        train, test = one(train), one(test)
    return train, test


def _digits(s: Settings) -> tuple[tuple, tuple | None]:
    if s.size + s.test_size > _DIGITS:
        raise wrong(
            "size",
            f"{s.size} and --test-size {s.test_size} together exceed the {_DIGITS} "
            "digits: lower one of them.",
        )
    both = data.digits(s.size + s.test_size)
    part = lambda where: tuple(x[where] for x in both)
    return part(slice(s.size)), part(slice(s.size, None)) if s.test_size else None


def _cifar10(s: Settings) -> tuple[tuple, tuple | None]:
    # A number, or a list of labels.
    classes = integers(s.classes) if "," in s.classes else int(s.classes)
    train = data.cifar10(s.path, s.size, classes)
    if not s.test_size:
        return train, None
    with blame("test_size"):
        return train, data.cifar10(s.path, s.test_size, classes, "test")


def _text(s: Settings) -> tuple[tuple, tuple | None]:
    words = data.frequent_words(s.path, max(s.vocabulary - 2, 1), s.size)
    words = words[: s.vocabulary - 2]
    read = lambda path, size: data.text_classification(
        path, size, s.length, words, int(s.classes)
    )
    train = read(s.path, s.size)
    if s.test_path is None or not s.test_size:
        return train, None
    with blame("test_path"):
        return train, read(s.test_path, s.test_size)


def _drawn(draw: Callable) -> Callable:
    """Data that are drawn: those to test on with another key."""

    def read(s: Settings) -> tuple[tuple, tuple | None]:
        keys = jr.split(jr.key(s.data_seed))
        test = draw(s, s.test_size, keys[1]) if s.test_size else None
        return draw(s, s.size, keys[0]), test

    return read


_READERS = {
    "digits": _digits,
    "cifar10": _cifar10,
    "text": _text,
    "sorting": _drawn(lambda s, n, k: data.sorting(n, s.length, s.vocabulary, key=k)),
    "copying": _drawn(lambda s, n, k: data.copying(n, s.length, s.vocabulary, key=k)),
    "moons": _drawn(lambda s, n, k: data.moons(n, s.noise, key=k)),
    "circles": _drawn(lambda s, n, k: data.circles(n, s.noise, s.ratio, key=k)),
    "random": _drawn(
        lambda s, n, k: data.random_classification(n, s.features, int(s.classes), key=k)
    ),
}
