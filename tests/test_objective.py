"""The loss and its derivatives against dense derivatives and finite differences."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

from .problems import tiny_loss, tiny_network


def _problem(dtype, microbatch_size=None):
    model, data = tiny_network(dtype)
    w, flat = cf.Objective(tiny_loss, data, microbatch_size=microbatch_size).flatten(
        model
    )
    V = jnp.asarray(np.random.default_rng(1).normal(size=(4, w.size)), dtype)
    return w, flat, V


@pytest.mark.usefixtures("x64")
def test_derivatives_match_finite_differences():
    w, flat, V = _problem(jnp.float64)
    u, v = V[0] / jnp.linalg.norm(V[0]), V[1] / jnp.linalg.norm(V[1])
    # Central differences in float64: h^2 from truncation, eps / h from rounding; at
    # h = eps^(1/3) both are about 4e-11, times derivatives of order 10.
    h = 6e-6
    difference = lambda fn, d: (fn(w + h * d) - fn(w - h * d)) / (2 * h)
    np.testing.assert_allclose(difference(flat.loss, u), flat.grad(w) @ u, atol=1e-9)
    np.testing.assert_allclose(difference(flat.grad, u), flat.hvp(w, u), atol=1e-9)
    np.testing.assert_allclose(
        difference(lambda w: flat.hvp(w, v), u), flat.third(w, u, v), atol=1e-9
    )


@pytest.mark.usefixtures("x64")
def test_derivatives_match_dense_ones():
    w, flat, V = _problem(jnp.float64)
    H = jax.hessian(flat.loss)(w)
    T = jax.jacfwd(jax.hessian(flat.loss))(w)
    exact = dict(rtol=1e-12, atol=1e-12)  # rounding of some 1e3 operations
    np.testing.assert_allclose(flat.hvps(w, V, 4), V @ H, **exact)
    D = flat.thirds(w, V, 4)
    for row, (i, j) in enumerate(zip(*np.tril_indices(4), strict=True)):
        np.testing.assert_allclose(
            D[row], jnp.einsum("abc,a,b", T, V[i], V[j]), **exact
        )
    along = flat.thirds_along(w, V, 4)
    np.testing.assert_allclose(along, jnp.einsum("abc,ia,ib->ic", T, V, V), **exact)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("known", [0, 1, 2, 3])
def test_products_that_are_known_are_not_made_again(known):
    w, flat, V = _problem(jnp.float64)
    first = flat.hvps(w, V, known)
    # What is there stays: it is not made again, or it would not be seven times that.
    all_ = eqx.filter_jit(flat.hvps)(w, V, 3, jnp.asarray(known), 7 * first)
    true = flat.hvps(w, V, 3)
    np.testing.assert_allclose(all_[:known], 7 * true[:known], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(all_[known:], true[known:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_dynamic_count(count):
    w, flat, V = _problem(jnp.float32)
    products = eqx.filter_jit(flat.hvps)(w, V, jnp.asarray(count))
    full = flat.hvps(w, V, 4)
    assert not jnp.any(products[count:])
    # float32 rounding: the fused loops may order sums differently
    np.testing.assert_allclose(products[:count], full[:count], rtol=1e-5, atol=1e-6)
    pairs = count * (count + 1) // 2
    thirds = eqx.filter_jit(flat.thirds)(w, V, jnp.asarray(count))
    assert not jnp.any(thirds[pairs:])
    np.testing.assert_allclose(
        thirds[:pairs], flat.thirds(w, V, 4)[:pairs], rtol=1e-4, atol=1e-5
    )
    # Those of the first row are not computed if they are known.
    others = eqx.filter_jit(flat.thirds)(w, V, jnp.asarray(count), jnp.asarray(1))
    assert not jnp.any(others[:1])
    np.testing.assert_allclose(others[1:], thirds[1:], rtol=1e-4, atol=1e-5)
    along = eqx.filter_jit(flat.thirds_along)(w, V, jnp.asarray(count))
    assert not jnp.any(along[count:])
    diagonal = [i * (i + 1) // 2 + i for i in range(count)]
    np.testing.assert_allclose(
        along[:count], thirds[jnp.asarray(diagonal, int)], rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 3, 4, 10, 11, 50])
def test_microbatches_are_exact(size):
    w, flat, V = _problem(jnp.float64)
    _, pieces, _ = _problem(jnp.float64, microbatch_size=size)
    exact = dict(rtol=1e-12, atol=1e-13)
    for of in (
        lambda f: f.value_and_grad(w),
        lambda f: f.loss(w),
        lambda f: f.hvp(w, V[0]),
        lambda f: f.hvps(w, V, 3),
        lambda f: f.third(w, V[0], V[1]),
        lambda f: f.thirds(w, V, 2),
    ):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **exact), of(flat), of(pieces)
        )


def test_microbatches_bound_memory():
    # So many because the matrix products of a GPU have a workspace of 32 MiB besides.
    model, data = tiny_network(jnp.float32, width=32, examples=2**20)

    def temporary_bytes(size):
        w, flat = cf.Objective(tiny_loss, data, microbatch_size=size).flatten(model)
        V = jnp.ones((3, w.size))
        fn = eqx.filter_jit(lambda w, flat: (flat.hvps(w, V, 3), flat.thirds(w, V, 3)))
        compiled = fn.lower(w, flat).compile().compiled
        return compiled.memory_analysis().temp_size_in_bytes

    # 64 times smaller batches; what does not shrink is the blocks of vectors.
    assert temporary_bytes(2**14) < temporary_bytes(None) / 16


@pytest.mark.usefixtures("x64")
def test_second_derivative_of_an_observable():
    w, flat, V = _problem(jnp.float64)
    observable = lambda model: dict(C=jnp.exp(model["C"]).sum(1), b=model["b"] ** 3)
    second = flat.second_derivative(observable, w, V[0], V[1])
    for name in ("C", "b"):
        hessian = jax.hessian(lambda w, name=name: observable(flat.model(w))[name])(w)
        np.testing.assert_allclose(second[name], hessian @ V[1] @ V[0], rtol=1e-11)


def test_models_are_any_pytree():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    x = jnp.ones((5, 3))
    w, flat = cf.Objective(lambda m, x: jnp.mean(jax.vmap(m)(x) ** 2), x).flatten(model)
    assert w.size == sum(
        p.size for p in jax.tree.leaves(eqx.filter(model, eqx.is_array))
    )
    assert eqx.tree_equal(flat.model(w), model)
    # integers and functions are constants
    model = dict(p=np.ones(3, "float32"), n=jnp.arange(2), f=jnp.sin, rate=0.5)
    w, flat = cf.Objective(lambda m: jnp.sum(m["f"](m["p"])) + m["n"][1]).flatten(model)
    assert w.shape == (3,)
    np.testing.assert_allclose(flat.grad(w), np.cos(np.ones(3)), rtol=1e-6)


def test_other_data_reuse_the_program():
    traces = 0

    def loss(model, batch):
        nonlocal traces
        traces += 1
        return tiny_loss(model, batch)

    grad = eqx.filter_jit(lambda flat, w: flat.grad(w))
    for seed in (0, 1):
        model, data = tiny_network(jnp.float32, seed=seed)
        w, flat = cf.Objective(loss, data).flatten(model)
        grad(flat, w)
    assert traces == 1


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((3.0,), "loss_fn"),
        ((tiny_loss, (jnp.ones(3), jnp.ones(4))), r"data\[0\]: 3, data\[1\]: 4"),
        ((tiny_loss, jnp.ones((0, 2))), "data"),
        ((tiny_loss, jnp.ones(())), "data"),
        ((tiny_loss, dict(x=[1.0, 2.0])), "data"),
    ],
)
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        cf.Objective(*arguments)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("size", [0, -1, 2.5, True, "all"])
def test_bad_microbatch_size(size):
    with pytest.raises(ValueError, match="microbatch_size"):
        cf.Objective(tiny_loss, jnp.ones(3), microbatch_size=size)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "model", [dict(), dict(n=jnp.arange(3)), dict(f=jnp.sin), jnp.ones(2, complex)]
)
def test_models_without_real_parameters(model):
    with pytest.raises(ValueError, match="`model`"):
        cf.Objective(lambda m: 0.0).flatten(model)
