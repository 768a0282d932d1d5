"""The vision transformer."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .layers import (
    AttentionBlock,
    LayerNorm,
    as_image,
    check_heads,
    check_sizes,
    full_shape,
    last_layer,
    split_key,
)


class ViT(eqx.Module):
    """A vision transformer: a linear map of patches plus learned positions, transformer
    blocks that normalize first, and a linear layer on the mean over the patches.

    **Arguments:**

    - `in_shape`: of the images, `(height, width)` or `(height, width, channels)`.
    - `out_size`: the number of outputs.
    - `patch_size`: the height and width of a patch, which must divide the image's.
    - `width`: the size of a patch's representation.
    - `depth`: the number of blocks.
    - `heads`: of the attention, which must divide `width`.
    - `last_scale`: multiplies the initial weights of the last layer. With 0, as in the
        paper, only that layer has a gradient at first: an optimizer that divides by the
        gradient then needs its `eps`.
    - `key`: for the initial weights, those of Equinox's layers, and 0.02 times normal
        ones for the positions.

    ??? cite "Reference"

        A. Dosovitskiy et al., *An image is worth 16x16 words: transformers for image
        recognition at scale*, ICLR 2021, arXiv 2010.11929.
    """

    embedding: eqx.nn.Linear
    positions: Float[Array, "patches width"]
    blocks: list[AttentionBlock]
    norm: LayerNorm
    last: eqx.nn.Linear
    in_shape: tuple[int, int, int] = eqx.field(static=True)
    patch_size: int = eqx.field(static=True)

    def __init__(
        self,
        in_shape: Sequence[int],
        out_size: int,
        patch_size: int,
        width: int = 32,
        depth: int = 2,
        heads: int = 4,
        *,
        last_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        height, across, channels = self.in_shape = full_shape(in_shape)
        check_sizes(out_size=out_size, patch_size=patch_size, depth=depth)
        check_heads(heads, width)
        if height % patch_size or across % patch_size:
            raise ValueError(
                f"`patch_size` must divide the height and width of `in_shape`, got "
                f"patch_size={patch_size} and in_shape={tuple(in_shape)}: take a "
                "common divisor, or crop or pad the images."
            )
        self.patch_size = patch_size
        patches = (height // patch_size) * (across // patch_size)
        embed, place, last, *keys = split_key(key, 3 + depth)
        self.embedding = eqx.nn.Linear(patch_size**2 * channels, width, key=embed)
        self.positions = 0.02 * jr.normal(place, (patches, width))
        self.blocks = [AttentionBlock(width, heads, key=k) for k in keys]
        self.norm = LayerNorm(width)
        self.last = last_layer(width, out_size, last_scale, key=last)

    def __call__(
        self, x: Float[Array, "H W"] | Float[Array, "H W C"]
    ) -> Float[Array, " out"]:
        """The outputs for one image."""
        height, width, channels = self.in_shape
        size = self.patch_size
        x = as_image(x, self.in_shape)
        x = x.reshape(height // size, size, width // size, size, channels)
        x = x.swapaxes(1, 2).reshape(-1, size * size * channels)
        x = jax.vmap(self.embedding)(x) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.last(jnp.mean(self.norm(x), axis=0))
