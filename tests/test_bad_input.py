"""Whatever a caller gets wrong: an error that names the argument, and the value or the
fix. (More cases, of one function each, stand in the tests of that function.)"""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

# As users run it, without the checks of types that the tests install.
pytestmark = pytest.mark.usefixtures("untyped")

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
    "carry is text": (
        dict(carry_third_derivatives="no"),
        "`carry_third_derivatives` must be True or False, got 'no'",
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


CALLS = OBJECTIVES | OPTIMIZERS | MEASURES | SDCP
CALLS |= {
    f"{fn.args[0].__name__}, {name}": (
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
