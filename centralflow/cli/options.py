"""Everything that determines the numbers of a run, as options of the command line."""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import models
from . import kinds

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


def _option(text: str, kind: Any = None, default: Any = None, **options: Any) -> Any:
    """An option; `default` says in the help what it is if it is not constant."""
    if default is not None:
        options["show_default"] = str(default)
    names = [options.pop("flag")] if "flag" in options else []
    return typer.Option(*names, help=text, **(kind or {}), **options)


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
            kinds.some_of(PROCESSES),
        ),
    ] = ",".join(PROCESSES)
    steps: Annotated[int, _option("Optimizer steps.", kinds.integer(2))] = 1000
    warm_start: Annotated[
        int,
        _option(
            "Steps of the optimizer before all processes start: so many that the "
            "sharpness is not above the critical one there, or the flow warns.",
            kinds.integer(0),
        ),
    ] = 0
    seed: Annotated[int, _option("Of the initial weights.", kinds.integer(0))] = 0
    data_seed: Annotated[int, _option("Of data that are drawn.", kinds.integer(0))] = 0
    float64: Annotated[
        bool, _option("Compute in float64 or in float32.", flag="--float64/--float32")
    ] = False

    optimizer: Annotated[
        OptimizerName, _option("The optimizer.", kinds.one_of(OptimizerName))
    ] = OptimizerName.gradient_descent
    learning_rate: Annotated[
        _Real,
        _option(
            "Of the optimizer; the largest of a schedule.",
            kinds.positive,
            "0.2; scalar-rmsprop 0.01, adam 0.005, nadam 0.003, rmsprop 0.0002",
        ),
    ] = None
    schedule: Annotated[
        ScheduleName,
        _option(
            "How the rate goes on after the warm-up, until the last step.",
            kinds.one_of(ScheduleName),
        ),
    ] = ScheduleName.constant
    warm_up: Annotated[
        int,
        _option(
            "Steps in which the rate rises linearly, counted, as the schedule is, from "
            "the first step of the warm start.",
            kinds.integer(0),
        ),
    ] = 0
    final_rate: Annotated[
        _Real,
        _option(
            "Where cosine and linear end, at the last step, over the largest rate.",
            kinds.share,
            0.0,
        ),
    ] = None
    beta: Annotated[
        _Real,
        _option("Decay of the momentum of heavy-ball and nesterov.", kinds.decay, 0.9),
    ] = None
    averaged: Annotated[
        bool | None,
        _option(
            "Whether the momentum m of heavy-ball and nesterov is an average of the "
            "gradients, m <- beta m + (1 - beta) g, or a sum, m <- beta m + g.",
            default="no-averaged",
            flag="--averaged/--no-averaged",
        ),
    ] = None
    beta1: Annotated[
        _Real, _option("Decay of the momentum of adam and nadam.", kinds.decay, 0.9)
    ] = None
    beta2: Annotated[
        _Real,
        _option(
            "Decay of the second moment of rmsprop, scalar-rmsprop, adam and nadam.",
            kinds.decay,
            "0.99; adam and nadam 0.999",
        ),
    ] = None
    eps: Annotated[
        _Real,
        _option(
            "Added to the root of the second moment, in the denominator of the step.",
            kinds.not_negative,
            1e-8,
        ),
    ] = None
    bias_correction: Annotated[
        bool | None,
        _option(
            "Whether the moments are corrected for their start at zero.",
            default="no-bias-correction; adam and nadam bias-correction",
            flag="--bias-correction/--no-bias-correction",
        ),
    ] = None

    data: Annotated[
        DataName,
        _option(
            "The data: images (digits, cifar10), labelled sentences (text), sequence "
            "tasks (sorting, copying), points (moons, circles), random labels.",
            kinds.one_of(DataName),
        ),
    ] = DataName.digits
    loss: Annotated[
        LossName,
        _option("The loss; logistic is for two classes.", kinds.one_of(LossName)),
    ] = LossName.squared_error
    size: Annotated[int, _option("Training examples.", kinds.integer(1))] = 1000
    test_size: Annotated[
        int,
        _option(
            "Examples to test on, or 0; those of text are in --test-path.",
            kinds.integer(0),
        ),
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
        str | None,
        _option(
            "Of cifar10, text and random, how many; or, of cifar10, a list of labels.",
            kinds.classes,
            "10; text 2",
        ),
    ] = None
    length: Annotated[
        _Count,
        _option(
            "Words of a sentence; symbols to sort or copy.",
            kinds.integer(1),
            "8; text 64",
        ),
    ] = None
    vocabulary: Annotated[
        _Count,
        _option(
            "Different tokens of text, or symbols to sort or copy.",
            kinds.integer(2),
            "8; text 10000",
        ),
    ] = None
    features: Annotated[
        _Count, _option("Inputs of random data.", kinds.integer(1), 10)
    ] = None
    noise: Annotated[
        _Real,
        _option(
            "Standard deviation, of the points' coordinates.",
            kinds.not_negative,
            "moons 0.1, circles 0.05",
        ),
    ] = None
    ratio: Annotated[
        _Real,
        _option(
            "Radius of the inner one of the circles; the outer is 1.", kinds.ratio, 0.5
        ),
    ] = None
    microbatch_size: Annotated[
        _Count,
        _option(
            "Examples that are differentiated at once, which bounds the memory; the "
            "derivatives are those of all.",
            kinds.integer(1),
            "all",
        ),
    ] = None

    model: Annotated[
        ModelName,
        _option(
            "The network: mlp is for images and points; cnn, resnet, vit for images; "
            "lstm, transformer, mamba for text and sequence tasks.",
            kinds.one_of(ModelName),
        ),
    ] = ModelName.mlp
    width: Annotated[
        _Count,
        _option(
            "Of the layers; not of cnn and resnet.", kinds.integer(1), "32; mlp 64"
        ),
    ] = None
    widths: Annotated[
        str | None,
        _option(
            "Channels of the layers of cnn and of the stages of resnet.",
            kinds.integers(1),
            "16,32",
        ),
    ] = None
    depth: Annotated[
        _Count,
        _option(
            "Layers or blocks; not of cnn.", kinds.integer(1), "2; resnet and lstm 1"
        ),
    ] = None
    groups: Annotated[
        _Count, _option("Groups of resnet's normalization.", kinds.integer(1), 4)
    ] = None
    heads: Annotated[
        _Count,
        _option("Heads of the attention of vit and transformer.", kinds.integer(1), 4),
    ] = None
    patch_size: Annotated[
        _Count,
        _option("Height and width of vit's patches, in pixels.", kinds.integer(1), 4),
    ] = None
    state_size: Annotated[
        _Count, _option("States of each of mamba's channels.", kinds.integer(1), 16)
    ] = None
    kernel_size: Annotated[
        _Count, _option("Length of mamba's convolution.", kinds.integer(1), 4)
    ] = None
    last_scale: Annotated[
        _Real,
        _option(
            "Multiplies the last layer's initial weights; not of mlp.",
            kinds.not_negative,
            1.0,
        ),
    ] = None

    substeps: Annotated[
        _Count,
        _option(
            "Fixed steps of the flow per optimizer step.", kinds.integer(1), "adaptive"
        ),
    ] = None
    rtol: Annotated[
        _Real, _option("Tolerance of the adaptive central flow.", kinds.positive, 0.01)
    ] = None
    block_size: Annotated[
        int,
        _option(
            "Eigenvectors the central flow starts with room for.", kinds.integer(1)
        ),
    ] = 8
    eigenvalues: Annotated[
        int,
        _option("Eigenvalues of P^-1 H to measure, or 0.", kinds.integer(0)),
    ] = 4
    eigenvalues_of: Annotated[
        str,
        _option(
            "Where to measure them, separated by commas: midpoint, at the midpoints of "
            "the discrete run, with the variances of its oscillation; discrete, at its "
            "iterates; stable, along the stable flow. For the latter two, "
            "preconditioners with a number for each weight are in memory for all steps "
            "between two checkpoints. Those of the central flow are always logged.",
            kinds.some_of(MEASURED),
        ),
    ] = "midpoint"
    eigenvalues_every: Annotated[
        _Count,
        _option(
            "Steps from one measurement to the next.", kinds.integer(1), "--log-every"
        ),
    ] = None
    log_every: Annotated[
        int,
        _option(
            "Steps from one logged step to the next. The weights at all of them "
            "between two checkpoints are in memory.",
            kinds.integer(1),
        ),
    ] = 10
    checkpoint_every: Annotated[
        _Count,
        _option(
            "Steps from one checkpoint to the next. The steps of an adaptive flow are "
            "short after each, so that many make it dearer.",
            kinds.integer(1),
            "about 500",
        ),
    ] = None
    watch: Annotated[
        str | None,
        _option(
            "Training examples whose network outputs are logged, by their numbers "
            "from 0.",
            kinds.integers(0),
            "0,1,2",
        ),
    ] = None
