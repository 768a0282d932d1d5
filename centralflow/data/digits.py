"""Handwritten digits."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..checks import require_integer


def digits(size: int = 1000) -> tuple[Float[Array, "N 8 8"], Float[Array, "N 10"]]:
    """The first `size` of scikit-learn's 1,797 handwritten digits.

    **Arguments:**

    - `size`: how many examples.

    **Returns:**

    The images, normalized to mean 0 and standard deviation 1 over all pixels, and the
    labels, one-hot.

    **Raises:**

    `ImportError` if scikit-learn is missing; `ValueError` if `size` is not between 1
    and 1,797.

    ??? cite "Reference"

        E. Alpaydin, C. Kaynak, *Optical recognition of handwritten digits*, UCI Machine
        Learning Repository (1998).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "`centralflow.data.digits` reads the copy of the data that comes with "
            "scikit-learn: `pip install scikit-learn`."
        ) from error
    images, labels = load_digits(return_X_y=True)
    require_integer("size", size, least=0)
    if not 1 <= size <= len(images):
        raise ValueError(f"`size` must be between 1 and {len(images)}, got {size!r}.")
    images, labels = images[:size].reshape(-1, 8, 8), labels[:size]
    images = (images - images.mean()) / images.std()
    dtype = jnp.result_type(float)
    return jnp.asarray(images, dtype), jax.nn.one_hot(
        np.asarray(labels), 10, dtype=dtype
    )
