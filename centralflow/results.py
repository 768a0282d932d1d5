"""How a run ended."""

import diffrax


class RESULTS(diffrax.RESULTS):
    """Result codes of [`centralflow.train`][] and [`centralflow.predict`][]: those of
    `diffrax.RESULTS`, and these."""

    diverged = "The run diverged: the loss or the weights are no longer finite."
    block_full = (
        "More eigenvalues became critical than the flow's block of eigenvectors can "
        "hold. Increase `block_size`."
    )
    interrupted = "The run was interrupted from the keyboard."


# In a file, results have names: their numbers differ between versions of Diffrax.
_NAMES = (
    "successful",
    "diverged",
    "block_full",
    "interrupted",
    "max_steps_reached",
    "dt_min_reached",
    "nonfinite",
)


def name_of(result: RESULTS) -> str:
    """The name of a result code."""
    return next(n for n in _NAMES if bool(getattr(RESULTS, n) == result))


def result_of(name: str) -> RESULTS:
    """The inverse. Raises `ValueError` if there is none."""
    if name not in _NAMES:
        raise ValueError(f"there is no result {name!r}.")
    return getattr(RESULTS, name)
