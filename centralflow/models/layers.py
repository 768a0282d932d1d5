"""What the models share: normalization, attention, first and last layers, checks."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray, Shaped

from ..checks import require_integer, require_key, require_positive


def standardize(
    x: Float[Array, "..."], axis: int | tuple[int, ...] = -1, eps: float = 1e-5
) -> Float[Array, "..."]:
    """(x - mean) / sqrt(variance + eps) over the given axes."""
    # `equinox.nn.LayerNorm` and `GroupNorm` take max(0, variance). Where x is constant
    # that is a tie, which halves the variance's second derivative and with it the third
    # derivative of the quotient. A mean of squares needs no maximum.
    x = x - jnp.mean(x, axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis, keepdims=True) + eps)


class LayerNorm(eqx.Module):
    """Layer normalization over the last axis, of size `width`."""

    weight: Float[Array, " width"]
    bias: Float[Array, " width"]

    def __init__(self, width: int):
        self.weight, self.bias = jnp.ones(width), jnp.zeros(width)

    def __call__(self, x: Float[Array, "... width"]) -> Float[Array, "... width"]:
        return self.weight * standardize(x) + self.bias


class GroupNorm(eqx.Module):
    """Normalization of an image over the pixels and channels of each of `groups`."""

    weight: Float[Array, " channels"]
    bias: Float[Array, " channels"]
    groups: int = eqx.field(static=True)

    def __init__(self, groups: int, channels: int):
        self.weight, self.bias = jnp.ones(channels), jnp.zeros(channels)
        self.groups = groups

    def __call__(self, x: Float[Array, "H W channels"]) -> Float[Array, "H W channels"]:
        groups = x.reshape(*x.shape[:2], self.groups, -1)
        x = standardize(groups, (0, 1, 3)).reshape(x.shape)
        return self.weight * x + self.bias


class Convolution(eqx.Module):
    """A 3x3 convolution with zeros around the image, at every `stride`-th pixel."""

    # As a product of matrices: inside loops, where training and flows are, XLA's own
    # convolutions are five to eight times slower on CPUs.
    linear: eqx.nn.Linear
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        use_bias: bool = True,
        *,
        key: PRNGKeyArray,
    ):
        self.linear = eqx.nn.Linear(
            9 * in_channels, out_channels, use_bias=use_bias, key=key
        )
        self.stride = stride

    def __call__(self, x: Float[Array, "H W in"]) -> Float[Array, "height width out"]:
        shape = x.shape
        x = jnp.pad(x, ((1, 1), (1, 1), (0, 0)))
        # The neighbours of each pixel, along its channels.
        for axis in (1, 0):
            shifted = [
                jax.lax.slice_in_dim(x, i, i + shape[axis], self.stride, axis)
                for i in range(3)
            ]
            x = jnp.concatenate(shifted, axis=-1)
        return jax.vmap(jax.vmap(self.linear))(x)


# Tokens or vectors, by themselves or with a mask of the positions that are not padding.
Tokens = Integer[Array, " T"] | tuple[Integer[Array, " T"], Shaped[Array, " T"]]
Vectors = Float[Array, "T size"] | tuple[Float[Array, "T size"], Shaped[Array, " T"]]


class AttentionBlock(eqx.Module):
    """Self-attention and a perceptron four times as wide, each on normalized inputs
    and added to them."""

    norms: list[LayerNorm]
    attention: eqx.nn.MultiheadAttention
    expand: eqx.nn.Linear
    contract: eqx.nn.Linear

    def __init__(self, width: int, heads: int, *, key: PRNGKeyArray):
        attend, expand, contract = jr.split(key, 3)
        self.norms = [LayerNorm(width), LayerNorm(width)]
        self.attention = eqx.nn.MultiheadAttention(heads, width, key=attend)
        self.expand = eqx.nn.Linear(width, 4 * width, key=expand)
        self.contract = eqx.nn.Linear(4 * width, width, key=contract)

    def __call__(
        self, x: Float[Array, "T width"], mask: Bool[Array, "T T"] | None = None
    ) -> Float[Array, "T width"]:
        y = self.norms[0](x)
        # The mask is finite: the most negative number, of which the softmax is zero.
        x = x + self.attention(y, y, y, mask)
        y = jax.vmap(self.expand)(self.norms[1](x))
        return x + jax.vmap(self.contract)(jax.nn.gelu(y, approximate=False))


def last_layer(
    in_size: int, out_size: int, scale: float, *, key: PRNGKeyArray
) -> eqx.nn.Linear:
    """A linear layer whose initial weights and biases are multiplied by `scale`."""
    require_positive("last_scale", scale, np.inf, or_zero=True)
    return jax.tree.map(lambda p: scale * p, eqx.nn.Linear(in_size, out_size, key=key))


def read_out(
    last: eqx.nn.Linear,
    states: Float[Array, "T width"],
    present: Bool[Array, " T"],
    pool: bool,
) -> Float[Array, "T out"] | Float[Array, " out"]:
    """The outputs at all positions, or with `pool` those of the mean of the states over
    the positions that are `present`."""
    if not pool:
        return jax.vmap(last)(states)
    total = jnp.sum(jnp.where(present[:, None], states, 0), axis=0)
    return last(total / jnp.maximum(jnp.sum(present), 1))


def split_padding(
    x: Tokens | Vectors, tokens: bool = True
) -> tuple[Integer[Array, " T"] | Float[Array, "T size"], Bool[Array, " T"]]:
    """A sequence, and at which of its positions there is something: where its mask says
    so, if `x` is (sequence, mask), or else where its token is not negative."""
    x, present = x if isinstance(x, tuple) else (x, None)
    if tokens and (x.ndim != 1 or not jnp.issubdtype(x.dtype, jnp.integer)):
        raise ValueError(
            "`tokens` must be one sequence of integers, of shape [T], got "
            f"{x.dtype} of shape {x.shape}: convert them with `.astype(int)`, and "
            "`jax.vmap` the model over sequences."
        )
    if present is None:
        present = x >= 0 if tokens else jnp.ones(len(x), bool)
    elif present.shape != x.shape[:1]:
        raise ValueError(
            f"`mask` must have one entry for each position, {x.shape[:1]}, got "
            f"{present.shape}."
        )
    return x, present.astype(bool)


def check_sizes(**sizes: int) -> None:
    """An error that names the first size that is not a positive integer."""
    for name, size in sizes.items():
        require_integer(name, size)


def split_key(key: PRNGKeyArray, count: int) -> Shaped[Array, "..."]:
    """So many keys from one, once it is one."""
    require_key(key)
    return jr.split(key, count)


def check_widths(widths: Sequence[int]) -> None:
    """An error unless `widths` holds positive integers, and at least one."""
    if not isinstance(widths, Sequence) or len(widths) == 0:
        raise ValueError(f"`widths` must hold one size or more, got {widths!r}.")
    check_sizes(**{f"widths[{i}]": width for i, width in enumerate(widths)})


def check_heads(heads: int, width: int) -> None:
    """An error unless `heads` divides `width`."""
    check_sizes(heads=heads, width=width)
    if width % heads:
        raise ValueError(
            f"`heads` must divide `width`, got heads={heads} and width={width}: make "
            f"`width` {width // heads * heads + heads}."
        )


def full_shape(in_shape: Sequence[int]) -> tuple[int, int, int]:
    """`in_shape` with its axis of channels."""
    if not isinstance(in_shape, Sequence) or len(in_shape) not in (2, 3):
        raise ValueError(
            "`in_shape` must be (height, width) or (height, width, channels), got "
            f"{in_shape!r}."
        )
    check_sizes(**{f"in_shape[{i}]": size for i, size in enumerate(in_shape)})
    return (*in_shape, 1)[:3]


def as_image(
    x: Float[Array, "..."], in_shape: tuple[int, int, int]
) -> Float[Array, "H W C"]:
    """`x` with its axis of channels."""
    if in_shape not in (x.shape, (*x.shape, 1)):
        raise ValueError(
            f"`x` must be one image of shape {in_shape}, got {x.shape}: reshape it, "
            "and `jax.vmap` the model over images."
        )
    return x.reshape(in_shape)
