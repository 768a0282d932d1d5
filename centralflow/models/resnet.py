"""The residual network."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .layers import (
    Convolution,
    GroupNorm,
    as_image,
    check_sizes,
    check_widths,
    full_shape,
    last_layer,
    split_key,
)


class _Block(eqx.Module):
    """x + convolution(gelu(norm(convolution(gelu(norm(x)))))), where x passes a linear
    map, pixel by pixel, if its shape changes."""

    norms: list[GroupNorm]
    convolutions: list[Convolution]
    shortcut: eqx.nn.Linear | None

    def __init__(
        self, before: int, after: int, stride: int, groups: int, *, key: PRNGKeyArray
    ):
        first, second, short = jr.split(key, 3)
        self.norms = [GroupNorm(groups, before), GroupNorm(groups, after)]
        self.convolutions = [
            Convolution(before, after, stride, use_bias=False, key=first),
            Convolution(after, after, use_bias=False, key=second),
        ]
        self.shortcut = None
        if before != after or stride != 1:
            self.shortcut = eqx.nn.Linear(before, after, use_bias=False, key=short)

    def __call__(
        self, x: Float[Array, "H W before"]
    ) -> Float[Array, "height width after"]:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(jax.nn.gelu(norm(y), approximate=False))
        if self.shortcut is not None:
            stride = self.convolutions[0].stride
            x = jax.vmap(jax.vmap(self.shortcut))(x[::stride, ::stride])
        return x + y


class ResNet(eqx.Module):
    """A residual network with group normalization before each convolution, exact gelu
    and an average over all pixels before the linear layer.

    **Arguments:**

    - `in_shape`: of the images, `(height, width)` or `(height, width, channels)`.
    - `out_size`: the number of outputs.
    - `widths`: the channels of each stage. Each stage but the first halves the height
        and width.
    - `depth`: the number of residual blocks in each stage.
    - `groups`: the number of groups of channels, which must divide all `widths`.
    - `last_scale`: multiplies the initial weights of the last layer.
    - `key`: for the initial weights, those of Equinox's layers.

    ??? cite "References"

        K. He, X. Zhang, S. Ren, J. Sun, *Identity mappings in deep residual networks*,
        ECCV 2016, arXiv 1603.05027.

        Y. Wu, K. He, *Group normalization*, ECCV 2018, arXiv 1803.08494.
    """

    first: Convolution
    blocks: list[_Block]
    norm: GroupNorm
    last: eqx.nn.Linear
    in_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        in_shape: Sequence[int],
        out_size: int,
        widths: Sequence[int] = (16, 32),
        depth: int = 1,
        groups: int = 4,
        *,
        last_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        self.in_shape = full_shape(in_shape)
        check_sizes(out_size=out_size, depth=depth, groups=groups)
        check_widths(widths)
        for i, width in enumerate(widths):
            if width % groups:
                raise ValueError(
                    f"`groups` must divide all `widths`, got groups={groups} and "
                    f"widths[{i}]={width}: make it {width // groups * groups + groups}."
                )
        first, last, *keys = split_key(key, 2 + len(widths) * depth)
        self.first = Convolution(
            self.in_shape[-1], widths[0], use_bias=False, key=first
        )
        after = [width for width in widths for _ in range(depth)]
        self.blocks = [
            _Block(a, b, 2 if i > 0 and i % depth == 0 else 1, groups, key=k)
            for i, (a, b, k) in enumerate(
                zip([widths[0], *after[:-1]], after, keys, strict=True)
            )
        ]
        self.norm = GroupNorm(groups, widths[-1])
        self.last = last_layer(widths[-1], out_size, last_scale, key=last)

    def __call__(
        self, x: Float[Array, "H W"] | Float[Array, "H W C"]
    ) -> Float[Array, " out"]:
        """The outputs for one image."""
        x = self.first(as_image(x, self.in_shape))
        for block in self.blocks:
            x = block(x)
        x = jax.nn.gelu(self.norm(x), approximate=False)
        return self.last(jnp.mean(x, axis=(0, 1)))
