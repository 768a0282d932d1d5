"""Data sets that are generated, or come with another package; and sentences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import centralflow as cf

KEY = jax.random.key(0)


def test_digits():
    images, labels = cf.data.digits(300)
    assert images.shape == (300, 8, 8)
    assert labels.shape == (300, 10)
    np.testing.assert_allclose([images.mean(), images.std()], [0, 1], atol=1e-6)
    np.testing.assert_array_equal(labels.sum(axis=1), 1)
    with pytest.raises(ValueError, match="`size` must be between 1 and 1797, got 0"):
        cf.data.digits(0)


@pytest.mark.parametrize("noise", [0, 0.1])
def test_moons_and_circles(noise):
    size = 2001
    for make, centres, radii in [
        (cf.data.moons, jnp.array([[0, 0], [1, 0.5]]), jnp.array([1.0, 1.0])),
        (partial(cf.data.circles, ratio=0.3), jnp.zeros((2, 2)), jnp.array([1, 0.3])),
    ]:
        points, labels = make(size, noise, key=KEY)
        assert points.shape == labels.shape == (size, 2)
        np.testing.assert_array_equal(labels.sum(axis=0), [1001, 1000])
        label = labels.argmax(axis=1)
        offsets = points - centres[label]
        distances = jnp.linalg.norm(offsets, axis=1) - radii[label]
        if not noise:
            np.testing.assert_allclose(distances, 0, atol=1e-6)
            if make is cf.data.moons:  # the upper half and the lower half
                assert jnp.all(jnp.where(label == 0, 1, -1) * offsets[:, 1] > -1e-6)
        else:
            # The distances are those of a normal distribution to first order; the
            # standard deviation of 2,000 has a relative error of 1 / sqrt(4,000).
            np.testing.assert_allclose(distances.std(), noise, rtol=0.1)
        again, _ = make(size, noise, key=KEY)
        other, _ = make(size, noise, key=jax.random.key(1))
        np.testing.assert_array_equal(points, again)
        assert not np.array_equal(points, other)


def test_random_classification():
    inputs, labels = cf.data.random_classification(3000, 5, 4, key=KEY)
    assert inputs.shape == (3000, 5)
    assert labels.shape == (3000, 4)
    # Five standard errors of 3,000 samples.
    np.testing.assert_allclose(inputs.mean(axis=0), 0, atol=5 / 3000**0.5)
    np.testing.assert_allclose(inputs.std(axis=0), 1, atol=5 / 6000**0.5)
    np.testing.assert_allclose(labels.mean(axis=0), 1 / 4, atol=5 * 0.44 / 3000**0.5)
    np.testing.assert_array_equal(labels.sum(axis=1), 1)


@pytest.mark.parametrize(
    ("size", "length", "vocabulary"), [(1, 1, 2), (3, 6, 2), (4, 5, 40)]
)
@pytest.mark.parametrize("task", [cf.data.sorting, cf.data.copying])
def test_sequences(task, size, length, vocabulary):
    tokens, targets, mask = task(size, length, vocabulary, key=KEY)
    assert tokens.shape == mask.shape == (size, 2 * length)
    assert targets.shape == (size, 2 * length, vocabulary + 1)
    np.testing.assert_array_equal(targets.sum(axis=-1), 1)
    following = np.argmax(targets, axis=-1)
    np.testing.assert_array_equal(following[:, :-1], tokens[:, 1:])
    for row, answer_mask, next_tokens in zip(tokens, mask, following, strict=True):
        question = row[:length].tolist()
        assert set(question) <= set(range(vocabulary))
        assert row[length] == vocabulary  # the separator
        answer = sorted(question) if task is cf.data.sorting else question
        assert next_tokens[answer_mask].tolist() == answer
        assert answer_mask.tolist() == [False] * length + [True] * length


def test_a_task_is_a_batch():
    # The model that knows the answer has no loss, whatever it says elsewhere.
    _, targets, mask = cf.data.sorting(5, 3, 4, key=KEY)
    outputs = jnp.where(mask[..., None], 100 * targets, 0)
    batch = (outputs, targets, mask)
    assert cf.losses.cross_entropy(lambda x: x, batch) == 0
    assert cf.losses.accuracy(lambda x: x, batch) == 1


SENTENCES = (
    "sentence\tlabel\n"
    "a gripping movie \t1\n"
    "A  dull , dull movie\t0\r\n"
    "the “best” movie , a movie\t1"
)


def _write(tmp_path, content):
    path = tmp_path / "train.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_text_classification(tmp_path):
    path = _write(tmp_path, SENTENCES)
    (tokens, mask), labels = cf.data.text_classification(path, length=5, vocabulary=6)
    # movie (4 times), a (3), then dull and "," (2), of which dull is seen first
    assert cf.data.frequent_words(path, 4) == ["movie", "a", "dull", ","]
    expected = [[3, 1, 2, 0, 0], [3, 4, 5, 4, 2], [1, 1, 2, 5, 3]]
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(mask, np.array(expected) > 0)
    np.testing.assert_array_equal(labels, [[0, 1], [1, 0], [0, 1]])


def test_text_subset_and_given_vocabulary(tmp_path):
    path = _write(tmp_path, "\ufeffid\tlabel\tsentence\n7\t2\tx y\n8\t0\tz z\n")
    (tokens, _), labels = cf.data.text_classification(path, 1, 3, classes=3)
    np.testing.assert_array_equal(tokens, [[2, 3, 0]])  # z is not among the words used
    np.testing.assert_array_equal(labels, [[0, 0, 1]])
    words = cf.data.frequent_words(path, size=1)
    (tokens, _), _ = cf.data.text_classification(
        path, length=2, vocabulary=words, classes=3
    )
    np.testing.assert_array_equal(tokens, [[2, 3], [1, 1]])


def test_text_reaches_the_model_with_its_mask(tmp_path):
    data = cf.data.text_classification(_write(tmp_path, SENTENCES), length=8)

    def model(example):
        tokens, mask = example
        assert tokens.shape == mask.shape == (8,)
        return jnp.stack([mask.sum(), 0]).astype(float)

    # The lengths 3, 5 and 6 against the labels 1, 0 and 1.
    expected = (3**2 + 1 + (5 - 1) ** 2 + 6**2 + 1) / 6
    loss = cf.losses.squared_error(model, data)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has 0 sentences"),
        ("sentence\tlabel\n", "has 0 sentences"),
        ("sentence,label\na,1\n", "Line 1 of .* must name the columns"),
        ("sentence\tlabel\na\t1\nb\n", "Line 3 of .* 2 columns.* got 1"),
        ("sentence\tlabel\na\t1\n\nb\t1\n", "Line 3 of .* 2 columns.* got 1"),
        ("sentence\tlabel\na\tb\t1\n", "Line 2 of .* 2 columns.* got 3"),
        ("sentence\tlabel\na\tgood\n", "Line 2 of .* label from 0 to 1.* got 'good'"),
        ("sentence\tlabel\na\t2\n", "Line 2 of .* label from 0 to 1.* got '2'"),
        ("sentence\tlabel\na\t-1\n", "Line 2 of .* label from 0 to 1.* got '-1'"),
        ("sentence\tlabel\n \t1\n", "Line 2 of .* empty sentence"),
        (b"sentence\tlabel\n\xff\t1\n", "Line 2 of .* not UTF-8"),
    ],
)
def test_malformed_text(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        cf.data.text_classification(_write(tmp_path, content))


def test_missing_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.*https://gluebenchmark.com"):
        cf.data.text_classification(tmp_path / "none")


@pytest.mark.usefixtures("untyped")
def test_arguments(tmp_path):
    text = partial(cf.data.text_classification, _write(tmp_path, SENTENCES))
    moons, circles = (partial(fn, key=KEY) for fn in (cf.data.moons, cf.data.circles))
    sorting = partial(cf.data.sorting, key=KEY)
    random = partial(cf.data.random_classification, key=KEY)
    for call, message in [
        (lambda: text(size=0), "`size` must be .* got 0"),
        (lambda: text(size=4), "3 sentences, too few for `size` 4"),
        (lambda: text(length=0), "`length` must be .* got 0"),
        (lambda: text(vocabulary=1), "`vocabulary` must be .* at least 2, got 1"),
        (lambda: text(vocabulary="ab"), "`vocabulary` must be .* got 'ab'"),
        (lambda: text(vocabulary=["b", "b"]), "`vocabulary` must not repeat .* 'b'"),
        (lambda: text(classes=1), "`classes` must be .* at least 2, got 1"),
        (lambda: moons(0), "`size` must be .* got 0"),
        (lambda: moons(2.0), "`size` must be .* got 2.0"),
        (lambda: moons(2, -0.1), "`noise` must be .* got -0.1"),
        (lambda: circles(2, float("nan")), "`noise` must be .* got nan"),
        (lambda: circles(2, ratio=1), "`ratio` must be .* got 1"),
        (lambda: random(0, 1, 2), "`size` must be .* got 0"),
        (lambda: random(1, 0, 2), "`features` must be .* got 0"),
        (lambda: random(1, 1, 1), "`classes` must be .* got 1"),
        (lambda: sorting(0, 1, 2), "`size` must be .* got 0"),
        (lambda: sorting(1, 0, 2), "`length` must be .* got 0"),
        (lambda: sorting(1, 1, 1), "`vocabulary` must be .* got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
