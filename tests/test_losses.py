"""The losses against formulas, each other, and themselves without the masked part."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import centralflow as cf

LOSSES = [cf.losses.squared_error, cf.losses.cross_entropy, cf.losses.logistic_loss]
ALL = [*LOSSES, cf.losses.accuracy]
_identity = lambda x: x
EXACT = dict(rtol=1e-13, atol=1e-13)  # float64 rounding of some 1e2 operations


def _batch(loss, shape, seed=0):
    """Outputs of the identity and targets: distributions, or one probability."""
    rng = np.random.default_rng(seed)
    outputs = 1 if loss is cf.losses.logistic_loss else 3
    z = rng.normal(size=(*shape, outputs))
    y = rng.dirichlet(np.ones(3), shape) if outputs == 3 else rng.random((*shape, 1))
    return jnp.asarray(z), jnp.asarray(y)


def _formula(loss, z, y):
    """For each position, in NumPy."""
    if loss is cf.losses.squared_error:
        return 0.5 * np.sum((z - y) ** 2, axis=-1)
    if loss is cf.losses.cross_entropy:
        p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        return -np.sum(y * np.log(p), axis=-1)
    if loss is cf.losses.logistic_loss:
        p = 1 / (1 + np.exp(-z))
        return -(y * np.log(p) + (1 - y) * np.log(1 - p))[..., 0]
    return np.argmax(z, axis=-1) == np.argmax(y, axis=-1)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("shape", [(7,), (5, 4)])
@pytest.mark.parametrize("loss", ALL)
def test_formulas(loss, shape):
    z, y = _batch(loss, shape)
    expected = np.mean(_formula(loss, np.asarray(z), np.asarray(y)))
    np.testing.assert_allclose(loss(_identity, (z, y)), expected, **EXACT)


def _one_output(z, y):
    return cf.losses.logistic_loss(_identity, (z.reshape(1, 1), y.reshape(1, 1)))


def _two_outputs(z, y):
    batch = jnp.stack([0 * z, z])[None], jnp.stack([1 - y, y])[None]
    return cf.losses.cross_entropy(_identity, batch)


@jax.jit
def _up_to_third_derivatives(z, y):
    fns = [_one_output, _two_outputs]
    values = [[fn(z, y) for fn in fns]]
    for _ in range(3):
        fns = [jax.grad(fn) for fn in fns]
        values.append([fn(z, y) for fn in fns])
    return jnp.stack([jnp.stack(pair) for pair in values])


@pytest.mark.usefixtures("x64")
@given(logit=st.floats(-700, 700), target=st.floats(0, 1))
@settings(deadline=None)
def test_binary_is_two_class_softmax(logit, target):
    values = _up_to_third_derivatives(jnp.asarray(logit), jnp.asarray(target))
    # The softmax's own cancellation is absolute, of the order of 1e-16.
    np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES[1:])
@pytest.mark.parametrize("scale", [1e2, 1e30])
def test_huge_logits(loss, scale):
    z, y = _batch(loss, (9,))
    # Certain both of the true class and of a wrong one.
    y = jax.nn.one_hot(jnp.argmax(y, -1), y.shape[-1]) if y.shape[-1] > 1 else y.round()
    value = lambda z: loss(_identity, (z.astype(jnp.float32), y.astype(jnp.float32)))
    value, gradient = jax.value_and_grad(value)(scale * z)
    assert jnp.isfinite(value)
    assert value > 0.1 * scale / len(z)
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.max(jnp.abs(gradient)) <= 1 / len(z) * (1 + 1e-6)


def test_logistic_loss_does_not_cancel():
    batch = jnp.full((1, 1), 20.0), jnp.ones((1, 1))
    loss = cf.losses.logistic_loss(_identity, batch)
    np.testing.assert_allclose(loss, np.exp(-20.0), rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [bool, float])
@pytest.mark.parametrize("loss", ALL)
def test_mask_is_computing_on_the_unmasked(loss, kind):
    z, y = _batch(loss, (5, 4))
    mask = np.random.default_rng(1).random((5, 4)) < 0.6
    mask[:, 0], mask[4] = True, False
    # Whatever stands at the masked positions.
    z, y = (jnp.where(mask[..., None], x, jnp.nan) for x in (z, y))
    examples = [
        loss(_identity, (z[i][mask[i]], y[i][mask[i]])) if mask[i].any() else 0.0
        for i in range(5)
    ]
    masked = lambda z: loss(_identity, (z, y, jnp.asarray(mask.astype(kind))))
    np.testing.assert_allclose(masked(z), np.mean(examples), **EXACT)

    gradient, product = jax.jvp(jax.grad(masked), (z,), (jnp.ones_like(z),))
    for derivative in (gradient, product):
        assert jnp.all(jnp.isfinite(derivative))
        assert not jnp.any(derivative[~mask])
    if loss is not cf.losses.accuracy:
        assert jnp.all(gradient[mask] != 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", ALL)
def test_weights_of_positions(loss):
    z, y = _batch(loss, (5, 4))
    weights = np.random.default_rng(1).random((5, 4))
    values = _formula(loss, np.asarray(z), np.asarray(y))
    expected = np.mean(np.average(values, axis=1, weights=weights))
    value = loss(_identity, (z, y, jnp.asarray(weights)))
    np.testing.assert_allclose(value, expected, **EXACT)
    ones = loss(_identity, (z, y, jnp.ones((5, 4))))
    np.testing.assert_allclose(ones, loss(_identity, (z, y)), **EXACT)


class _Pool(eqx.Module):
    """The mean of the embeddings of the words that are no padding."""

    embedding: jax.Array

    def __call__(self, example):
        tokens, mask = example
        return mask @ self.embedding[tokens] / mask.sum()


class _Bigram(eqx.Module):
    """The next token from the last."""

    logits: jax.Array

    def __call__(self, tokens):
        return self.logits[tokens]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("loss", [*LOSSES[:2], cf.losses.accuracy])
def test_microbatches(loss):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(5, size=(7, 6)))
    mask = jnp.asarray(rng.random((7, 6)) < 0.5).at[:, 0].set(True)
    classes = jax.nn.one_hot(jnp.arange(7) % 3, 3)
    pool = _Pool(jnp.asarray(rng.normal(size=(5, 3))))
    bigram = _Bigram(jnp.asarray(rng.normal(size=(5, 5))))
    following = jax.nn.one_hot(jnp.roll(tokens, -1, axis=1), 5)
    text, sequences = ((tokens, mask), classes), (tokens, following, mask)
    for model, data in [(pool, text), (bigram, sequences)]:
        w, whole = cf.Objective(loss, data).flatten(model)
        _, parts = cf.Objective(loss, data, microbatch_size=3).flatten(model)
        evaluate = eqx.filter_jit(lambda fn, w: (*fn.value_and_grad(w), fn.hvp(w, w)))
        for a, b in zip(evaluate(parts, w), evaluate(whole, w), strict=True):
            np.testing.assert_allclose(a, b, **EXACT)
        np.testing.assert_allclose(parts.loss(w), loss(model, data), **EXACT)


def test_accuracy_of_one_output():
    z = jnp.array([[2.0], [-1.0], [0.5], [-3.0]])
    y = jnp.array([[1.0], [0.0], [0.0], [1.0]])
    assert cf.losses.accuracy(_identity, (z, y)) == 0.5
    mask = jnp.array([[True, True, True, False]])
    value = cf.losses.accuracy(_identity, (z[None], y[None], mask))
    np.testing.assert_allclose(value, 2 / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (4, 1)), "one shape"),  # which would broadcast
        (((4,), (4,)), "one shape"),
        (((4, 5, 3), (4, 5, 3), (4, 3)), "`mask` must have the shape"),
        (((4, 3), (4, 3), (4,)), "leaving them out of the data"),
    ],
)
@pytest.mark.parametrize("loss", ALL)
def test_shapes_that_do_not_fit(loss, shapes, message):
    with pytest.raises(ValueError, match=message):
        loss(_identity, tuple(map(jnp.ones, shapes)))


def test_logistic_loss_of_many_outputs():
    with pytest.raises(ValueError, match="got 3: use `cross_entropy`"):
        cf.losses.logistic_loss(_identity, (jnp.ones((4, 3)), jnp.ones((4, 3))))
