"""The long short-term memory."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .layers import (
    Tokens,
    Vectors,
    check_sizes,
    last_layer,
    read_out,
    split_key,
    split_padding,
)


class LSTM(eqx.Module):
    """Layers of long short-term memory over a sequence, and a linear layer.

    **Arguments:**

    - `in_size`: the number of different tokens, which are the integers below it, or the
        size of the vectors. Negative tokens, at the end of a sequence, are padding; or
        a mask is: the input is then `(sequence, mask)`.
    - `out_size`: the number of outputs; of a language model, `in_size`.
    - `width`: the size of the states, and of the embedding of tokens.
    - `depth`: the number of layers.
    - `tokens`: whether the inputs are tokens `[T]` and not real vectors `[T, in_size]`.
    - `pool`: whether there is one output, from the mean over the positions that are not
        padding, and not one at each position.
    - `last_scale`: multiplies the initial weights of the last layer.
    - `key`: for the initial weights, those of Equinox's layers.

    ??? cite "Reference"

        S. Hochreiter, J. Schmidhuber, *Long short-term memory*, Neural Computation 9
        (1997).
    """

    embedding: eqx.nn.Embedding | None
    cells: list[eqx.nn.LSTMCell]
    last: eqx.nn.Linear
    pool: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        out_size: int,
        width: int = 32,
        depth: int = 1,
        *,
        tokens: bool = True,
        pool: bool = False,
        last_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        check_sizes(in_size=in_size, out_size=out_size, width=width, depth=depth)
        embed, last, *keys = split_key(key, 2 + depth)
        self.embedding = None
        if tokens:
            self.embedding = eqx.nn.Embedding(in_size, width, key=embed)
        sizes = [width if tokens else in_size, *[width] * (depth - 1)]
        self.cells = [
            eqx.nn.LSTMCell(size, width, key=k)
            for size, k in zip(sizes, keys, strict=True)
        ]
        self.last = last_layer(width, out_size, last_scale, key=last)
        self.pool = pool

    def __call__(
        self, x: Tokens | Vectors
    ) -> Float[Array, "T out"] | Float[Array, " out"]:
        """The outputs for one sequence, `[T, out_size]`, or `[out_size]` with `pool`.
        Those at a position depend on the inputs up to it."""
        x, present = split_padding(x, tokens=self.embedding is not None)
        if self.embedding is not None:
            states = jax.vmap(self.embedding)(x)
        else:
            size = self.cells[0].input_size
            if x.ndim != 2 or x.shape[1] != size:
                raise ValueError(
                    f"`x` must be one sequence of vectors, of shape [T, {size}], got "
                    f"{x.shape}: reshape it, `jax.vmap` the model over sequences, or "
                    "make it with `tokens=True`."
                )
            states = x
        for cell in self.cells:
            states = _run(cell, states)
        return read_out(self.last, states, present, self.pool)


def _run(cell: eqx.nn.LSTMCell, x: Float[Array, "T before"]) -> Float[Array, "T width"]:
    """The hidden states of one layer, from zero ones."""

    def advance(state, x):
        state = cell(x, state)
        return state, state[0]

    zero = jnp.zeros(cell.hidden_size, jnp.result_type(x, cell.weight_ih))
    return jax.lax.scan(advance, (zero, zero), x)[1]
