"""The convolutional network."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .layers import (
    Convolution,
    as_image,
    check_sizes,
    check_widths,
    full_shape,
    last_layer,
    split_key,
)


class CNN(eqx.Module):
    """A convolutional network: 3x3 convolutions, each with exact gelu and averages over
    2x2 pixels, and a linear layer.

    **Arguments:**

    - `in_shape`: of the images, `(height, width)` or `(height, width, channels)`.
    - `out_size`: the number of outputs.
    - `widths`: the channels of each convolution. Each halves the height and width,
        which must be multiples of `2 ** len(widths)`.
    - `last_scale`: multiplies the initial weights of the last layer.
    - `key`: for the initial weights, those of Equinox's layers.

    ??? cite "Reference"

        Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, *Gradient-based learning applied to
        document recognition*, Proceedings of the IEEE 86 (1998).
    """

    convolutions: list[Convolution]
    last: eqx.nn.Linear
    in_shape: tuple[int, int, int] = eqx.field(static=True)

    def __init__(
        self,
        in_shape: Sequence[int],
        out_size: int,
        widths: Sequence[int] = (16, 32),
        *,
        last_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        height, width, channels = self.in_shape = full_shape(in_shape)
        check_sizes(out_size=out_size)
        check_widths(widths)
        shrink = 2 ** len(widths)
        if height % shrink or width % shrink:
            raise ValueError(
                f"`widths` halves the images {len(widths)} times, so that `in_shape` "
                f"must hold multiples of {shrink}, got {height} and {width}: take "
                "fewer `widths`, or crop or pad the images."
            )
        keys = split_key(key, len(widths) + 1)
        self.convolutions = [
            Convolution(a, b, key=k)
            for a, b, k in zip([channels, *widths], widths, keys, strict=False)
        ]
        features = widths[-1] * (height // shrink) * (width // shrink)
        self.last = last_layer(features, out_size, last_scale, key=keys[-1])

    def __call__(
        self, x: Float[Array, "H W"] | Float[Array, "H W C"]
    ) -> Float[Array, " out"]:
        """The outputs for one image."""
        x = as_image(x, self.in_shape)
        for convolution in self.convolutions:
            x = jax.nn.gelu(convolution(x), approximate=False)
            height, width, channels = x.shape
            x = x.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))
        return self.last(jnp.ravel(x))
