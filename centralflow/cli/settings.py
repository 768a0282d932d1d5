"""Everything that determines the numbers of a run, as options of the command line."""

import dataclasses
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .. import models
from .errors import flag, wrong

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


class OptimizerName(StrEnum):
    gradient_descent = "gradient-descent"
    rmsprop = "rmsprop"
    scalar_rmsprop = "scalar-rmsprop"


class ScheduleName(StrEnum):
    constant = "constant"
    cosine = "cosine"


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


def _processes(text: str) -> str:
    names = text.split(",")
    for name in names:
        if name not in PROCESSES:
            known = ", ".join(PROCESSES)
            raise typer.BadParameter(f"{name!r} is none of {known}.")
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"{text!r} names a process twice.")
    if "midpoint" in names and "discrete" not in names:
        raise typer.BadParameter("midpoint needs discrete, whose midpoints they are.")
    return ",".join(name for name in PROCESSES if name in names)


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
        _option("Steps of the optimizer before all processes start.", min=0),
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
        float,
        _option("Of the optimizer; the largest of a schedule.", callback=_positive),
    ] = 0.2
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
        _option("Where the cosine ends, over the largest rate.", 0.0, min=0, max=1),
    ] = None
    beta2: Annotated[_Real, _option("Decay of RMSProp's second moment.", 0.99)] = None
    eps: Annotated[
        _Real, _option("Added to the root in RMSProp's denominator.", 1e-8)
    ] = None
    bias_correction: Annotated[
        bool | None,
        _option(
            "Whether RMSProp corrects the bias of its second moment.",
            "no-bias-correction",
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
        _option("Eigenvalues to measure of the discrete run, or 0.", min=0),
    ] = 4
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


_SEQUENCES = ("lstm", "transformer", "mamba")
_RMSPROP = ("rmsprop", "scalar-rmsprop")
# Which options are only for some choices of another, and their defaults, if those are
# not the model's: one, or by choice.
_ONLY: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "final_rate": ("schedule", ("cosine",), 0.0),
    "beta2": ("optimizer", _RMSPROP, 0.99),
    "eps": ("optimizer", _RMSPROP, 1e-8),
    "bias_correction": ("optimizer", _RMSPROP, False),
    "path": ("data", ("cifar10", "text"), None),
    "test_path": ("data", ("text",), None),
    "classes": ("data", ("cifar10", "text", "random"), dict(text=2, default=10)),
    "length": ("data", ("text", "sorting", "copying"), dict(text=64, default=8)),
    "vocabulary": (
        "data",
        ("text", "sorting", "copying"),
        dict(text=10_000, default=8),
    ),
    "features": ("data", ("random",), 10),
    "noise": ("data", ("moons", "circles"), dict(moons=0.1, circles=0.05)),
    "width": ("model", ("mlp", "vit", *_SEQUENCES), None),
    "widths": ("model", ("cnn", "resnet"), "16,32"),
    "depth": ("model", ("mlp", "resnet", "vit", *_SEQUENCES), None),
    "groups": ("model", ("resnet",), None),
    "heads": ("model", ("vit", "transformer"), None),
    "patch_size": ("model", ("vit",), 4),
    "state_size": ("model", ("mamba",), None),
    "kernel_size": ("model", ("mamba",), None),
    "last_scale": ("model", ("cnn", "resnet", "vit", *_SEQUENCES), None),
}


def complete(settings: Settings) -> Settings:
    """The settings with every default that depends on others, once they fit together.

    Raises `typer.BadParameter` with the name of the option if they do not."""
    found = {}
    for name, (choice, allowed, default) in _ONLY.items():
        chosen, value = getattr(settings, choice), getattr(settings, name)
        if chosen not in allowed and value is not None:
            raise wrong(
                name, f"it is for {flag(choice)} {', '.join(allowed)}, not {chosen}."
            )
        if chosen in allowed and value is None:
            if isinstance(default, dict):
                default = default.get(chosen, default.get("default"))
            if default is None and choice == "model":
                default = inspect.signature(MODELS[chosen]).parameters[name].default
            found[name] = default
    if settings.path is None and settings.data in ("cifar10", "text"):
        raise wrong("path", f"--data {settings.data} needs it.")
    log, eigen = settings.log_every, settings.eigenvalues_every
    eigen = found["eigenvalues_every"] = log if eigen is None else eigen
    every = settings.checkpoint_every
    if every is None:
        every = found["checkpoint_every"] = max(1, round(500 / eigen)) * eigen
    _check_multiple("eigenvalues_every", eigen, "log_every", log)
    _check_multiple("checkpoint_every", every, "eigenvalues_every", eigen)
    for index in integers(settings.watch):
        if index >= settings.size:
            raise wrong("watch", f"there is no example {index} of {settings.size}.")
    return dataclasses.replace(settings, **found)


def _check_multiple(name: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        raise wrong(name, f"{value} is not a multiple of {flag(of)} {unit}.")


def integers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def to_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain values."""
    plain = lambda x: str(x) if isinstance(x, StrEnum | Path) else x
    return {k: plain(v) for k, v in dataclasses.asdict(settings).items()}


def from_json(values: dict[str, Any]) -> Settings:
    """What `to_json` made; raises `ValueError` or `TypeError` for anything else."""
    types = dict(
        optimizer=OptimizerName,
        schedule=ScheduleName,
        data=DataName,
        loss=LossName,
        model=ModelName,
    )
    types |= dict(path=Path, test_path=Path)
    make = lambda k, v: v if v is None or k not in types else types[k](v)
    return Settings(**{k: make(k, v) for k, v in values.items()})


def with_options(command: Callable) -> Callable:
    """A command of `(given, ..., **settings)` with the fields of `Settings` as options,
    where `given` are the names of the parameters that the user gave."""

    def call(context, **values):
        source = context.get_parameter_source
        given = {k for k in values if getattr(source(k), "name", "") == "COMMANDLINE"}
        return command(given, **values)

    _, *own, _ = inspect.signature(command).parameters.values()
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter("context", keyword, annotation=typer.Context),
        *(parameter.replace(kind=keyword) for parameter in own),
        *(
            inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type)
            for f in dataclasses.fields(Settings)
        ),
    ]
    options = lambda **values: call(**values)  # without annotations of its own
    options.__name__, options.__doc__ = command.__name__, command.__doc__
    options.__signature__ = inspect.Signature(parameters)
    options.__annotations__ = {p.name: p.annotation for p in parameters}
    return options
