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
    for name in settings.eigenvalues_of.split(","):
        if name != "midpoint" and name not in settings.processes.split(","):
            raise wrong("eigenvalues_of", f"{name} is not among --processes.")
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
