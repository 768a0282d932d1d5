"""Points in the plane and random data."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from ..checks import require_integer, require_key, require_positive


def moons(
    size: int, noise: float | int = 0.1, *, key: PRNGKeyArray
) -> tuple[Float[Array, "N 2"], Float[Array, "N 2"]]:
    """Two interleaved half circles, one to a class.

    **Arguments:**

    - `size`: how many examples; the classes take turns.
    - `noise`: the standard deviation of the noise on each coordinate. Without it the
        points are at random angles on the upper half of the unit circle about (0, 0)
        and on the lower half of that about (1, 1/2).
    - `key`: for the angles and the noise.

    **Returns:**

    The points `[N, 2]` and the labels `[N, 2]`, one-hot. `labels[:, 1:]` are the
    targets of [`centralflow.losses.logistic_loss`][].

    **Raises:**

    `ValueError` if `size` is not positive or `noise` is negative.

    ??? cite "Reference"

        F. Pedregosa et al., *Scikit-learn: machine learning in Python*, JMLR 12 (2011):
        `sklearn.datasets.make_moons`.
    """
    angles, labels, noise = _angles_and_noise(size, noise, key)
    turned = labels == 1
    angles = angles / 2
    x = jnp.where(turned, 1 - jnp.cos(angles), jnp.cos(angles))
    y = jnp.where(turned, 0.5 - jnp.sin(angles), jnp.sin(angles))
    return jnp.stack([x, y], axis=1) + noise, _one_hot(labels, 2)


def circles(
    size: int,
    noise: float | int = 0.05,
    ratio: float | int = 0.5,
    *,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "N 2"], Float[Array, "N 2"]]:
    """Two circles about the origin, one to a class.

    **Arguments:**

    - `size`: how many examples; the classes take turns.
    - `noise`: the standard deviation of the noise on each coordinate. Without it the
        points are at random angles on the circles.
    - `ratio`: the radius of the circle of the second class; that of the first is 1.
    - `key`: for the angles and the noise.

    **Returns:**

    The points `[N, 2]` and the labels `[N, 2]`, one-hot. `labels[:, 1:]` are the
    targets of [`centralflow.losses.logistic_loss`][].

    **Raises:**

    `ValueError` if `size` is not positive, `noise` is negative, or `ratio` is not
    between 0 and 1.

    ??? cite "Reference"

        F. Pedregosa et al., *Scikit-learn: machine learning in Python*, JMLR 12 (2011):
        `sklearn.datasets.make_circles`.
    """
    require_positive("ratio", ratio, 1, or_zero=True)
    angles, labels, noise = _angles_and_noise(size, noise, key)
    points = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=1)
    radii = jnp.where(labels == 1, ratio, 1.0)[:, None]
    return radii * points + noise, _one_hot(labels, 2)


def random_classification(
    size: int, features: int, classes: int, *, key: PRNGKeyArray
) -> tuple[Float[Array, "N features"], Float[Array, "N classes"]]:
    """Gaussian inputs with random labels: nothing to learn, all to memorize.

    **Arguments:**

    - `size`: how many examples.
    - `features`: how many inputs, independent and of mean 0 and standard deviation 1.
    - `classes`: how many labels, each as likely as the others.
    - `key`: for the inputs and the labels.

    **Returns:**

    The inputs `[N, features]` and the labels `[N, classes]`, one-hot.

    **Raises:**

    `ValueError` if `size` or `features` is not positive, or `classes` is below 2.

    ??? cite "Reference"

        C. Zhang et al., *Understanding deep learning requires rethinking
        generalization*, ICLR (2017), <https://arxiv.org/abs/1611.03530>.
    """
    require_integer("size", size)
    require_integer("features", features)
    require_integer("classes", classes, least=2)
    require_key(key)
    for_inputs, for_labels = jr.split(key)
    inputs = jr.normal(for_inputs, (size, features), jnp.result_type(float))
    return inputs, _one_hot(jr.randint(for_labels, (size,), 0, classes), classes)


def _angles_and_noise(size, noise, key):
    require_integer("size", size)
    require_positive("noise", noise, float("inf"), or_zero=True)
    require_key(key)
    for_angles, for_noise = jr.split(key)
    dtype = jnp.result_type(float)
    angles = jr.uniform(for_angles, (size,), dtype, maxval=2 * jnp.pi)
    return angles, jnp.arange(size) % 2, noise * jr.normal(for_noise, (size, 2), dtype)


def _one_hot(labels, classes):
    return jax.nn.one_hot(labels, classes, dtype=jnp.result_type(float))
