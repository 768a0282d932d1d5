"""The multilayer perceptron."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..checks import require_integer
from .layers import check_sizes, split_key


class MLP(eqx.Module):
    """A multilayer perceptron with exact gelu, for inputs of any shape.

    **Arguments:**

    - `in_size`, `out_size`: the number of inputs, all axes together, and of outputs.
    - `width`: of the hidden layers.
    - `depth`: the number of hidden layers.
    - `key`: for the initial weights, those of `equinox.nn.Linear`.
    """

    layers: list[eqx.nn.Linear]

    def __init__(
        self,
        in_size: int,
        out_size: int,
        width: int = 64,
        depth: int = 2,
        *,
        key: PRNGKeyArray,
    ):
        check_sizes(in_size=in_size, out_size=out_size, width=width)
        require_integer("depth", depth, least=0)
        sizes = [in_size, *[width] * depth, out_size]
        keys = split_key(key, len(sizes) - 1)
        self.layers = [
            eqx.nn.Linear(a, b, key=k)
            for a, b, k in zip(sizes[:-1], sizes[1:], keys, strict=True)
        ]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, " out"]:
        """The outputs for one example."""
        x = jnp.ravel(x)
        for layer in self.layers[:-1]:
            # The tanh approximation of gelu has other third derivatives.
            x = jax.nn.gelu(layer(x), approximate=False)
        return self.layers[-1](x)
