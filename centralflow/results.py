"""How a run ended."""

import diffrax


class RESULTS(diffrax.RESULTS):
    """Result codes of [`centralflow.train`][] and [`centralflow.predict`][]: those of
    `diffrax.RESULTS`, and these."""

    diverged = "The run diverged: the loss or the weights are no longer finite."
    nonfinite_loss = "The loss is not a number, though it had not grown."
    nonfinite_gradient = "The gradient is not finite, where the loss is."
    nonfinite_hessian = (
        "A product of the Hessian and a vector is not finite, where the loss and its "
        "gradient are."
    )
    nonfinite_third_derivative = (
        "A third derivative of the loss is not finite, where the first and second are."
    )
    eigensolver_failed = (
        "The residuals of the top eigenvectors of the Hessian are so large that its "
        "top eigenvalues are not known."
    )
    sdcp_failed = (
        "No oscillation was found that holds the sharpness at its critical value."
    )
    block_full = (
        "More eigenvalues became critical than the flow's block of eigenvectors can "
        "hold. Increase `block_size`."
    )
    interrupted = "The run was interrupted from the keyboard."


# Those with which a run or a prediction can end. In a file they have names: their
# numbers differ between versions of Diffrax.
_NAMES = (
    "successful",
    "diverged",
    "nonfinite_loss",
    "nonfinite_gradient",
    "nonfinite_hessian",
    "nonfinite_third_derivative",
    "eigensolver_failed",
    "sdcp_failed",
    "block_full",
    "interrupted",
    "dt_min_reached",
    "max_steps_reached",
    "internal_error",
)


def name_of(result: RESULTS) -> str:
    """The name of a result code."""
    return next(n for n in _NAMES if bool(getattr(RESULTS, n) == result))


def result_of(name: str) -> RESULTS:
    """The inverse. Raises `ValueError` if there is none."""
    if name not in _NAMES:
        raise ValueError(f"there is no result {name!r}.")
    return getattr(RESULTS, name)
