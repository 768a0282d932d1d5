"""The models: their derivatives, causality and initial weights."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import centralflow as cf
from centralflow.models import CNN, LSTM, MLP, Mamba, ResNet, Transformer, ViT
from centralflow.models.layers import GroupNorm, LayerNorm

KEY = jr.key(0)
TOKENS, LENGTH, OUT = 5, 6, 3
IMAGES = {
    "MLP": lambda key=KEY, **kw: MLP(16, OUT, 5, key=key, **kw),
    "CNN": lambda key=KEY, **kw: CNN((4, 4), OUT, (2, 4), key=key, **kw),
    "ResNet": lambda key=KEY, **kw: ResNet((4, 4), OUT, (2, 4), 1, 2, key=key, **kw),
    "ViT": lambda key=KEY, **kw: ViT((4, 4), OUT, 2, 4, 1, 2, key=key, **kw),
}
SEQUENCES = {
    "LSTM": lambda key=KEY, **kw: LSTM(TOKENS, OUT, 3, 2, key=key, **kw),
    "Transformer": lambda key=KEY, **kw: Transformer(
        TOKENS, OUT, LENGTH, 4, 1, 2, key=key, **kw
    ),
    "Mamba": lambda key=KEY, **kw: Mamba(TOKENS, OUT, 4, 1, 2, 3, key=key, **kw),
}
VECTORS = {
    "vectors": lambda key=KEY, **kw: LSTM(2, OUT, 3, tokens=False, key=key, **kw)
}
MODELS = IMAGES | SEQUENCES | VECTORS


def _jit(fn):
    # These programs run for milliseconds: a faster compilation matters more.
    return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0})


@eqx.filter_jit
def _call(model, x):
    return model(x)


def inputs(name, examples=3):
    rng = np.random.default_rng(1)
    if name in SEQUENCES:
        return jnp.asarray(rng.integers(0, TOKENS, size=(examples, LENGTH)))
    shape = (LENGTH, 2) if name in VECTORS else (4, 4)
    return jnp.asarray(rng.normal(size=(examples, *shape)), jnp.result_type(float))


def _loss(model, batch):
    """The cross-entropy, over all positions where the outputs are sequences."""
    x, y = batch
    log_probabilities = jax.nn.log_softmax(jax.vmap(model)(x))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, y[..., None], -1))


def _problem(model, x):
    shape = jax.eval_shape(jax.vmap(model), x).shape[:-1]
    y = jnp.asarray(np.random.default_rng(2).integers(0, OUT, size=shape))
    return cf.Objective(_loss, (x, y)).flatten(model)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", IMAGES | SEQUENCES)
def test_derivatives_match_finite_differences(name):
    w, flat = _problem(MODELS[name](), inputs(name))
    assert w.dtype == jnp.float64
    assert 100 < w.size < 400
    v = jnp.asarray(np.random.default_rng(0).normal(size=w.size))
    v = v / jnp.linalg.norm(v)
    slopes = _jit(lambda w: jax.jvp(flat.grad, (w,), (v,)))
    _, Hv = slopes(w)
    third = _jit(lambda w: flat.thirds(w, v[None], 1))(w)[0]
    # Of central differences h^2 / 6 is the truncation, times two derivatives more, and
    # eps / h the rounding. At h = eps^(1/3) both are 4e-11, times the ratio of those
    # derivatives to the result, of order 10.
    h = np.finfo(float).eps ** (1 / 3)
    difference = jax.tree.map(
        lambda a, b: (a - b) / (2 * h), slopes(w + h * v), slopes(w - h * v)
    )
    for exact, close in zip((Hv, third), difference, strict=True):
        scale = jnp.max(jnp.abs(exact))
        assert scale > 1e-3
        np.testing.assert_allclose(close, exact, rtol=0, atol=100 * h**2 * scale)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("norm", ["LayerNorm", "GroupNorm"])
def test_third_derivative_of_a_norm_at_a_constant(norm):
    # With d of mean 0 and mean square s, norm(c + t d) = t d / sqrt(eps + t^2 s)
    # = eps^(-1/2) (t - t^3 s / (2 eps) + ...) d.
    d = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 6)))
    if norm == "LayerNorm":
        norm, axes = LayerNorm(6), -1
    else:
        norm, axes, d = GroupNorm(3, 6), (0, 1, 3), d.reshape(2, 2, 3, 2)
    d = d - d.mean(axes, keepdims=True)
    third = -3 * jnp.mean(d**2, axes, keepdims=True) * d * 1e-5**-1.5
    d, third = d.reshape(2, 2, 6), third.reshape(2, 2, 6)
    of = lambda t: norm(0.3 + t * d)
    for _ in range(3):
        of = lambda t, of=of: jax.jvp(of, (t,), (1.0,))[1]
    np.testing.assert_allclose(of(0.0), third, rtol=1e-9)  # rounding, over sqrt(eps)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["ResNet", "ViT", "Transformer", "Mamba"])
def test_constant_inputs_in_float32(name):
    x = jnp.zeros_like(inputs(name))
    cast = lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x
    w, flat = _problem(jax.tree.map(cast, MODELS[name]()), cast(x))
    slopes = _jit(lambda w: jax.jvp(flat.grad, (w,), (jnp.ones_like(w),)))
    for derivative in slopes(w):
        assert derivative.dtype == jnp.float32
        assert jnp.all(jnp.isfinite(derivative))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SEQUENCES | VECTORS)
def test_causality(name):
    model, x = MODELS[name](), inputs(name)[0]
    outputs = _call(model, x)
    for t in range(1, LENGTH):
        changed = _call(model, x.at[t].set((x[t] + 1) % TOKENS))
        np.testing.assert_array_equal(changed[:t], outputs[:t])
        assert jnp.all(jnp.abs(changed[t:] - outputs[t:]).max(-1) > 1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SEQUENCES)
def test_padding(name):
    model, x = MODELS[name](pool=True), inputs(name)[0]
    padded = x.at[LENGTH - 2 :].set(-1)
    short = _call(model, x[: LENGTH - 2])
    # another order of summation
    np.testing.assert_allclose(_call(model, padded), short, rtol=1e-12)
    assert jnp.all(jnp.isfinite(_call(model, jnp.full_like(x, -1))))
    # As `cf.data.text_classification` has it.
    masked = (x, jnp.arange(LENGTH) < LENGTH - 2)
    np.testing.assert_allclose(_call(model, masked), short, rtol=1e-12)


def test_a_convolution_is_one():
    layer = CNN((4, 6, 2), OUT, (5,), key=KEY).convolutions[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 2)), jnp.float32)
    conv = eqx.nn.Conv2d(2, 5, 3, padding=1, key=KEY)
    kernel = jnp.moveaxis(layer.linear.weight.reshape(5, 3, 3, 2), -1, 1)
    conv = eqx.tree_at(
        lambda c: (c.weight, c.bias), conv, (kernel, layer.linear.bias[:, None, None])
    )
    with jax.default_matmul_precision("highest"):  # on GPUs, too
        expected = jnp.moveaxis(conv(jnp.moveaxis(x, -1, 0)), 0, -1)
        actual = _call(layer, x)
    np.testing.assert_allclose(actual, expected, atol=1e-5)  # float32 rounding


@pytest.mark.usefixtures("x64")
def test_patches():
    """Images that differ by an exchange of patches differ only by the positions."""
    model = IMAGES["ViT"]()
    model = eqx.tree_at(lambda m: m.positions, model, jnp.zeros_like(model.positions))
    x = inputs("ViT")[0]
    swapped = jnp.concatenate([x[:, 2:], x[:, :2]], axis=1)
    np.testing.assert_allclose(model(swapped), model(x), rtol=1e-12)
    assert jnp.max(jnp.abs(model(x[::-1]) - model(x))) > 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MODELS)
def test_initial_weights(name):
    model = MODELS[name]()
    assert eqx.tree_equal(model, MODELS[name]())
    assert not eqx.tree_equal(model, MODELS[name](jr.key(1)))
    if name != "MLP":
        half, zero = (MODELS[name](last_scale=scale) for scale in (0.5, 0.0))
        np.testing.assert_array_equal(half.last.weight, model.last.weight / 2)
        assert not jnp.any(zero.last.weight)
        assert not jnp.any(zero.last.bias)


def test_initial_weights_of_the_mlp():
    keys = jr.split(KEY, 3)
    layers = [
        eqx.nn.Linear(a, b, key=key)
        for a, b, key in zip((16, 64, 64), (64, 64, OUT), keys, strict=True)
    ]
    assert eqx.tree_equal(MLP(16, OUT, key=KEY).layers, layers)
