"""The options of a run, once they fit together; as JSON; as those of a command."""

import dataclasses
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer

from .errors import flag, wrong
from .options import (
    MODELS,
    DataName,
    LossName,
    ModelName,
    OptimizerName,
    ScheduleName,
    Settings,
)

_SEQUENCES = ("lstm", "transformer", "mamba")
_MOMENTUM = ("heavy-ball", "nesterov")
_ADAM = ("adam", "nadam")
_SECOND = ("rmsprop", "scalar-rmsprop", *_ADAM)
_RATES = {
    "scalar-rmsprop": 0.01,
    "adam": 0.005,
    "nadam": 0.003,
    "rmsprop": 0.0002,
    "default": 0.2,
}
# Which options are only for some choices of another, and their defaults, if those are
# not the model's: one, or by choice.
_ONLY: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "learning_rate": ("optimizer", tuple(OptimizerName), _RATES),
    "final_rate": ("schedule", ("cosine", "linear"), 0.0),
    "beta": ("optimizer", _MOMENTUM, 0.9),
    "averaged": ("optimizer", _MOMENTUM, False),
    "beta1": ("optimizer", _ADAM, 0.9),
    "beta2": ("optimizer", _SECOND, dict(adam=0.999, nadam=0.999, default=0.99)),
    "eps": ("optimizer", _SECOND, 1e-8),
    "bias_correction": (
        "optimizer",
        _SECOND,
        dict(adam=True, nadam=True, default=False),
    ),
    "path": ("data", ("cifar10", "text"), None),
    "test_path": ("data", ("text",), None),
    "classes": ("data", ("cifar10", "text", "random"), dict(text="2", default="10")),
    "length": ("data", ("text", "sorting", "copying"), dict(text=64, default=8)),
    "vocabulary": (
        "data",
        ("text", "sorting", "copying"),
        dict(text=10_000, default=8),
    ),
    "features": ("data", ("random",), 10),
    "noise": ("data", ("moons", "circles"), dict(moons=0.1, circles=0.05)),
    "ratio": ("data", ("circles",), 0.5),
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
                name,
                f"{value} is given, but {flag(choice)} is {chosen}: it is for "
                f"{', '.join(allowed)}.",
            )
        if chosen in allowed and value is None:
            if isinstance(default, dict):
                default = default.get(chosen, default.get("default"))
            if default is None and choice == "model":
                default = inspect.signature(MODELS[chosen]).parameters[name].default
            found[name] = default
    if settings.eigenvalues_every is None:
        found["eigenvalues_every"] = settings.log_every
    if settings.checkpoint_every is None:
        every = settings.eigenvalues_every or settings.log_every
        found["checkpoint_every"] = max(1, round(500 / every)) * every
    if settings.watch is None:
        found["watch"] = ",".join(map(str, range(min(3, settings.size))))
    settings = dataclasses.replace(settings, **found)
    _check(settings)
    return settings


def _check(s: Settings) -> None:
    processes = s.processes.split(",")
    if "midpoint" in processes and "discrete" not in processes:
        raise wrong(
            "processes",
            f"{s.processes} lacks discrete, whose midpoints are wanted: add it.",
        )
    if s.path is None and s.data in ("cifar10", "text"):
        raise wrong("path", f"there is none, and --data {s.data} needs it.")
    if s.data == "cifar10":
        if "," not in s.classes and int(s.classes) > 10:
            raise wrong("classes", f"{s.classes} is more than CIFAR-10 has, 10.")
    elif s.classes is not None and "," in s.classes:
        raise wrong(
            "classes",
            f"{s.classes} is a list of labels, which is for --data cifar10: give their "
            "number.",
        )
    if s.substeps is not None and s.rtol is not None:
        raise wrong(
            "rtol",
            f"{s.rtol:g} is for adaptive steps, but --substeps {s.substeps} makes "
            "fixed ones: leave one of them out.",
        )
    _check_multiple("eigenvalues_every", s.eigenvalues_every, "log_every", s.log_every)
    _check_multiple(
        "checkpoint_every", s.checkpoint_every, "eigenvalues_every", s.eigenvalues_every
    )
    for name in s.eigenvalues_of.split(","):
        if name != "midpoint" and name not in processes:
            raise wrong(
                "eigenvalues_of",
                f"{name} is not among --processes {s.processes}: add it there.",
            )
    if max(integers(s.watch)) >= s.size:
        raise wrong(
            "watch",
            f"{s.watch} must be below --size {s.size}, as the first example is 0.",
        )


def _check_multiple(name: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        raise wrong(
            name,
            f"{value} is not a multiple of {flag(of)} {unit}: take "
            f"{-(-value // unit) * unit}.",
        )


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
    types |= dict(path=Path, test_path=Path, classes=str)
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
