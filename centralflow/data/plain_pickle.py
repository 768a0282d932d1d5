"""Pickles of plain data, read without executing anything that they name."""

import io
import pickle
from typing import Any

import numpy as np


class _Call:
    """What a pickle calls, with its arguments and the state it then sets: recorded.

    NumPy's own functions would execute no code of the pickle's either, but they trust
    the state: it can make them read memory that is not theirs.
    """

    def __init__(self, *arguments):
        self.arguments = arguments
        self.state = None

    def __setstate__(self, state):
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in the protocols of Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Call,
    ("numpy._core.multiarray", "_reconstruct"): _Call,
    ("numpy", "ndarray"): _Call,
    ("numpy", "dtype"): _Call,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(
                f"it refers to `{module}.{name}`, which data has no need of and which "
                "was not executed"
            )
        return _KNOWN[module, name]


def load_plain(where: str, content: bytes) -> Any:
    """The object in a pickle of numbers, text, bytes, lists, dictionaries and arrays.

    Text of Python 2 becomes bytes; [`uint8_array`][] makes an array of what stands for
    one.

    **Raises:**

    `ValueError`, which begins with `where`, if it is damaged or names anything else.
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise almost any
        raise ValueError(f"{where} is no pickle of plain data: {error}.") from error


def uint8_array(recorded: Any) -> np.ndarray | None:
    """The array of type uint8 that was pickled, or `None` if it was something else."""
    match recorded:
        case _Call(state=(_, shape, _Call(arguments=("u1" | b"u1", *_)), 0, data)):
            try:
                return np.frombuffer(data, np.uint8).reshape(shape)
            except (TypeError, ValueError):  # no bytes, or of another number
                return None
    return None
