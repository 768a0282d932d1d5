"""Sentences with labels, from files of tab-separated values."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..checks import as_path, require_integer

PADDING, UNKNOWN, FIRST_WORD = 0, 1, 2


def text_classification(
    path: str | os.PathLike,
    size: int | None = None,
    length: int = 64,
    vocabulary: int | Sequence[str] = 10_000,
    classes: int = 2,
) -> tuple[tuple[Int[Array, "N T"], Bool[Array, "N T"]], Float[Array, "N C"]]:
    """Sentences and their labels, from a file as those of SST-2.

    The file is UTF-8 text of tab-separated columns without quotes. Its first line names
    the columns, of which `sentence` and `label` are read. Sentences are lowercased and
    split at white space.

    **Arguments:**

    - `path`: the file. SST-2 comes with GLUE, from <https://gluebenchmark.com/tasks>.
    - `size`: only the first `size` lines; `None` takes all.
    - `length`: the number T of tokens: longer sentences are cut, shorter ones padded.
    - `vocabulary`: how many different tokens there are: 0 for padding, 1 for unknown
        words, and from 2 on the most frequent words of the lines that are used, in
        descending order; of equally frequent ones the first seen. Or a list of words,
        such as those of the training set from [`centralflow.data.frequent_words`][], of
        which the first has the token 2.
    - `classes`: the number C of labels, which are 0, ..., C - 1.

    **Returns:**

    `((tokens, mask), labels)`: the tokens `[N, T]`, the mask `[N, T]`, which is false
    at the padding, and the labels `[N, C]`, one-hot. The losses of `centralflow.losses`
    then call the model with the pair `(tokens, mask)` of one example.

    **Raises:**

    `FileNotFoundError` if there is no such file; `ValueError` if a line is malformed,
    with its number, or if `size`, `length`, `vocabulary` or `classes` is too small or
    `size` exceeds the number of lines.

    ??? cite "Reference"

        R. Socher et al., *Recursive deep models for semantic compositionality over a
        sentiment treebank*, EMNLP (2013).
    """
    require_integer("length", length)
    require_integer("classes", classes, least=2)
    sentences, labels = [], []
    for where, words, label in _examples(path, size):
        if label not in map(str, range(classes)):
            raise ValueError(
                f"{where} must have a label from 0 to {classes - 1}, as `classes` is "
                f"{classes}, got {label!r}."
            )
        sentences.append(words)
        labels.append(int(label))
    if isinstance(vocabulary, str | int | np.integer):
        require_integer("vocabulary", vocabulary, least=FIRST_WORD)
        vocabulary = _most_frequent(sentences, vocabulary - FIRST_WORD)
    if len(set(vocabulary)) < len(vocabulary):
        repeated = Counter(vocabulary).most_common(1)[0][0]
        raise ValueError(
            f"`vocabulary` must not repeat words, as it does {repeated!r}."
        )
    index = {word: token for token, word in enumerate(vocabulary, FIRST_WORD)}
    tokens = np.full((len(sentences), length), PADDING, np.int32)
    for row, words in zip(tokens, sentences, strict=True):
        known = [index.get(word, UNKNOWN) for word in words[:length]]
        row[: len(known)] = known
    one_hot = jax.nn.one_hot(np.array(labels), classes, dtype=jnp.result_type(float))
    return (jnp.asarray(tokens), jnp.asarray(tokens != PADDING)), one_hot


def frequent_words(
    path: str | os.PathLike, count: int = 9_998, size: int | None = None
) -> list[str]:
    """The most frequent words of a file as [`centralflow.data.text_classification`][]
    reads it: the `vocabulary` with which to read another one.

    **Arguments:**

    - `path`: the file.
    - `count`: how many words, at most.
    - `size`: only those of the first `size` lines; `None` takes all.

    **Returns:**

    The words, in descending order of their frequency.

    **Raises:**

    As [`centralflow.data.text_classification`][].
    """
    require_integer("count", count)
    return _most_frequent([words for _, words, _ in _examples(path, size)], count)


def _most_frequent(sentences: list[list[str]], count: int) -> list[str]:
    counts = Counter(word for words in sentences for word in words)
    return [word for word, _ in counts.most_common(count)]


def _examples(path, size: int | None) -> list[tuple[str, list[str], str]]:
    """Where each of the first `size` examples stands, its words and its label."""
    if size is not None:
        require_integer("size", size)
    if not as_path(path).is_file():
        raise FileNotFoundError(
            f"There is no file `{path}`. SST-2 is at https://gluebenchmark.com/tasks: "
            "unpack it and give the path of its `train.tsv`."
        )
    with open(path, "rb") as file:
        examples = list(islice(_rows(path, file), size))
    if len(examples) < (size or 1):
        raise ValueError(
            f"`{path}` has {len(examples)} sentences, too few for `size` {size!r}: "
            "give a smaller one, or a file with more."
        )
    return examples


def _rows(path, file) -> Iterator[tuple[str, list[str], str]]:
    header = None
    for number, line in enumerate(file, start=1):
        where = f"Line {number} of `{path}`"
        try:
            # Not "utf-8": an editor's byte order mark is no part of a name.
            fields = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text: {error}.") from error
        if header is None:
            header = fields
            if not {"sentence", "label"} <= set(header):
                raise ValueError(
                    f"{where} must name the columns, separated by tabs, `sentence` "
                    f"and `label` among them, got {header!r}."
                )
            continue
        if len(fields) != len(header):
            raise ValueError(
                f"{where} must have {len(header)} columns, separated by tabs, as the "
                f"first line has, got {len(fields)}."
            )
        row = dict(zip(header, fields, strict=True))
        words = row["sentence"].lower().split()
        if not words:
            raise ValueError(f"{where} has an empty sentence: remove the line.")
        yield where, words, row["label"].strip()
