"""The models' shapes, types and errors: traced only, and so not compiled."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest

from centralflow.models import CNN, LSTM, Mamba, ResNet, Transformer, ViT

from .test_models import IMAGES, KEY, LENGTH, MODELS, OUT, SEQUENCES, VECTORS, inputs


@pytest.mark.parametrize(
    ("name", "pool"),
    [(name, {}) for name in MODELS]
    + [(name, dict(pool=True)) for name in SEQUENCES | VECTORS],
)
def test_outputs_of_an_ensemble(name, pool):
    x = inputs(name)

    @eqx.filter_vmap
    def outputs(key):
        model = MODELS[name](key, **pool)
        return model, jax.vmap(model)(x)

    models, y = eqx.filter_eval_shape(outputs, jr.split(KEY, 2))
    positions = () if pool or name in IMAGES else (LENGTH,)
    assert y.shape == (2, len(x), *positions, OUT)
    types = {x.dtype for x in jax.tree.leaves(models) if hasattr(x, "dtype")}
    assert types == {y.dtype} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: CNN((8, 8), OUT, key=KEY), (8, 8)),
        (lambda: CNN((32, 32, 3), OUT, key=KEY), (32, 32, 3)),
        (lambda: ResNet((8, 8, 1), OUT, key=KEY), (8, 8)),
        (lambda: ResNet((7, 9, 3), OUT, (8, 12, 16), 2, key=KEY), (7, 9, 3)),
        (lambda: ViT((8, 8), OUT, 4, key=KEY), (8, 8, 1)),
        (lambda: ViT((6, 4, 3), OUT, 2, key=KEY), (6, 4, 3)),
    ],
)
def test_image_shapes(make, shape):
    outputs = eqx.filter_eval_shape(lambda: make()(jnp.ones(shape)))
    assert outputs.shape == (OUT,)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: CNN((8,), OUT, key=KEY), r"`in_shape` .* got \(8,\)"),
        (lambda: CNN((8, 0), OUT, key=KEY), r"`in_shape\[1\]` .* got 0"),
        (lambda: CNN((8, 6), OUT, key=KEY), "multiples of 4, got 8 and 6"),
        (lambda: CNN((8, 8), OUT, (), key=KEY), r"`widths` .* got \(\)"),
        (lambda: CNN((8, 8), OUT, (4, 2.5), key=KEY), r"`widths\[1\]` .* got 2.5"),
        (lambda: CNN((8, 8), OUT, last_scale=-1.0, key=KEY), "`last_scale` .* got -1"),
        (lambda: IMAGES["CNN"]()(jnp.ones((2, 4, 4))), r"`x` .* got \(2, 4, 4\)"),
        (lambda: ResNet((8, 8), OUT, (4, 6), key=KEY), r"groups=4 and widths\[1\]=6"),
        (lambda: ResNet((8, 8), OUT, depth=0, key=KEY), "`depth` .* got 0"),
        (lambda: ViT((8, 8), OUT, 3, key=KEY), r"patch_size=3 and in_shape=\(8, 8\)"),
        (lambda: ViT((8, 8), OUT, 4, 6, key=KEY), "heads=4 and width=6: .* 8"),
        (lambda: Transformer(5, 0, 6, key=KEY), "`out_size` .* got 0"),
        (lambda: Transformer(5, 3, 6, 8, 1, 3, key=KEY), "heads=3 and width=8: .* 9"),
        (
            lambda: SEQUENCES["Transformer"]()(jnp.arange(7) % 5),
            "`length` = 6 .* 7",
        ),
        (lambda: SEQUENCES["Transformer"]()(jnp.ones(6)), "`tokens` .* got float32"),
        (lambda: SEQUENCES["Mamba"]()(jnp.ones((2, 6), int)), r"shape \(2, 6\)"),
        (lambda: Mamba(5, 3, state_size=True, key=KEY), "`state_size` .* got True"),
        (lambda: LSTM("5", 3, key=KEY), "`in_size` .* got '5'"),
        (lambda: SEQUENCES["LSTM"]()(jnp.ones((6, 2))), "`tokens` .* got float32"),
        (lambda: VECTORS["vectors"]()(jnp.ones((6, 3))), r"`x` .* got \(6, 3\)"),
    ],
)
def test_bad_arguments(call, named):
    with pytest.raises(ValueError, match=named):
        eqx.filter_eval_shape(call)
