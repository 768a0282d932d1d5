"""CIFAR-10, from the files that its authors distribute."""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..checks import as_path, require_integer
from .cifar10_files import read_examples

# Of the 50,000 training images scaled to [0, 1]: red, green, blue.
MEAN = (0.4914, 0.4822, 0.4465)
STANDARD_DEVIATION = (0.2470, 0.2435, 0.2616)


def cifar10(
    path: str | os.PathLike,
    size: int | None = None,
    classes: int | Sequence[int] | None = None,
    split: str = "train",
) -> tuple[Float[Array, "N 32 32 3"], Float[Array, "N C"]]:
    """The first `size` of CIFAR-10's 50,000 training or 10,000 test images.

    The first, in the order of the files, are what publications on full-batch training
    use; as that order is random, the classes are about equally frequent.

    **Arguments:**

    - `path`: a folder with the files of the binary version (`data_batch_1.bin`, ...) or
        the Python version (`data_batch_1`, ...), or with the folder that they are
        unpacked to (`cifar-10-batches-bin` or `cifar-10-batches-py`); or the `.tar.gz`
        archive of either, which is read without unpacking it to disk. All come from
        <https://www.cs.toronto.edu/~kriz/cifar.html>. No code in the files is executed.
    - `size`: how many examples, of those of `classes`; `None` takes all.
    - `classes`: the labels to keep, from 0 to 9, or a number: the first so many. `None`
        keeps all 10.
    - `split`: `"train"` or `"test"`.

    **Returns:**

    The images `[N, 32, 32, 3]`, channels last, and the labels `[N, C]`, one-hot in the
    order of `classes`. Each channel is normalized by its mean and standard deviation
    over all training images, (0.4914, 0.4822, 0.4465) and (0.2470, 0.2435, 0.2616):
    every subset and the test images alike.

    **Raises:**

    `FileNotFoundError` if a file is missing; `ValueError` if one is damaged or
    something else, if `size` exceeds the number of examples, or if `classes` or `split`
    is none of the above.

    ??? cite "Reference"

        A. Krizhevsky, *Learning multiple layers of features from tiny images*,
        technical report, University of Toronto (2009). Training on the first 5,000:
        J. Cohen et al., *Gradient descent on neural networks typically occurs at the
        edge of stability*, ICLR (2021), <https://arxiv.org/abs/2103.00065>.
    """
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test", got {split!r}.')
    if size is not None:
        require_integer("size", size)
    kept = _labels(classes)
    images, labels = read_examples(as_path(path), split)
    # The column of each label among the one-hot ones; -1 where it is left out.
    column = np.full(10, -1)
    column[kept] = np.arange(len(kept))
    columns = column[labels]
    chosen = np.flatnonzero(columns >= 0)
    if len(chosen) < (size or 1):
        raise ValueError(
            f"`{path}` has {len(chosen)} {split} images of the classes {kept}, too few "
            f"for `size` {size!r}: give a smaller one, or more classes."
        )
    chosen = chosen[:size]
    dtype = jnp.result_type(float)
    mean, deviation = (255 * np.array(x, dtype) for x in (MEAN, STANDARD_DEVIATION))
    images = images[chosen].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).astype(dtype)
    images -= mean  # in place: all images are 0.6 GB in float32
    images /= deviation
    return jnp.asarray(images), jax.nn.one_hot(columns[chosen], len(kept), dtype=dtype)


def _labels(classes: int | Sequence[int] | None) -> list[int]:
    if classes is None:
        return list(range(10))
    labels = range(classes) if _is_integer(classes) else classes
    valid = isinstance(labels, Sequence) and all(
        _is_integer(label) and 0 <= label < 10 for label in labels
    )
    if valid and 0 < len(set(labels)) == len(labels):
        return list(labels)
    raise ValueError(
        "`classes` must be None, a number from 1 to 10, or a list of different labels "
        f"from 0 to 9, got {classes!r}."
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
