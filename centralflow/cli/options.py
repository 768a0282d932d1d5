"""Everything that determines the numbers of a run, as options of the command line."""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import models

MODELS = {
    "mlp": models.MLP,
    "cnn": models.CNN,
    "resnet": models.ResNet,
    "vit": models.ViT,
    "lstm": models.LSTM,
    "transformer": models.Transformer,
    "mamba": models.Mamba,
}
PROCESSES = ("discrete", "midpoint", "central", "stable")
MEASURED = ("midpoint", "discrete", "stable")


class OptimizerName(StrEnum):
    gradient_descent = "gradient-descent"
    rmsprop = "rmsprop"
    scalar_rmsprop = "scalar-rmsprop"
    heavy_ball = "heavy-ball"
    nesterov = "nesterov"
    adam = "adam"
    nadam = "nadam"


class ScheduleName(StrEnum):
    constant = "constant"
    cosine = "cosine"
    linear = "linear"


class DataName(StrEnum):
    digits = "digits"
    cifar10 = "cifar10"
    text = "text"
    sorting = "sorting"
    copying = "copying"
    moons = "moons"
    circles = "circles"
    random = "random"


class LossName(StrEnum):
    squared_error = "squared-error"
    cross_entropy = "cross-entropy"
    logistic = "logistic"


ModelName = StrEnum("ModelName", {name: name for name in MODELS})


def _positive(value: float | None) -> float | None:
    if value is not None and not 0 < value < np.inf:
        raise typer.BadParameter(f"{value:g} is not a positive number.")
    return value


def _integers(text: str | None) -> str | None:
    """Comma-separated integers that are not negative."""
    if text is not None and not all(x.strip().isdecimal() for x in text.split(",")):
        raise typer.BadParameter(f"{text!r} is not a list such as 16,32.")
    return text


def _some_of(known: tuple[str, ...], text: str) -> str:
    """Comma-separated names, each known and given once, in the order of `known`."""
    names = text.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(known)}.")
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"{text!r} names a process twice.")
    return ",".join(name for name in known if name in names)


def _processes(text: str) -> str:
    names = _some_of(PROCESSES, text)
    if "midpoint" in names and "discrete" not in names:
        raise typer.BadParameter("midpoint needs discrete, whose midpoints they are.")
    return names


def _measured(text: str) -> str:
    return _some_of(MEASURED, text)


def _option(text: str, default: Any = None, **options: Any) -> Any:
    """An option; `default` says in the help what it is if it is not constant."""
    if default is not None:
        options["show_default"] = str(default)
    names = [options.pop("flag")] if "flag" in options else []
    return typer.Option(*names, help=text, **options)


_Count = int | None
_Real = float | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `centralflow run` by name, but for those of the output."""

    processes: Annotated[
        str,
        _option(
            "What to run side by side, separated by commas: the discrete optimizer, "
            "its second-order midpoints, the central flow, the stable flow.",
            callback=_processes,
        ),
    ] = ",".join(PROCESSES)
    steps: Annotated[int, _option("Optimizer steps.", min=2)] = 1000
    warm_start: Annotated[
        int,
        _option(
            "Steps of the optimizer before all processes start: so many that the "
            "sharpness is not above the critical one there, or the flow warns.",
            min=0,
        ),
    ] = 0
    seed: Annotated[int, _option("Of the initial weights.", min=0)] = 0
    data_seed: Annotated[int, _option("Of data that are drawn.", min=0)] = 0
    float64: Annotated[
        bool, _option("Compute in float64 or in float32.", flag="--float64/--float32")
    ] = False

    optimizer: Annotated[OptimizerName, _option("The optimizer.")] = (
        OptimizerName.gradient_descent
    )
    learning_rate: Annotated[
        _Real,
        _option(
            "Of the optimizer; the largest of a schedule.",
            "0.2; scalar-rmsprop 0.01, adam 0.005, nadam 0.003, rmsprop 0.0002",
            callback=_positive,
        ),
    ] = None
    schedule: Annotated[
        ScheduleName,
        _option("How the rate goes on after the warm-up, until the last step."),
    ] = ScheduleName.constant
    warm_up: Annotated[
        int,
        _option(
            "Steps in which the rate rises linearly, counted, as the schedule is, from "
            "the first step of the warm start.",
            min=0,
        ),
    ] = 0
    final_rate: Annotated[
        _Real,
        _option(
            "Where cosine and linear end, at the last step, over the largest rate.",
            0.0,
            min=0,
            max=1,
        ),
    ] = None
    beta: Annotated[
        _Real, _option("Decay of the momentum of heavy-ball and nesterov.", 0.9)
    ] = None
    averaged: Annotated[
        bool | None,
        _option(
            "Whether the momentum m of heavy-ball and nesterov is an average of the "
            "gradients, m <- beta m + (1 - beta) g, or a sum, m <- beta m + g.",
            "no-averaged",
            flag="--averaged/--no-averaged",
        ),
    ] = None
    beta1: Annotated[
        _Real, _option("Decay of the momentum of adam and nadam.", 0.9)
    ] = None
    beta2: Annotated[
        _Real,
        _option(
            "Decay of the second moment of rmsprop, scalar-rmsprop, adam and nadam.",
            "0.99; adam and nadam 0.999",
        ),
    ] = None
    eps: Annotated[
        _Real,
        _option(
            "Added to the root of the second moment, in the denominator of the step.",
            1e-8,
        ),
    ] = None
    bias_correction: Annotated[
        bool | None,
        _option(
            "Whether the moments are corrected for their start at zero.",
            "no-bias-correction; adam and nadam bias-correction",
            flag="--bias-correction/--no-bias-correction",
        ),
    ] = None

    data: Annotated[
        DataName,
        _option(
            "The data: images (digits, cifar10), labelled sentences (text), sequence "
            "tasks (sorting, copying), points (moons, circles), random labels."
        ),
    ] = DataName.digits
    loss: Annotated[LossName, _option("The loss; logistic is for two classes.")] = (
        LossName.squared_error
    )
    size: Annotated[int, _option("Training examples.", min=1)] = 1000
    test_size: Annotated[
        int,
        _option("Examples to test on, or 0; those of text are in --test-path.", min=0),
    ] = 200
    path: Annotated[
        Path | None,
        _option(
            "CIFAR-10's folder or archive, or the tab-separated file of text with the "
            "columns sentence and label.",
            resolve_path=True,
        ),
    ] = None
    test_path: Annotated[
        Path | None, _option("The file of text to test on.", resolve_path=True)
    ] = None
    classes: Annotated[
        _Count, _option("Of cifar10 (the first), text, random.", "10; text 2", min=2)
    ] = None
    length: Annotated[
        _Count,
        _option("Words of a sentence; symbols to sort or copy.", "8; text 64", min=1),
    ] = None
    vocabulary: Annotated[
        _Count,
        _option(
            "Different tokens of text, or symbols to sort or copy.",
            "8; text 10000",
            min=2,
        ),
    ] = None
    features: Annotated[_Count, _option("Inputs of random data.", 10, min=1)] = None
    noise: Annotated[
        _Real,
        _option(
            "Standard deviation, of the points' coordinates.",
            "moons 0.1, circles 0.05",
            min=0,
        ),
    ] = None
    microbatch_size: Annotated[
        _Count,
        _option(
            "Examples that are differentiated at once, which bounds the memory; the "
            "derivatives are those of all.",
            "all",
            min=1,
        ),
    ] = None

    model: Annotated[
        ModelName,
        _option(
            "The network: mlp is for images and points; cnn, resnet, vit for images; "
            "lstm, transformer, mamba for text and sequence tasks."
        ),
    ] = ModelName.mlp
    width: Annotated[
        _Count, _option("Of the layers; not of cnn and resnet.", "32; mlp 64", min=1)
    ] = None
    widths: Annotated[
        str | None,
        _option(
            "Channels of the layers of cnn and of the stages of resnet.",
            "16,32",
            callback=_integers,
        ),
    ] = None
    depth: Annotated[
        _Count, _option("Layers or blocks; not of cnn.", "2; resnet and lstm 1", min=1)
    ] = None
    groups: Annotated[
        _Count, _option("Groups of resnet's normalization.", 4, min=1)
    ] = None
    heads: Annotated[
        _Count, _option("Heads of the attention of vit and transformer.", 4, min=1)
    ] = None
    patch_size: Annotated[
        _Count, _option("Height and width of vit's patches, in pixels.", 4, min=1)
    ] = None
    state_size: Annotated[
        _Count, _option("States of each of mamba's channels.", 16, min=1)
    ] = None
    kernel_size: Annotated[
        _Count, _option("Length of mamba's convolution.", 4, min=1)
    ] = None
    last_scale: Annotated[
        _Real,
        _option("Multiplies the last layer's initial weights; not of mlp.", 1.0, min=0),
    ] = None

    substeps: Annotated[
        _Count,
        _option("Fixed steps of the flow per optimizer step.", "adaptive", min=1),
    ] = None
    rtol: Annotated[_Real, _option("Tolerance of the adaptive central flow.", 0.01)] = (
        None
    )
    block_size: Annotated[
        int,
        _option("Eigenvectors the central flow starts with room for.", min=1),
    ] = 8
    eigenvalues: Annotated[
        int,
        _option("Eigenvalues of P^-1 H to measure, or 0.", min=0),
    ] = 4
    eigenvalues_of: Annotated[
        str,
        _option(
            "Where to measure them, separated by commas: midpoint, at the midpoints of "
            "the discrete run, with the variances of its oscillation; discrete, at its "
            "iterates; stable, along the stable flow. For the latter two, "
            "preconditioners with a number for each weight are in memory for all steps "
            "between two checkpoints. Those of the central flow are always logged.",
            callback=_measured,
        ),
    ] = "midpoint"
    eigenvalues_every: Annotated[
        _Count,
        _option("Steps from one measurement to the next.", "--log-every", min=1),
    ] = None
    log_every: Annotated[
        int,
        _option(
            "Steps from one logged step to the next. The weights at all of them "
            "between two checkpoints are in memory.",
            min=1,
        ),
    ] = 10
    checkpoint_every: Annotated[
        _Count,
        _option(
            "Steps from one checkpoint to the next. The steps of an adaptive flow are "
            "short after each, so that many make it dearer.",
            "about 500",
            min=1,
        ),
    ] = None
    watch: Annotated[
        str,
        _option(
            "Training examples whose network outputs are logged, by their numbers "
            "from 0.",
            callback=_integers,
        ),
    ] = "0,1,2"
