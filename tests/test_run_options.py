"""The options of `centralflow run`: what they make, and which do not fit together."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf
from centralflow.cli import errors, options, problem, processes, settings

from .test_run import SHORT, TINY, invoke, read


def test_rmsprop_with_schedule_and_warm_start(tmp_path):
    """The schedule counts on through the warm start and the blocks."""
    options = ("--optimizer", "rmsprop", "--learning-rate", 0.01, "--beta2", 0.9)
    options += ("--bias-correction", "--warm-up", 4, "--schedule", "cosine")
    options += ("--warm-start", 3, "--steps", 6, "--checkpoint-every", 3)
    options += ("--log-every", 1, "--eigenvalues", 0, "--processes", "discrete")
    options += ("--size", 20, "--test-size", 0, "--width", 3, "--float64")
    options += ("--loss", "cross-entropy", "--microbatch-size", 7)
    result = invoke("run", "--output", tmp_path, *options)
    assert result.exit_code == 0, result.stderr
    assert not jax.config.jax_enable_x64
    with jax.enable_x64(True):
        rate = problem.Schedule(0.01, 4, 9, 0.0)
        run = cf.train(
            cf.Objective(cf.losses.cross_entropy, cf.data.digits(20)),
            cf.models.MLP(64, 10, width=3, key=jax.random.key(0)),
            cf.RMSProp(rate, 0.9, 1e-8, True),
            9,
        )
        np.testing.assert_allclose(
            read(tmp_path)[0]["discrete/loss"], run.loss[3:], rtol=1e-10
        )
        assert [float(rate(jnp.float64(t))) for t in (0, 4, 6.5, 9)] == (
            pytest.approx([0.002, 0.01, 0.005, 0])
        )


def test_shapes_of_the_schedule():
    at = lambda rate: [float(rate(jnp.float32(t))) for t in (0, 4, 6.5, 9, 12)]
    line = problem.Schedule(0.01, 4, 9, 0.2, "linear")
    assert at(line) == pytest.approx([0.002, 0.01, 0.006, 0.002, 0.002])
    constant = problem.Schedule(0.01, 4, 9, None, "constant")
    assert at(constant) == pytest.approx([0.002, 0.01, 0.01, 0.01, 0.01])


SECOND = dict(beta2=0.97, eps=1e-6, bias_correction=True)


@pytest.mark.parametrize(
    ("optimizer", "values"),
    [
        (cf.GradientDescent(0.3), {}),
        (cf.RMSProp(0.3, **SECOND), SECOND),
        (cf.ScalarRMSProp(0.3, **SECOND), SECOND),
        (cf.HeavyBall(0.3, 0.8), dict(beta=0.8)),
        (cf.HeavyBall(0.3, 0.8, averaged=True), dict(beta=0.8, averaged=True)),
        (cf.Nesterov(0.3, 0.9), {}),
        (cf.Nesterov(0.3, 0.9, averaged=True), dict(averaged=True)),
        (cf.Adam(0.005), dict(learning_rate=None)),
        (cf.Adam(0.3, 0.8, **SECOND), dict(beta1=0.8, **SECOND)),
        (cf.NAdam(0.003), dict(learning_rate=None)),
        (cf.NAdam(0.3, 0.8, **SECOND), dict(beta1=0.8, **SECOND)),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, cf.AbstractOptimizer) else "",
)
def test_every_optimizer(optimizer, values):
    """The options make it, and its defaults are the library's."""
    names = {kind: name for name, (kind, _) in problem._OPTIMIZERS.items()}
    values = dict(learning_rate=0.3) | values | dict(optimizer=names[type(optimizer)])
    chosen = settings.complete(settings.from_json(values))
    assert eqx.tree_equal(problem._optimizer(chosen), optimizer)
    assert (
        settings.from_json(json.loads(json.dumps(settings.to_json(chosen)))) == chosen
    )


def test_momentum(tmp_path):
    """A run with momentum, in blocks, is the optimizer's own; so are its midpoints and
    its eigenvalues, for a preconditioner of one number for each weight."""
    arguments = (*TINY, "--optimizer", "adam", "--learning-rate", 0.02, "--beta2", 0.9)
    arguments += ("--steps", 8, "--log-every", 2, "--checkpoint-every", 4)
    arguments += ("--warm-start", 2, "--eigenvalues", 2, "--eigenvalues-of", "discrete")
    arguments += ("--processes", "discrete,midpoint,stable")
    result = invoke("run", "--output", tmp_path, *arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    arrays, attributes = read(tmp_path)
    optimizer = cf.Adam(0.02, beta2=0.9)
    assert attributes["critical_sharpness"] == pytest.approx(38)
    objective = cf.Objective(cf.losses.squared_error, cf.data.digits(30))
    model = cf.models.MLP(64, 10, width=5, key=jax.random.key(0))
    weights, flat = objective.flatten(model)
    state, path, eigenvalues = optimizer.init(weights), [], []
    step = eqx.filter_jit(optimizer.update)
    for t in range(12):
        path.append(weights)
        gradient = flat.grad(weights)
        if t in (2, 6, 10):
            P = optimizer.preconditioner(optimizer.update_state(state, gradient))
            H = np.asarray(jax.jit(jax.hessian(flat.loss))(weights))
            H = H / np.sqrt(np.outer(P, P))
            eigenvalues.append(np.linalg.eigvalsh(H)[::-1][:2])
        weights, state = step(weights, state, gradient)
    path = jnp.stack(path)
    near = dict(rtol=1e-3, atol=1e-5)
    losses = [flat.loss(w) for w in path[2:11:2]]
    np.testing.assert_allclose(arrays["discrete/loss"], losses, **near)
    # An eigenvalue is no farther off than the residual, 1e-2 of the largest.
    found, wanted = arrays["discrete/iterate_sharpness"][::2], np.stack(eigenvalues)
    assert np.all(np.abs(found - wanted) < 1e-2 * wanted[:, :1])
    middle = np.array(cf.midpoints(path))[1:][::2]  # from step 2 on
    middle[0] = path[2]
    travelled = np.linalg.norm(middle - path[2], axis=1)
    np.testing.assert_allclose(arrays["distances/start-midpoint"], travelled, **near)
    apart = arrays["distances/discrete-stable"]
    assert np.all(apart < 0.2 * arrays["distances/start-discrete"].max())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["heavy-ball", "nesterov", "nadam"])
def test_momentum_of_all_processes(optimizer, tmp_path):
    """The flows are stopped and go on, and end near the run."""
    rate = dict(nadam=0.005).get(optimizer, 0.05)
    arguments = (*SHORT, "--optimizer", optimizer, "--learning-rate", rate)
    arguments += ("--warm-start", 5, "--schedule", "linear", "--warm-up", 3)
    result = invoke("run", "--output", tmp_path, *arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    arrays, _ = read(tmp_path)
    travelled = arrays["distances/start-discrete"][-1]
    for name in ("central", "stable"):
        assert arrays[f"distances/discrete-{name}"][-1] < 0.2 * travelled
        ratio = arrays[f"{name}/mean_loss"][-1] / arrays["discrete/loss"][-1]
        np.testing.assert_allclose(ratio, 1, atol=0.2)


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (("--steps", 1), "--steps"),
        (("--processes", "discrete,none"), "--processes"),
        (("--processes", "midpoint"), "--processes"),
        (("--processes", "central,central"), "--processes"),
        (("--seed", 2**64), "--seed"),
        (("--eps", "x"), "--eps"),
        (("--learning-rate", "nan"), "--learning-rate"),
        (("--optimizer", "sgd"), "--optimizer"),
        (("--beta", 0.9), "--beta"),
        (("--optimizer", "heavy-ball", "--beta", 1.0), "--beta"),
        (("--optimizer", "heavy-ball", "--beta1", 0.9), "--beta1"),
        (("--optimizer", "nesterov", "--bias-correction"), "--bias-correction"),
        (("--optimizer", "adam", "--averaged"), "--averaged"),
        (("--optimizer", "adam", "--beta", 0.9), "--beta"),
        (("--optimizer", "adam", "--beta1", 1.5), "--beta1"),
        (("--optimizer", "nadam", "--beta2", -0.1), "--beta2"),
        (("--optimizer", "adam", "--substeps", 1), "--substeps"),
        (("--optimizer", "rmsprop", "--beta2", 0.1, "--substeps", 2), "--substeps"),
        (("--beta2", 0.9), "--beta2"),
        (("--optimizer", "rmsprop", "--beta2", 2.0), "--beta2"),
        (("--optimizer", "rmsprop", "--eps", -1), "--eps"),
        (("--final-rate", 0.1), "--final-rate"),
        (("--schedule", "linear", "--final-rate", 1.1), "--final-rate"),
        (("--schedule", "step"), "--schedule"),
        (("--data", "mnist"), "--data"),
        (("--data", "cifar10"), "--path"),
        (("--data", "cifar10", "--path", "{folder}"), "--path"),
        (("--data", "text", "--model", "lstm", "--path", "{folder}"), "--path"),
        (("--data", "text", "--model", "lstm", "--path", "{file}"), "--size"),
        (("--size", 1700), "--size"),
        (("--noise", 0.1), "--noise"),
        (("--data", "circles", "--ratio", 1), "--ratio"),
        (("--data", "moons", "--ratio", 0.5), "--ratio"),
        (("--data", "random", "--classes", "1,2"), "--classes"),
        (("--data", "cifar10", "--path", "{folder}", "--classes", "3,3"), "--classes"),
        (("--data", "cifar10", "--path", "{folder}", "--classes", "3,10"), "--classes"),
        (("--data", "cifar10", "--path", "{folder}", "--classes", 11), "--classes"),
        (("--data", "moons", "--model", "cnn"), "--model"),
        (("--data", "sorting"), "--model"),
        (("--model", "vit", "--patch-size", 3), "--patch-size"),
        (("--model", "vit", "--heads", 5), "--heads"),
        (("--model", "cnn", "--widths", "4,x"), "--widths"),
        (("--model", "cnn", "--widths", "2,2,2,2"), "--widths"),
        (("--model", "cnn", "--width", 4), "--width"),
        (("--loss", "logistic"), "--loss"),
        (("--substeps", 2, "--rtol", 0.01), "--rtol"),
        (("--rtol", 0.9), "--rtol"),
        (("--rtol", 0), "--rtol"),
        (("--eigenvalues", 100_000), "--eigenvalues"),
        (("--block-size", 100_000), "--block-size"),
        (("--watch", 1000), "--watch"),
        (("--eigenvalues-every", 15), "--eigenvalues-every"),
        (("--eigenvalues-of", "central"), "--eigenvalues-of"),
        (
            ("--processes", "discrete", "--eigenvalues-of", "stable"),
            "--eigenvalues-of",
        ),
        (("--checkpoint-every", 15), "--checkpoint-every"),
        (("--resume",), "--resume"),
        (("--resume", "--overwrite"), "--overwrite"),
    ],
)
def test_wrong_argument(arguments, cause, tmp_path):
    file = tmp_path / "file"
    file.touch()
    names = dict(folder=tmp_path, file=file)
    arguments = [str(a).format(**names) for a in arguments]
    result = invoke("run", "--output", tmp_path / "out", *arguments)
    assert result.exit_code == 2, result
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"error: Invalid value for '{cause}': ")
    if cause in arguments[:-1] and not cause.startswith("--path"):
        value = arguments[arguments.index(cause) + 1]
        assert value in result.stderr
    for name in options.Settings.__dataclass_fields__:
        assert f"`{name}`" not in result.stderr
        assert "_" not in name or name not in result.stderr
    assert not (tmp_path / "out").exists()


def test_examples_to_watch_are_among_few():
    """Of a data set that is smaller than the default says, all are watched."""
    chosen = settings.complete(options.Settings(size=2))
    assert chosen.watch == "0,1"


def test_some_classes_of_cifar10(tmp_path):
    images = np.zeros((10, 3072), np.uint8)
    records = np.concatenate([np.arange(10, dtype=np.uint8)[:, None], images], axis=1)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    values = dict(data="cifar10", path=tmp_path, model="cnn", size=6, test_size=3)
    for classes, labels in (("7,2,3", (1, 2, 0)), ("3", (0, 1, 2))):
        chosen = settings.from_json(values | dict(classes=classes))
        train, test = problem._data(settings.complete(chosen))
        # In the order of the file, as columns in the order that was asked for.
        np.testing.assert_array_equal(np.argmax(train[1], axis=1), labels * 2)
        assert train[1].shape == (6, 3)
        assert test[1].shape == (3, 3)


def test_help_says_what_every_option_is():
    text = " ".join(invoke("run", "--help").stdout.split())
    names = options.Settings.__dataclass_fields__
    for name in names:
        assert errors.flag(name) + " " in text
    # All but the two paths have a default.
    assert text.count("[default: ") == len(names) - 2


TEXT = "sentence\tlabel\n" + "a good film\t1\nbad\t0\n" * 10


@pytest.mark.parametrize(
    "chosen",
    [
        dict(data="moons", loss="logistic"),
        dict(data="circles", ratio=0.3),
        dict(data="random", features=4, classes=3),
        dict(model="cnn", widths="2,3"),
        dict(model="resnet", widths="4", groups=2),
        dict(model="vit", width=4, heads=2, depth=1),
        dict(data="sorting", model="transformer", width=4, heads=2, length=3),
        dict(data="copying", model="mamba", width=4, depth=1, state_size=2),
        dict(data="text", model="lstm", width=4, length=5, loss="logistic"),
        dict(data="text", model="transformer", width=4, heads=2, vocabulary=4),
    ],
    ids=lambda chosen: "-".join(str(v) for v in chosen.values()),
)
def test_every_problem_can_be_built(chosen, tmp_path):
    """Each kind of data with a model for it has a loss and all metrics."""
    (tmp_path / "text.tsv").write_text(TEXT)
    if chosen.get("data") == "text":
        path = tmp_path / "text.tsv"
        chosen = chosen | dict(path=path, test_path=path)
    chosen = settings.from_json(chosen | dict(size=12, test_size=5))
    built = problem.build(settings.complete(chosen))
    values = eqx.filter_eval_shape(built.flat.evaluate, built.plain, built.weights)
    assert values.keys() == {"outputs", "accuracy", "test_loss", "test_accuracy"}
    assert values["outputs"].shape[0] == 3
    assert values["accuracy"].shape == values["test_loss"].shape == ()
    assert eqx.filter_eval_shape(built.flat.loss, built.weights).shape == ()


def test_flow_of_a_model_with_flags():
    """Not all leaves of a transformer are arrays: its dropout has a Boolean."""
    values = dict(data="sorting", model="transformer", width=4, heads=2, length=3)
    values |= dict(size=12, test_size=5, depth=1, substeps=1)
    chosen = settings.complete(settings.from_json(values))
    built = problem.build(chosen)
    state = processes.state_like(built, chosen, "central", 1)
    assert state["weights"].shape == built.weights.shape
    assert state["solver_state"].y.weights.shape == built.weights.shape
