"""The transformer."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .layers import (
    AttentionBlock,
    LayerNorm,
    Tokens,
    check_heads,
    check_sizes,
    last_layer,
    read_out,
    split_key,
    split_padding,
)


class Transformer(eqx.Module):
    """A causal transformer over tokens, with learned positions and blocks that
    normalize first.

    **Arguments:**

    - `in_size`: the number of different tokens, which are the integers below it.
        Negative ones, at the end of a sequence, are padding; or a mask says what is:
        the input is then `(tokens, mask)`.
    - `out_size`: the number of outputs; of a language model, `in_size`.
    - `length`: of the longest sequence.
    - `width`: the size of a token's representation.
    - `depth`: the number of blocks.
    - `heads`: of the attention, which must divide `width`.
    - `pool`: whether there is one output, from the mean over the positions that are not
        padding, and not one at each position.
    - `last_scale`: multiplies the initial weights of the last layer.
    - `key`: for the initial weights, those of Equinox's layers.

    ??? cite "References"

        A. Vaswani et al., *Attention is all you need*, NeurIPS 2017, arXiv 1706.03762.

        A. Radford et al., *Language models are unsupervised multitask learners* (2019),
        for the normalization and the positions.
    """

    embedding: eqx.nn.Embedding
    positions: eqx.nn.Embedding
    blocks: list[AttentionBlock]
    norm: LayerNorm
    last: eqx.nn.Linear
    pool: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        out_size: int,
        length: int,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
        *,
        pool: bool = False,
        last_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        check_sizes(in_size=in_size, out_size=out_size, length=length, depth=depth)
        check_heads(heads, width)
        embed, place, last, *keys = split_key(key, 3 + depth)
        self.embedding = eqx.nn.Embedding(in_size, width, key=embed)
        self.positions = eqx.nn.Embedding(length, width, key=place)
        self.blocks = [AttentionBlock(width, heads, key=k) for k in keys]
        self.norm = LayerNorm(width)
        self.last = last_layer(width, out_size, last_scale, key=last)
        self.pool = pool

    def __call__(self, tokens: Tokens) -> Float[Array, "T out"] | Float[Array, " out"]:
        """The outputs for one sequence, `[T, out_size]`, or `[out_size]` with `pool`.
        Those at a position depend on the tokens up to it."""
        tokens, present = split_padding(tokens)
        length = self.positions.num_embeddings
        if tokens.size > length:
            raise ValueError(
                f"`tokens` must hold at most `length` = {length} tokens, got "
                f"{tokens.size}: make a model of that `length`."
            )
        x = jax.vmap(self.embedding)(tokens) + self.positions.weight[: tokens.size]
        causal = jnp.tril(jnp.ones((tokens.size, tokens.size), bool))
        for block in self.blocks:
            x = block(x, causal)
        return read_out(self.last, self.norm(x), present, self.pool)
