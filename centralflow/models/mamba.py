"""The selective state-space model."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .layers import Tokens, check_sizes, last_layer, read_out, split_key, split_padding


class _Block(eqx.Module):
    """A selective state-space model on normalized inputs, added to them."""

    norm: eqx.nn.RMSNorm
    expand: eqx.nn.Linear
    kernel: Float[Array, "kernel inner"]
    bias: Float[Array, " inner"]
    select: eqx.nn.Linear
    step: eqx.nn.Linear
    log_A: Float[Array, "inner state"]
    D: Float[Array, " inner"]
    contract: eqx.nn.Linear

    def __init__(
        self, width: int, state_size: int, kernel_size: int, *, key: PRNGKeyArray
    ):
        expand, convolve, select, step, time, contract = jr.split(key, 6)
        inner, rank = 2 * width, -(-width // 16)
        bare = dict(use_bias=False)
        self.norm = eqx.nn.RMSNorm(width, **bare)
        self.expand = eqx.nn.Linear(width, 2 * inner, **bare, key=expand)
        # A depthwise convolution, as a sum over shifts: XLA's own convolutions on CPUs
        # are slow inside loops.
        limit = kernel_size**-0.5
        kernel = jr.uniform(
            convolve, (kernel_size + 1, inner), minval=-limit, maxval=limit
        )
        self.kernel, self.bias = kernel[:-1], kernel[-1]
        self.select = eqx.nn.Linear(inner, rank + 2 * state_size, **bare, key=select)
        # Time steps softplus(bias), log-uniform between 1e-3 and 1e-1.
        dt = jnp.exp(
            jr.uniform(time, (inner,), minval=math.log(1e-3), maxval=math.log(1e-1))
        )
        self.step = eqx.tree_at(
            lambda linear: linear.bias,
            eqx.nn.Linear(rank, inner, key=step),
            dt + jnp.log(-jnp.expm1(-dt)),
        )
        self.log_A = jnp.tile(jnp.log(jnp.arange(1.0, state_size + 1)), (inner, 1))
        self.D = jnp.ones(inner)
        self.contract = eqx.nn.Linear(inner, width, **bare, key=contract)

    def __call__(self, x: Float[Array, "T width"]) -> Float[Array, "T width"]:
        y = jax.vmap(self.expand)(jax.vmap(self.norm)(x))
        u, gate = jnp.split(y, 2, axis=-1)
        size, length = len(self.kernel), len(u)
        u = jnp.pad(u, ((size - 1, 0), (0, 0)))
        u = sum(self.kernel[i] * u[i : i + length] for i in range(size)) + self.bias
        u = jax.nn.silu(u)
        rank, state_size = self.step.in_features, self.log_A.shape[1]
        low, B, C = jnp.split(
            jax.vmap(self.select)(u), [rank, rank + state_size], axis=-1
        )
        dt = jax.nn.softplus(jax.vmap(self.step)(low))
        A = -jnp.exp(self.log_A)

        # h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t',  y_t = h_t C_t + D u_t
        def advance(h, inputs):
            dt, u, B, C = inputs
            h = jnp.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B
            return h, h @ C

        _, y = jax.lax.scan(advance, jnp.zeros_like(A), (dt, u, B, C))
        return x + jax.vmap(self.contract)((y + self.D * u) * jax.nn.silu(gate))


class Mamba(eqx.Module):
    """A selective state-space model over tokens: causal, and linear in their number.

    **Arguments:**

    - `in_size`: the number of different tokens, which are the integers below it.
        Negative ones, at the end of a sequence, are padding; or a mask says what is:
        the input is then `(tokens, mask)`.
    - `out_size`: the number of outputs; of a language model, `in_size`.
    - `width`: the size of a token's representation; the blocks work at twice that.
    - `depth`: the number of blocks.
    - `state_size`: the number of states of each channel.
    - `kernel_size`: of the convolution over time.
    - `pool`: whether there is one output, from the mean over the positions that are not
        padding, and not one at each position.
    - `last_scale`: multiplies the initial weights of the last layer.
    - `key`: for the initial weights. A = -1, -2, ..., D = 1 and time steps of 1e-3 to
        1e-1 as in the paper; the others are those of Equinox's layers.

    ??? cite "Reference"

        A. Gu, T. Dao, *Mamba: linear-time sequence modeling with selective state
        spaces*, arXiv 2312.00752.
    """

    embedding: eqx.nn.Embedding
    blocks: list[_Block]
    norm: eqx.nn.RMSNorm
    last: eqx.nn.Linear
    pool: bool = eqx.field(static=True)

    def __init__(
        self,
        in_size: int,
        out_size: int,
        width: int = 32,
        depth: int = 2,
        state_size: int = 16,
        kernel_size: int = 4,
        *,
        pool: bool = False,
        last_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        check_sizes(in_size=in_size, out_size=out_size, width=width, depth=depth)
        check_sizes(state_size=state_size, kernel_size=kernel_size)
        embed, last, *keys = split_key(key, 2 + depth)
        self.embedding = eqx.nn.Embedding(in_size, width, key=embed)
        self.blocks = [_Block(width, state_size, kernel_size, key=k) for k in keys]
        self.norm = eqx.nn.RMSNorm(width, use_bias=False)
        self.last = last_layer(width, out_size, last_scale, key=last)
        self.pool = pool

    def __call__(self, tokens: Tokens) -> Float[Array, "T out"] | Float[Array, " out"]:
        """The outputs for one sequence, `[T, out_size]`, or `[out_size]` with `pool`.
        Those at a position depend on the tokens up to it."""
        tokens, present = split_padding(tokens)
        x = jax.vmap(self.embedding)(tokens)
        for block in self.blocks:
            x = block(x)
        return read_out(self.last, jax.vmap(self.norm)(x), present, self.pool)
