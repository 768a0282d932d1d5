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


def name_of(result: RESULTS) -> str:
    """The name of a result code."""
    names = ("successful", "diverged", "block_full", "max_steps_reached")
    others = ("dt_min_reached", "nonfinite")
    return next(n for n in (*names, *others) if bool(getattr(RESULTS, n) == result))
