"""The full-batch loss and its derivatives on flattened parameters."""

import inspect
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from .checks import require_integer
from .sharding import automatic


class Objective(eqx.Module):
    """A full-batch loss: the mean of `loss_fn(model, batch)` over a data set.

    **Arguments:**

    - `loss_fn`: `loss_fn(model, batch) -> scalar`, a *mean* over the examples in
        `batch`; or `loss_fn(model) -> scalar` if there is no data.
    - `data`: a PyTree of arrays with a common leading axis, the examples.
    - `microbatch_size`: every derivative is accumulated over microbatches of this
        many examples, so that memory is bounded by the microbatch. All derivatives
        stay exact: a ragged last microbatch gets the weight of its size. `None` takes
        all examples at once.

    **Raises:**

    `ValueError` if the leaves of `data` are not arrays of numbers or have different or
    zero lengths, if `loss_fn` takes other arguments, or if `microbatch_size` is not
    positive.
    """

    loss_fn: Callable[..., Any]
    data: PyTree
    microbatch_size: int | None = eqx.field(static=True)

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        data: PyTree = None,
        *,
        microbatch_size: int | None = None,
    ):
        if not callable(loss_fn):
            raise ValueError(f"`loss_fn` must be callable, got {loss_fn!r}.")
        for path, leaf in jax.tree_util.tree_leaves_with_path(data):
            name = "data" + jax.tree_util.keystr(path)
            if not isinstance(leaf, np.ndarray | np.generic | jax.Array):
                raise ValueError(
                    f"`{name}` must be an array with a leading example axis, got "
                    f"{type(leaf).__name__}: wrap it in `jnp.asarray`."
                )
            if leaf.dtype.kind in "OSUMm":
                raise ValueError(
                    f"`{name}` must hold numbers, got an array of type {leaf.dtype}."
                )
        data = automatic(jax.tree.map(jnp.asarray, data))
        lengths = {
            "data" + jax.tree_util.keystr(path): leaf.shape[:1]
            for path, leaf in jax.tree_util.tree_leaves_with_path(data)
        }
        if len(set(lengths.values())) > 1 or set(lengths.values()) & {(), (0,)}:
            shown = ", ".join(f"{k}: {v[0] if v else '()'}" for k, v in lengths.items())
            raise ValueError(
                "`data` must hold arrays with one common, non-empty leading example "
                f"axis, got lengths {shown}."
            )
        _check_signature(loss_fn, has_data=bool(lengths))
        if microbatch_size is not None:
            require_integer("microbatch_size", microbatch_size)
        self.loss_fn = loss_fn
        self.data = data
        self.microbatch_size = None if microbatch_size is None else int(microbatch_size)

    @property
    def examples(self) -> int | None:
        """The number of examples, or `None` without data."""
        leaves = jax.tree.leaves(self.data)
        return leaves[0].shape[0] if leaves else None

    def flatten(self, model: PyTree) -> tuple[Float[Array, " n"], "FlatObjective"]:
        """The parameters of `model` as one vector, and the objective as a function
        of that vector.

        **Arguments:**

        - `model`: any PyTree. Its inexact-array leaves are the parameters; all other
            leaves are constants.

        **Returns:**

        The weights, of shape `[n]`, and a [`centralflow.FlatObjective`][].

        **Raises:**

        `ValueError` if `model` has no floating-point parameters, or complex ones.
        """
        parameters, static = eqx.partition(automatic(model), _is_parameter)
        parameters = jax.tree.map(jnp.asarray, parameters)
        leaves = jax.tree.leaves(parameters)
        if sum(leaf.size for leaf in leaves) == 0:
            kinds = {str(x.dtype) for x in jax.tree.leaves(model) if eqx.is_array(x)}
            raise ValueError(
                "`model` has no parameters: none of its leaves is a non-empty array "
                f"of floating-point numbers (array types found: {sorted(kinds)}). "
                "Convert integer parameters with `.astype(float)`."
            )
        if any(jnp.iscomplexobj(leaf) for leaf in leaves):
            raise ValueError("`model` has complex parameters; only real ones will do.")
        weights, unravel = ravel_pytree(parameters)
        return weights, FlatObjective(self, static, unravel)


class FlatObjective(eqx.Module):
    """An [`centralflow.Objective`][] as a function of the flat weights `w [n]`.

    All arrays are leaves and all functions are static, so one compiled program serves
    other data of the same shape. `u` and `v` are vectors `[n]`; `V [k, n]` is a block
    of vectors, one to a row.
    """

    objective: Objective
    static: PyTree
    unravel: Callable[[Array], PyTree] = eqx.field(static=True)

    def model(self, w: Float[Array, " n"]) -> PyTree:
        """The model that has the parameters `w`."""
        try:
            parameters = self.unravel(w)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "`w` must be the flat weights of this model, got an array of shape "
                f"{jnp.shape(w)}: {error}"
            ) from error
        return eqx.combine(parameters, self.static)

    def _loss(self, batch: PyTree) -> Callable[[Float[Array, " n"]], Array]:
        """The loss of a batch, or of no data, as a function of the weights."""
        batches = () if self.objective.examples is None else (batch,)
        return lambda w: self.objective.loss_fn(self.model(w), *batches)

    @property
    def _in_one(self) -> bool:
        examples, size = self.objective.examples, self.objective.microbatch_size
        return examples is None or size is None or size >= examples

    def _accumulate(self, add: Callable, zero: PyTree) -> PyTree:
        """The sum over microbatches of what `add(loss, share, total)` adds to `total`,
        where `loss(w)` is the loss of one and `share` its share of the examples."""
        data, examples = self.objective.data, self.objective.examples
        if self._in_one:
            return add(self._loss(data), 1.0, zero)
        size = self.objective.microbatch_size
        whole, ragged = divmod(examples, size)
        # Microbatch j has the examples j, j + whole, j + 2 whole, ...: of data sharded
        # over devices each device then has a share in each microbatch, and no example
        # has to leave it.
        head = jax.tree.map(
            lambda x: x[: whole * size].reshape(size, whole, *x.shape[1:]), data
        )
        take = lambda j: jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, j, 1, keepdims=False), head
        )
        on = lambda batch, count, total: add(self._loss(batch), count / examples, total)
        total = jax.lax.fori_loop(0, whole, lambda j, x: on(take(j), size, x), zero)
        if ragged:
            tail = jax.tree.map(lambda x: x[whole * size :], data)
            total = on(tail, ragged, total)
        return total

    def _mean(self, fn: Callable[[Callable], PyTree]) -> PyTree:
        """The mean over examples of `fn(loss)`, where `loss(w)` is the loss of one
        microbatch and `fn` is linear in it, as every derivative is."""
        on_all = lambda: fn(self._loss(self.objective.data))
        if self._in_one:
            return on_all()
        like = jax.eval_shape(on_all)
        add = lambda loss, share, total: jax.tree.map(
            lambda s, x: s + share * x, total, fn(loss)
        )
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return self._accumulate(add, zero)

    def loss(self, w: Float[Array, " n"]) -> Float[Array, ""]:
        """L(w)."""
        return self._mean(lambda loss: loss(w))

    def value_and_grad(
        self, w: Float[Array, " n"]
    ) -> tuple[Float[Array, ""], Float[Array, " n"]]:
        """L(w) and its gradient."""
        return self._mean(lambda loss: jax.value_and_grad(loss)(w))

    def grad(self, w: Float[Array, " n"]) -> Float[Array, " n"]:
        """The gradient of L at w."""
        return self.value_and_grad(w)[1]

    def hvp(self, w: Float[Array, " n"], v: Float[Array, " n"]) -> Float[Array, " n"]:
        """The Hessian-vector product H(w) v."""
        return self._mean(lambda loss: jax.jvp(jax.grad(loss), (w,), (v,))[1])

    def hessian(self, w: Float[Array, " n"]) -> Callable[..., Float[Array, "k n"]]:
        """H(w) as a function `(V, count, known=0, images=None)`: applied to the first
        `count` rows of V but for the first `known` ones. The other rows are those of
        `images`, or zero.

        The gradient is linearized here, once for all that is done with the function,
        but with microbatches once for each block of rows.
        """
        linearize = lambda loss: jax.linearize(jax.grad(loss), w)[1]
        if self._in_one:
            hvp = linearize(self._loss(self.objective.data))

            def products(V, count, known=0, images=None):
                images = jnp.zeros_like(V) if images is None else images
                return _by_row(hvp, V, known, count, images)

            return products

        def products(V, count, known=0, images=None):
            images = jnp.zeros_like(V) if images is None else images
            add = lambda loss, share, total: _by_row(
                linearize(loss), V, known, count, total, share=share
            )
            return self._accumulate(add, images)

        return products

    def hvps(
        self,
        w: Float[Array, " n"],
        V: Float[Array, "k n"],
        count: int | Int[Array, ""],
        known: int | Int[Array, ""] = 0,
        images: Float[Array, "k n"] | None = None,
    ) -> Float[Array, "k n"]:
        """H(w) applied to the first `count` rows of V, but for the first `known` ones;
        the other rows are those of `images` (zero where it is applied), or zero."""
        return self.hessian(w)(V, count, known, images)

    def preconditioned_hessian(
        self, w: Float[Array, " n"], P: Float[Array, ""] | Float[Array, " n"]
    ) -> Callable[[Float[Array, "k n"], int | Int[Array, ""]], Float[Array, "k n"]]:
        """P^-1/2 H(w) P^-1/2 for a diagonal P, as a function of the rows of V and
        their number. With u = P^-1/2 v, its eigenvectors v are those of P^-1 H."""
        scale, hessian = jnp.sqrt(P), self.hessian(w)
        return lambda V, count: hessian(V / scale, count) / scale

    def third(
        self, w: Float[Array, " n"], u: Float[Array, " n"], v: Float[Array, " n"]
    ) -> Float[Array, " n"]:
        """The third derivative d(u' H(w) v)/dw, a vector of shape `[n]`."""

        def derivative(loss):
            hvp = lambda x: jax.jvp(jax.grad(loss), (x,), (v,))[1]
            return jax.grad(lambda x: u @ hvp(x))(w)

        return self._mean(derivative)

    def thirds(
        self,
        w: Float[Array, " n"],
        V: Float[Array, "k n"],
        count: int | Int[Array, ""],
        known: int | Int[Array, ""] = 0,
    ) -> Float[Array, "m n"]:
        """The third derivatives D_ij = d(v_i' H(w) v_j)/dw of all pairs of the first
        `count` rows of V, but for those of the first `known` ones.

        **Returns:**

        Shape `[k (k + 1) / 2, n]`: the row of the pair i >= j is i (i + 1) / 2 + j, so
        that the pairs of the first `count` rows come first. The other rows are zero.
        """
        k, n = V.shape

        def derivatives(loss, share, total):
            # Forward over forward over reverse, linearized at w once for each i: the
            # linear map then serves all j <= i.
            def pairs(i, D):
                hvp = lambda x: jax.jvp(jax.grad(loss), (x,), (V[i],))[1]
                _, third = jax.linearize(hvp, w)
                row = lambda j: i * (i + 1) // 2 + j
                add = lambda j, D: D.at[row(j)].add(share * third(V[j]))
                return jax.lax.fori_loop(0, i + 1, add, D)

            return jax.lax.fori_loop(known, count, pairs, total)

        # A zero that depends on V: compilers make constants long before they are
        # needed, here before the eigenvectors are computed, and keep them.
        zero = jnp.broadcast_to(0 * V[0, 0], (k * (k + 1) // 2, n))
        return self._accumulate(derivatives, zero)

    def thirds_along(
        self, w: Float[Array, " n"], V: Float[Array, "k n"], count: int | Int[Array, ""]
    ) -> Float[Array, "k n"]:
        """The third derivatives D_ii = d(v_i' H(w) v_i)/dw of the first `count` rows of
        V, and zeros."""

        def derivatives(loss, share, total):
            def add(i, D):
                hvp = lambda x: jax.jvp(jax.grad(loss), (x,), (V[i],))[1]
                return D.at[i].add(share * jax.jvp(hvp, (w,), (V[i],))[1])

            return jax.lax.fori_loop(0, count, add, total)

        return self._accumulate(derivatives, jnp.broadcast_to(0 * V[0, 0], V.shape))

    def evaluate(
        self, metrics: dict[str, Callable], w: Float[Array, " n"]
    ) -> dict[str, Array]:
        """The values of functions of the model."""
        model = self.model(w)
        return {name: jnp.asarray(fn(model)) for name, fn in metrics.items()}

    def second_derivative(
        self,
        fn: Callable[[PyTree], PyTree],
        w: Float[Array, " n"],
        u: Float[Array, " n"],
        v: Float[Array, " n"],
    ) -> PyTree:
        """u' (d^2 h/dw^2) v for any observable `h = fn(model)`, entry by entry."""
        observable = lambda x: fn(self.model(x))
        slope = lambda x: jax.jvp(observable, (x,), (v,))[1]
        return jax.jvp(slope, (w,), (u,))[1]


def _by_row(
    linear: Callable[[Float[Array, " n"]], Float[Array, " n"]],
    V: Float[Array, "k n"],
    known: int | Int[Array, ""],
    count: int | Int[Array, ""],
    total: Float[Array, "k n"],
    share: float = 1.0,
) -> Float[Array, "k n"]:
    """`total` and `share` times the images of the first `count` rows of V, but for the
    first `known` ones.

    A loop and not a `vmap`: a batched product is slower on a CPU, and `count` may be
    dynamic. But a loop over pairs, whose products do not depend on each other: on two
    cores they take 1.3 to 1.4 times as long as one, also where the second is not used.
    (Pairs of third derivatives take as long as two.)
    """
    together = min(2, len(V))

    def add(p, total):
        for i in range(together):
            j = known + together * p + i
            image = jnp.where(j < count, share * linear(V[j]), 0)
            total = total.at[j].add(image, mode="drop")
        return total

    return jax.lax.fori_loop(0, -((known - count) // together), add, total)


def _check_signature(loss_fn: Callable, has_data: bool) -> None:
    try:
        signature = inspect.signature(loss_fn)
    except ValueError:  # that of a builtin is not known
        return
    arguments = ("model", "batch") if has_data else ("model",)
    try:
        signature.bind(*arguments)
    except TypeError as error:
        there = "is `data`" if has_data else "are no `data`"
        raise ValueError(
            f"`loss_fn` must be callable as `loss_fn({', '.join(arguments)})`, as "
            f"there {there}; {getattr(loss_fn, '__name__', loss_fn)}{signature} is "
            f"not: {error}."
        ) from error


def _is_parameter(leaf: Any) -> bool:
    # NumPy's arrays too, but not Python's floats, such as the rate of a dropout.
    array = isinstance(leaf, np.ndarray | jax.Array)
    return array and jnp.issubdtype(leaf.dtype, jnp.inexact)


def is_traced(tree: PyTree) -> bool:
    """Whether any leaf is a tracer, whose value cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))
