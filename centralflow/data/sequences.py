"""Sequence tasks for causal models, which predict each next token from those before."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..checks import require_integer, require_key

Sequences = tuple[Int[Array, "N T"], Float[Array, "N T V"], Bool[Array, "N T"]]


def sorting(size: int, length: int, vocabulary: int, *, key: PRNGKeyArray) -> Sequences:
    """Random symbols, a separator, and the same symbols in ascending order.

    **Arguments:**

    - `size`: how many sequences.
    - `length`: how many symbols are to be sorted. The same one may occur repeatedly.
    - `vocabulary`: how many different symbols there are: 0, 1, ..., `vocabulary` - 1.
        The token `vocabulary` is the separator.
    - `key`: for the symbols, which are independent and equally likely.

    **Returns:**

    The batch of a loss of `centralflow.losses`, of T = 2 `length` positions and
    V = `vocabulary` + 1 tokens:

    - the inputs `[N, T]`, the sequences without their last tokens;
    - the targets `[N, T, V]`, the next token at each position, one-hot;
    - the mask `[N, T]`, which is true where the next token belongs to the answer: from
        the separator on.

    **Raises:**

    `ValueError` if `size` or `length` is not positive, or `vocabulary` is below 2.

    ??? cite "Reference"

        A. Karpathy, *minGPT* (2020), <https://github.com/karpathy/minGPT>: its
        demonstration sorts.
    """
    return _task(size, length, vocabulary, key, lambda x: jnp.sort(x, axis=1))


def copying(size: int, length: int, vocabulary: int, *, key: PRNGKeyArray) -> Sequences:
    """Random symbols, a separator, and the same symbols again.

    **Arguments:**

    - `size`: how many sequences.
    - `length`: how many symbols are to be copied.
    - `vocabulary`: how many different symbols there are: 0, 1, ..., `vocabulary` - 1.
        The token `vocabulary` is the separator.
    - `key`: for the symbols, which are independent and equally likely.

    **Returns:**

    Inputs `[N, T]`, targets `[N, T, V]` and mask `[N, T]`, as
    [`centralflow.data.sorting`][] does.

    **Raises:**

    `ValueError` if `size` or `length` is not positive, or `vocabulary` is below 2.

    ??? cite "Reference"

        A. Graves, G. Wayne, I. Danihelka, *Neural Turing machines* (2014),
        <https://arxiv.org/abs/1410.5401>, section 4.1.
    """
    return _task(size, length, vocabulary, key, lambda x: x)


def _task(size: int, length: int, vocabulary: int, key, answer: Callable) -> Sequences:
    require_integer("size", size)
    require_integer("length", length)
    require_integer("vocabulary", vocabulary, least=2)
    require_key(key)
    symbols = jr.randint(key, (size, length), 0, vocabulary)
    separator = jnp.full((size, 1), vocabulary)
    tokens = jnp.concatenate([symbols, separator, answer(symbols)], axis=1)
    dtype = jnp.result_type(float)
    targets = jax.nn.one_hot(tokens[:, 1:], vocabulary + 1, dtype=dtype)
    mask = jnp.broadcast_to(jnp.arange(2 * length) >= length, (size, 2 * length))
    return tokens[:, :-1], targets, mask
