"""Probabilities whose temperature was fitted on cases that are reported, brought back and fitted on others alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.training.ranking import Floats
from medssl.training.temperature import fit_temperature, probabilities_of

# Probabilities below are beyond what float32 outputs tell apart.
_SMALLEST = 1e-30


def tempered_anew(
    probabilities: Floats, targets: NDArray[np.int64], kind: Any, temperature: float, rows: Sequence[int]
) -> Floats:
    """Return the probabilities with a temperature that some of the cases alone decide.

    Args:
        probabilities: Shape: (N, K).
        targets: Shape: (N,), or (N, K) of 0 and 1 for `multilabel`.
        kind: `multiclass`, `multilabel` or `ordinal`.
        temperature: What the classifier's outputs were divided by.
        rows: Cases that may decide; with none the temperature becomes 1.

    Returns:
        Shape: (N, K).
    """
    outputs = temperature * outputs_of(probabilities, kind)
    chosen = list(rows)
    anew = fit_temperature(outputs[chosen], targets[chosen], kind) if chosen else 1.0
    return probabilities_of(outputs, kind, anew)


def outputs_of(probabilities: Floats, kind: str) -> Floats:
    """Return outputs that `probabilities_of` turns into these probabilities at temperature 1.

    Args:
        probabilities: Shape: (N, K).
        kind: `multiclass`, `multilabel` or `ordinal`.

    Returns:
        Shape: (N, K); (N, K - 1) for `ordinal`.
    """
    if kind == "multiclass":
        return np.log(np.maximum(probabilities, _SMALLEST))
    if kind == "multilabel":
        above, below = probabilities, 1 - probabilities
    else:
        # Summed from either end, so that neither loses its small values.
        above = np.cumsum(probabilities[:, ::-1], axis=1)[:, ::-1][:, 1:]
        below = np.cumsum(probabilities, axis=1)[:, :-1]
    return np.log(np.maximum(above, _SMALLEST)) - np.log(np.maximum(below, _SMALLEST))
