"""Whatever a caller gets wrong: an error that names the argument, and the value or the
fix. (More cases, of one function each, stand in the tests of that function.)"""

import dataclasses
import json
import zipfile
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .test_compare import _trajectory

# As users run it, without the checks of types that the tests install.
pytestmark = pytest.mark.usefixtures("untyped")

KEY = jax.random.key(0)
GD = cf.GradientDescent(0.1)
NAN, INF = float("nan"), float("inf")


def _loss(w):
    return 0.5 * jnp.sum(w**2)


def _on_data(w, batch):
    return 0.5 * jnp.mean((batch @ w) ** 2)


OBJECTIVE = cf.Objective(_loss)
WEIGHTS = jnp.ones(2)
FLAT = OBJECTIVE.flatten(WEIGHTS)[1]


def _raise(*args):
    raise KeyError("of the user's own")


def _call(fn, **change):
    """A call of `fn` that would succeed, but for the change."""
    arguments = dict(objective=OBJECTIVE, model=WEIGHTS, optimizer=GD)
    if fn in (cf.train, cf.predict):
        arguments["steps"] = 3
    elif fn is cf.sharpness:
        arguments["optimizer_state"] = jnp.asarray(1.0)
    return fn(**(arguments | change))


train, predict = partial(_call, cf.train), partial(_call, cf.predict)
sharpness = partial(_call, cf.sharpness)
stationary = partial(_call, cf.stationary_preconditioner)


def _scheduled(schedule):
    return train(optimizer=cf.GradientDescent(schedule))


class _Optimizer(cf.AbstractOptimizer):
    """A user's optimizer whose P is wrong."""

    P: Callable
    learning_rate: float = 0.1

    def init(self, weights):
        return jnp.zeros(())

    def update_state(self, state, gradient):
        return state

    def state_rate(self, state, gradient, gradient_sq):
        return jnp.zeros_like(state)

    def preconditioner(self, state):
        return self.P()


# Arguments.

OBJECTIVES = {
    "no function": (lambda: cf.Objective(None), "`loss_fn` must be callable, got None"),
    "text": (
        lambda: cf.Objective(_on_data, np.array(["a", "b"])),
        "`data` must hold numbers, got an array of type <U1",
    ),
    "objects": (
        lambda: cf.Objective(_on_data, dict(x=np.array([None, 1]))),
        r"`data\['x'\]` must hold numbers, got an array of type object",
    ),
    "a list of floats": (
        lambda: cf.Objective(_on_data, [1.0, 2.0]),
        r"`data\[0\]` must be an array .* got float: wrap it in `jnp.asarray`",
    ),
    "an axis of none and one of two": (
        lambda: cf.Objective(_on_data, (jnp.ones((0, 2)), jnp.ones(2))),
        r"`data` must .* lengths data\[0\]: 0, data\[1\]: 2",
    ),
    "loss without its data": (
        lambda: cf.Objective(_on_data),
        r"`loss_fn` must be callable as `loss_fn\(model\)`, .* are no `data`; _on_data",
    ),
    "loss that takes no data": (
        lambda: cf.Objective(_loss, jnp.ones((4, 2))),
        r"`loss_fn` must be callable as `loss_fn\(model, batch\)`, .* is `data`",
    ),
    "microbatches of NaN": (
        lambda: cf.Objective(_on_data, jnp.ones((3, 2)), microbatch_size=NAN),
        "`microbatch_size` must be a positive integer, got nan",
    ),
    "no model": (lambda: OBJECTIVE.flatten(None), "`model` has no parameters"),
    "empty arrays": (
        lambda: OBJECTIVE.flatten(jnp.ones((0, 3))),
        "`model` has no parameters.*float32",
    ),
    "weights of another model": (
        lambda: FLAT.model(jnp.ones(5)),
        r"`w` must be the flat weights .* shape \(5,\)",
    ),
}

OPTIMIZERS = {
    "complex rate": (lambda: cf.GradientDescent(0.1j), "`learning_rate` .* got 0.1j"),
    "rate is a bool": (lambda: cf.GradientDescent(True), "`learning_rate` .* got True"),
    "rate is minus infinity": (
        lambda: cf.RMSProp(-INF, 0.9),
        "`learning_rate` must be positive and finite, got -inf",
    ),
    "beta2 is NaN": (lambda: cf.RMSProp(0.1, NAN), "`beta2` .* 0 and 1, got nan"),
    "beta2 is a list": (lambda: cf.ScalarRMSProp(0.1, [0.9]), "`beta2` .* scalar"),
    "beta2 is missing": (lambda: cf.RMSProp(0.1, None), "`beta2` .* got None"),
    "eps is infinite": (lambda: cf.RMSProp(0.1, 0.9, INF), "`eps` .* got inf"),
    "eps is a bool": (lambda: cf.RMSProp(0.1, 0.9, True), "`eps` .* got True"),
    "bias_correction is a number": (
        lambda: cf.ScalarRMSProp(0.1, 0.9, bias_correction=1),
        "`bias_correction` must be True or False, got 1",
    ),
    "schedule of arrays": (
        lambda: _scheduled(lambda t: jnp.ones((2, 2))),
        r"`learning_rate` .* array of shape \(2, 2\)",
    ),
    "schedule of text": (
        lambda: _scheduled(lambda t: "fast"),
        "`learning_rate` must be a schedule that returns numbers, got 'fast'",
    ),
    "schedule of None": (
        lambda: _scheduled(lambda t: None),
        "`learning_rate` must be a schedule that returns numbers, got None",
    ),
    "complex schedule": (
        lambda: _scheduled(lambda t: t * 1j),
        "`learning_rate` must be a schedule that returns numbers",
    ),
    "schedule that raises": (
        lambda: _scheduled(_raise),
        "`learning_rate`: calling the schedule failed with: KeyError.*user's own",
    ),
    "schedule with Python's if": (
        lambda: _scheduled(lambda t: 0.1 if t < 5 else 0.01),
        "(?s)`learning_rate`: calling the schedule failed .*`jnp.where`",
    ),
    "schedule of two arguments": (
        lambda: _scheduled(lambda t, x: 0.1),
        "`learning_rate`: calling the schedule failed with: TypeError",
    ),
    "schedule is NaN later": (
        lambda: _scheduled(lambda t: jnp.where(t > 1, jnp.nan, 0.1)),
        "`learning_rate` must be finite .* nan at step 2",
    ),
    "P of another shape": (
        lambda: train(optimizer=_Optimizer(lambda: jnp.ones(3))),
        r"`optimizer`.*`preconditioner` .* float32\[3\]",
    ),
    "P is no array": (
        lambda: train(optimizer=_Optimizer(lambda: None)),
        r"`optimizer`.*`preconditioner` .* None",
    ),
}

STARTS = {
    "a class": (dict(optimizer=cf.GradientDescent), "`optimizer` .* such as"),
    "an Optax-like pair": (dict(optimizer=(_raise, _raise)), "`optimizer` .* tuple"),
    "steps are text": (dict(steps="3"), "`steps` must be a positive integer, got '3'"),
    "steps are NaN": (dict(steps=NAN), "`steps` must be a positive integer, got nan"),
    "steps are an array": (dict(steps=jnp.asarray(3)), "`steps` must be .* integer"),
    "parameters are NaN": (
        dict(model=jnp.array([1.0, NAN])),
        "`loss_fn` is nan at the initial `model`",
    ),
    "complex parameters": (dict(model=jnp.ones(2) * 1j), "`model` has complex"),
    "integer parameters": (dict(model=jnp.arange(2)), "`model` .*`.astype.float.`"),
    "loss is text": (
        dict(objective=cf.Objective(lambda w: "low")),
        "`loss_fn` must return a scalar.* 'low'",
    ),
    "loss is None": (
        dict(objective=cf.Objective(lambda w: None)),
        "`loss_fn` must return a scalar.* None",
    ),
    "loss is a pair": (
        dict(objective=cf.Objective(lambda w: (_loss(w), w))),
        r"`loss_fn` must return a scalar.*float32\[2\]",
    ),
    "loss is a constant": (
        dict(objective=cf.Objective(lambda w: 1.0)),
        "`loss_fn` must return .* array.* 1.0",
    ),
    "loss of microbatches is text": (
        dict(
            objective=cf.Objective(
                lambda w, x: "low", jnp.ones((4, 2)), microbatch_size=2
            )
        ),
        "`loss_fn` must return a scalar.* 'low'",
    ),
    "data are NaN": (
        dict(objective=cf.Objective(_on_data, jnp.full((3, 2), jnp.nan))),
        "`loss_fn` is nan .* in the data",
    ),
    "state is negative": (
        dict(optimizer_state=jnp.asarray(-2.0)),
        "`optimizer_state` .* -2 updates",
    ),
    "state is NaN": (
        dict(optimizer_state=jnp.asarray(NAN)),
        "`optimizer_state` .* nan updates",
    ),
    "state of another optimizer": (
        dict(optimizer=cf.RMSProp(0.1, 0.9), optimizer_state=jnp.zeros(())),
        "`optimizer_state` does not belong to this optimizer",
    ),
}

SHARED = {
    "metric raises": (
        dict(metrics={"f": _raise}),
        "`metrics`: 'f' .* failed with: KeyError.*user's own",
    ),
    "metric is None": (dict(metrics={"f": lambda w: None}), "`metrics`: 'f' must"),
    "metric is complex": (
        dict(metrics={"f": lambda w: w[0] * 1j}),
        "`metrics`: 'f' must return real numbers, got complex64",
    ),
    "metric of two arguments": (
        dict(metrics={"f": lambda w, x: 0.0}),
        "`metrics`: 'f' .* failed with: TypeError",
    ),
    "metric with Python's if": (
        dict(metrics={"f": lambda w: 1.0 if w[0] > 0 else 0.0}),
        "`metrics`: 'f' .* failed with: TracerBool",
    ),
    "name of a metric": (dict(metrics={3: _loss}), "`metrics` must map names .* 3"),
    "one time": (dict(weight_times=2.0), r"`weight_times` .* got shape \(\)"),
    "times are NaN": (dict(weight_times=[0, NAN]), "`weight_times` must be finite"),
    "infinite time": (dict(weight_times=[0, INF]), "`weight_times` must be finite"),
    "ragged times": (dict(weight_times=[[0], [1, 2]]), "`weight_times` must be a list"),
    "complex times": (dict(weight_times=[1j]), "`weight_times` must be a list"),
    "duplicate times": (dict(weight_times=[1, 1]), "`weight_times` .* increasing"),
    "infinite coordinate": (dict(coordinates=[INF]), "`coordinates` .* got .inf"),
}

TRAIN = {
    "every True": (dict(sharpness_every=True), "`sharpness_every` .* got True"),
    "every half": (dict(sharpness_every=0.5), "`sharpness_every` .* got 0.5"),
    "count is None": (dict(sharpness_count=None), "`sharpness_count` .* got None"),
    "count is True": (dict(sharpness_count=True), "`sharpness_count` .* got True"),
}

PREDICT = {
    "class of flow": (
        dict(flow=cf.CentralFlow),
        r"`flow` .* such as `CentralFlow\(\)`",
    ),
    "rtol is text": (dict(rtol="small"), "`rtol` .* above 0 and below 1, got 'small'"),
    "rtol is NaN": (dict(rtol=NAN), "`rtol` .* above 0 and below 1, got nan"),
    "rtol is an array": (dict(rtol=jnp.ones(2)), "`rtol` .* above 0 and below 1"),
    "rtol is complex": (dict(rtol=0.1j), "`rtol` .* above 0 and below 1, got 0.1j"),
    "rtol is True": (dict(rtol=True), "`rtol` .* above 0 and below 1, got True"),
    "times are text": (dict(times="all"), "`times` must be a list of numbers"),
    "time past the end": (dict(times=[0, 3.5]), r"`times` .*\[0, 3\], got 0 to 3.5"),
    "infinite time": (dict(times=[1, INF]), "`times` must be finite"),
    "times are a number": (dict(times=3), "`times` must be a non-empty list"),
    "state of no flow": (dict(solver_state="last"), "`solver_state` .* got str"),
}

FLOWS = {
    "substeps are True": (dict(substeps=True), "`substeps` .* got True"),
    "substeps are text": (dict(substeps="4"), "`substeps` .* got '4'"),
    "substeps are NaN": (dict(substeps=NAN), "`substeps` .* got nan"),
    "block is True": (dict(block_size=True), "`block_size` .* got True"),
    "block is None": (dict(block_size=None), "`block_size` .* got None"),
    "renewed at infinity": (
        dict(substeps=1, renew_every=INF),
        "`renew_every` .* got inf",
    ),
    "tolerance is NaN": (dict(eigen_tolerance=NAN), "`eigen_tolerance` .* got nan"),
    "tolerance is text": (dict(eigen_tolerance="x"), "`eigen_tolerance` .* got 'x'"),
    "tolerance is 1": (dict(eigen_tolerance=1.0), "`eigen_tolerance` .* got 1.0"),
}

MEASURES = {
    "midpoints of text": (lambda: cf.midpoints("abc"), "`weights` must be"),
    "midpoints of ragged rows": (
        lambda: cf.midpoints([[1.0], [1.0, 2.0], [3.0]]),
        "`weights` must be",
    ),
    "midpoints of nothing": (lambda: cf.midpoints(None), "`weights` must be"),
    "count is True": (lambda: sharpness(count=True), "`count` .* got True"),
    "count is half": (lambda: sharpness(count=0.5), "`count` .* got 0.5"),
    "tolerance is text": (lambda: sharpness(tolerance="x"), "`tolerance` .* got 'x'"),
    "no objective": (lambda: sharpness(objective=_loss), "`objective` must be"),
    "sharpness of NaN": (
        lambda: sharpness(model=jnp.full(2, jnp.nan)),
        "`loss_fn` is nan at the initial `model`",
    ),
    "rank is True": (lambda: stationary(rank=True), "`rank` .* got True"),
    "iterations are infinite": (
        lambda: stationary(max_iterations=INF),
        "`max_iterations` .* got inf",
    ),
    "no number": (lambda: stationary(tolerance=None), "`tolerance` .* got None"),
    "no optimizer": (lambda: stationary(optimizer=None), "`optimizer` .* NoneType"),
}

SDCP = {
    "A is not square": (
        lambda: cf.solve_sdcp(jnp.ones((2, 3)), jnp.ones((2, 2, 2, 2))),
        r"`A` must be .* \[k, k\], got .* \(2, 3\)",
    ),
    "A is empty": (
        lambda: cf.solve_sdcp(jnp.ones((0, 0)), jnp.ones((0, 0, 0, 0))),
        r"`A` must be .* got .* \(0, 0\)",
    ),
    "B is a matrix": (
        lambda: cf.solve_sdcp(jnp.eye(2), jnp.eye(2)),
        r"`B` must have the shape \(2, 2, 2, 2\) .* got \(2, 2\)",
    ),
    "mask is too short": (
        lambda: cf.solve_sdcp(jnp.eye(2), jnp.ones((2, 2, 2, 2)), jnp.array([True])),
        r"`mask` must have the shape \(2,\) .* got \(1,\)",
    ),
    "integers": (
        lambda: cf.solve_sdcp(jnp.eye(2, dtype=int), jnp.ones((2, 2, 2, 2))),
        "`A` must .* floating-point .* int32",
    ),
}


# Trajectories.

TIMES = np.arange(11.0)
RUN = _trajectory(TIMES, np.exp(-TIMES))
OTHER = _trajectory(TIMES, np.exp(-TIMES), weights=((0.0,) * 3, (1.0,) * 3))
HALF = _trajectory(TIMES / 2, np.exp(-TIMES))
BATCH = jax.tree.map(
    lambda x: jnp.stack([x, x]) if eqx.is_array(x) else x,
    dataclasses.replace(RUN, result=None),
)
_BATCH = r"`jax.tree.map\(lambda x: x\[i\]"
comparison = cf.plot.comparison

TRAJECTORIES = {
    "run is None": (lambda: cf.compare(None, RUN), "`run` must be a Trajectory.* None"),
    "batch of runs": (lambda: cf.compare(BATCH, RUN), f"`run` .*{_BATCH}"),
    "batch of predictions": (
        lambda: cf.compare(RUN, BATCH),
        f"`prediction` .*{_BATCH}",
    ),
    "run at half steps": (
        lambda: cf.compare(HALF, RUN),
        "`run` must be reported at whole steps",
    ),
    "nothing in common": (
        lambda: cf.compare(RUN, _trajectory(TIMES + 20, np.exp(-TIMES))),
        "`run` covers steps 0 to 10 and `prediction` 20 to 30",
    ),
    "window is True": (lambda: cf.compare(RUN, RUN, window=True), "`window` .* True"),
    "window is zero": (lambda: cf.compare(RUN, RUN, window=0), "`window` .* got 0"),
    "window is 4.0": (lambda: cf.compare(RUN, RUN, window=4.0), "`window` .* got 4.0"),
    "average of a matrix": (
        lambda: cf.time_average(np.ones((3, 3)), 2),
        r"`values` must be .* \[T\], got .* \(3, 3\)",
    ),
    "average of text": (lambda: cf.time_average("abc", 2), "`values` must be"),
    "negative window": (
        lambda: cf.time_average(TIMES, -3),
        "`window` must be a positive integer, got -3",
    ),
    "infinite window": (lambda: cf.time_average(TIMES, INF), "`window` .* got inf"),
    "figure of nothing": (lambda: comparison(None, RUN), "`run` must be a Trajectory"),
    "figure of numbers": (lambda: comparison(RUN, 3.0), "`prediction` must be .* 3.0"),
    "figure of a batch": (lambda: comparison(RUN, BATCH), f"`prediction` .*{_BATCH}"),
    "stable is a flow": (
        lambda: comparison(RUN, RUN, stable=cf.StableFlow()),
        "`stable` must be a Trajectory",
    ),
    "figure of other models": (
        lambda: comparison(RUN, OTHER),
        "`run` has 2 parameters and `prediction` 3",
    ),
    "stable of another model": (
        lambda: comparison(RUN, RUN, stable=OTHER),
        "`run` has 2 parameters and `stable` 3",
    ),
    "window of a figure": (
        lambda: comparison(RUN, RUN, window=-1),
        "`window` must be a positive integer, got -1",
    ),
    "a list of runs": (
        lambda: cf.plot.loss([RUN, RUN]),
        r"`trajectories\[0\]` must be a Trajectory",
    ),
    "losses of a batch": (
        lambda: cf.plot.loss(RUN, BATCH),
        rf"`trajectories\[1\]` .*{_BATCH}",
    ),
    "labels are a number": (lambda: cf.plot.loss(RUN, labels=3), "`labels` .* got 3"),
    "one label too many": (
        lambda: cf.plot.loss(RUN, labels=["a", "b"]),
        "`labels` must name all 1",
    ),
}


# Losses, data, models.

BATCH_2 = (jnp.ones((3, 2)), jnp.ones((3, 2)))
moons, circles = partial(cf.data.moons, key=KEY), partial(cf.data.circles, key=KEY)
MLP = partial(cf.models.MLP, key=KEY)

LIBRARY = {
    "batch of one": (
        lambda: cf.losses.squared_error(jnp.sin, BATCH_2[:1]),
        r"`batch` must be \(inputs, targets\) or \(inputs, targets, mask\), .* 1",
    ),
    "batch is an array": (
        lambda: cf.losses.accuracy(jnp.sin, jnp.ones((3, 2))),
        "`batch` must be .* got ArrayImpl",
    ),
    "model is no function": (
        lambda: cf.losses.cross_entropy(dict(w=jnp.ones(2)), BATCH_2),
        "`model` must be callable, got dict",
    ),
    "model returns a pair": (
        lambda: cf.losses.squared_error(lambda x: (x, x), BATCH_2),
        "`model` must return one array .* got tuple",
    ),
    "model returns a number": (
        lambda: cf.losses.squared_error(jnp.sum, BATCH_2),
        r"`targets` .* got \(3,\) and \(3, 2\)",
    ),
    "targets are a list": (
        lambda: cf.losses.squared_error(jnp.sin, (BATCH_2[0], [1.0, 2.0, 3.0])),
        "`targets` must be an array, got list",
    ),
    "labels are not one-hot": (
        lambda: cf.losses.cross_entropy(jnp.sin, (BATCH_2[0], jnp.arange(3))),
        r"`targets` must have one shape.* got \(3, 2\) and \(3,\)",
    ),
    "other numbers of examples": (
        lambda: cf.losses.cross_entropy(jnp.sin, (BATCH_2[0], jnp.ones((4, 2)))),
        r"`targets` must have one shape.* got \(3, 2\) and \(4, 2\)",
    ),
    "digits of text": (lambda: cf.data.digits("all"), "`size` .* got 'all'"),
    "half a digit": (lambda: cf.data.digits(0.5), "`size` .* got 0.5"),
    "True digits": (lambda: cf.data.digits(True), "`size` .* got True"),
    "too many digits": (lambda: cf.data.digits(1798), "`size` .* 1797, got 1798"),
    "noise is text": (lambda: moons(4, "x"), "`noise` must be .* got 'x'"),
    "noise is infinite": (lambda: moons(4, INF), "`noise` must be .* got inf"),
    "size is infinite": (lambda: circles(INF), "`size` must be .* got inf"),
    "ratio is None": (lambda: circles(4, ratio=None), "`ratio` must be .* got None"),
    "key is a number": (
        lambda: cf.data.moons(4, key=3),
        r"`key` must be .*`jax.random.key\(0\)`, got 3",
    ),
    "keys of sorting": (
        lambda: cf.data.sorting(4, 3, 2, key=jax.random.split(KEY)),
        "`key` must be one",
    ),
    "length is True": (
        lambda: cf.data.copying(4, True, 2, key=KEY),
        "`length` must be .* got True",
    ),
    "features are NaN": (
        lambda: cf.data.random_classification(4, NAN, 2, key=KEY),
        "`features` must be .* got nan",
    ),
    "classes of CIFAR-10": (
        lambda: cf.data.cifar10("nowhere", classes=2.5),
        "`classes` must be .* got 2.5",
    ),
    "path of CIFAR-10": (lambda: cf.data.cifar10(None), "`path` must be .* got None"),
    "path of a text": (
        lambda: cf.data.text_classification(3.5),
        "`path` must be .* got 3.5",
    ),
    "no words": (
        lambda: cf.data.frequent_words("nowhere", 0),
        "`count` must be .* got 0",
    ),
    "no inputs": (lambda: MLP(0, 2), "`in_size` must be .* got 0"),
    "outputs are text": (lambda: MLP(2, "2"), "`out_size` must be .* got '2'"),
    "width is half": (lambda: MLP(2, 2, 0.5), "`width` must be .* got 0.5"),
    "depth is negative": (lambda: MLP(2, 2, depth=-1), "`depth` must be .* got -1"),
    "no key": (lambda: cf.models.MLP(2, 2, key=None), "`key` must be .* got None"),
    "key of a CNN": (
        lambda: cf.models.CNN((8, 8), 2, key="seed"),
        "`key` must be .* got 'seed'",
    ),
    "scale is text": (
        lambda: cf.models.Mamba(3, 2, last_scale="x", key=KEY),
        "`last_scale` must be .* got 'x'",
    ),
    "scale is NaN": (
        lambda: cf.models.LSTM(3, 2, last_scale=NAN, key=KEY),
        "`last_scale` must be .* got nan",
    ),
    "patches are zero": (
        lambda: cf.models.ViT((8, 8), 2, 0, key=KEY),
        "`patch_size` must be .* got 0",
    ),
    "shape is a number": (
        lambda: cf.models.ResNet(8, 2, key=KEY),
        r"`in_shape` must be \(height, width\) .* got 8",
    ),
    "heads are NaN": (
        lambda: cf.models.Transformer(3, 2, 4, heads=NAN, key=KEY),
        "`heads` must be .* got nan",
    ),
}

CALLS = OBJECTIVES | OPTIMIZERS | MEASURES | SDCP | TRAJECTORIES | LIBRARY
CALLS |= {
    f"{fn.func.__name__ and fn.args[0].__name__}, {name}": (
        partial(fn, **change),
        message,
    )
    for fns, cases in (
        ((train, predict), STARTS | SHARED),
        ((train,), TRAIN),
        ((predict,), PREDICT),
    )
    for fn in fns
    for name, (change, message) in cases.items()
}
CALLS |= {
    f"CentralFlow, {name}": (partial(cf.CentralFlow, **change), message)
    for name, (change, message) in FLOWS.items()
}


@pytest.mark.parametrize("name", CALLS)
def test_value_error(name):
    call, message = CALLS[name]
    with pytest.raises(ValueError, match=message):
        call()


# Files.


def _zip(path, **entries):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries.items():
            file.writestr(name, content)


def _saved(path, edit):
    """A trajectory on disk, edited."""
    RUN.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays["header"]))
    edit(arrays, header)
    np.savez(path, **(arrays | dict(header=np.array(json.dumps(header)))))


def _one_array(path):
    with path.open("wb") as file:
        np.save(file, np.ones(3))


UNREADABLE = {
    "empty": lambda path: path.write_bytes(b""),
    "random bytes": lambda path: path.write_bytes(np.random.default_rng(0).bytes(999)),
    "another zip": lambda path: _zip(path, letter="Dear Sir"),
    "header alone": lambda path: np.savez(path, header=np.array("[]")),
    "one array": _one_array,
    "a folder": lambda path: path.mkdir(),
    "cut short": lambda path: (
        RUN.save(path),
        path.write_bytes(path.read_bytes()[:-200]),
    ),
    "a series is missing": lambda path: _saved(path, lambda a, h: a.pop("loss")),
    "a metric is missing": lambda path: _saved(
        path, lambda a, h: h.update(metrics=["f"])
    ),
    "unknown result": lambda path: _saved(path, lambda a, h: h.update(result="fine")),
    "no result": lambda path: _saved(path, lambda a, h: h.pop("result")),
    "lengths that differ": lambda path: _saved(
        path, lambda a, h: a.update(loss=a["loss"][:-1])
    ),
    "text for numbers": lambda path: _saved(
        path, lambda a, h: a.update(loss=np.array(["a"] * 11))
    ),
}


@pytest.mark.parametrize("content", UNREADABLE)
def test_files_that_are_no_trajectory(content, tmp_path):
    path = tmp_path / "run.npz"
    UNREADABLE[content](path)
    with pytest.raises(ValueError, match=r"`path`: '.*run.npz' is not a trajectory"):
        cf.Trajectory.load(path)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path`: .*none.npz"):
        cf.Trajectory.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError, match="`path`: there is no folder"):
        RUN.save(tmp_path / "none" / "run.npz")
    with pytest.raises(IsADirectoryError, match=r"`path`: .* is a folder"):
        RUN.save(tmp_path)
    for path in (None, 3.5):
        for call in (cf.Trajectory.load, RUN.save):
            with pytest.raises(ValueError, match=f"`path` must be .* got {path}"):
                call(path)
    with pytest.raises(ValueError, match=f"batch of trajectories.*{_BATCH}"):
        BATCH.save(tmp_path / "batch.npz")
    with pytest.raises(FileNotFoundError, match="no file"):
        cf.data.text_classification(tmp_path)
    assert list(tmp_path.iterdir()) == []  # nothing temporary is left


def test_load_into_other_objects(tmp_path):
    RUN.save(tmp_path / "run.npz")
    for name in ("model", "optimizer_state"):
        with pytest.raises(ValueError, match=f"`{name}` does not fit the file"):
            cf.Trajectory.load(tmp_path / "run.npz", **{name: jnp.ones(3)})


def test_state_of_another_prediction():
    """What an integration goes on from must be of the same flow and observables."""
    fixed = cf.CentralFlow(1)

    def state(flow):  # nothing but its shapes: that needs no compilation
        run = lambda model: predict(model=model, flow=flow, steps=1).solver_state
        return eqx.filter_eval_shape(run, WEIGHTS)

    central, stable = state(fixed), state(cf.StableFlow())
    for solver_state, change, message in (
        (central, dict(flow=cf.StableFlow()), "another flow"),
        (central, dict(flow=cf.CentralFlow()), "another flow, or of another kind"),
        (stable, dict(flow=fixed), "another flow"),
        (central, dict(flow=fixed, metrics={"f": _loss}), "the same `metrics`"),
        (central, dict(flow=fixed, coordinates=[0]), "as many `coordinates`"),
        (central, dict(flow=fixed, model=jnp.ones(3)), "this model and optimizer"),
    ):
        with pytest.raises(ValueError, match=f"`solver_state` .*{message}"):
            predict(solver_state=solver_state, **change)
