"""Where the model's training cases lie among its own features: a mean and a covariance, and the distance from them.

Mahalanobis distance of one Gaussian (Lee et al., NeurIPS 2018), with the covariance shrunk as Ledoit and Wolf (2004),
so that it can be inverted with fewer cases than features. Only sums over all cases are kept: no names, and no case's
features.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import DataError

Floats = NDArray[np.float64]
#: Cases of which a covariance says anything.
LEAST_CASES = 3


@dataclass(frozen=True)
class Reference:
    """A Gaussian of features.

    Args:
        mean: Shape: (W,).
        scale: What each feature is divided by. Shape: (W,).
        covariance: Of the divided features, shrunk. Shape: (W, W).
        cases: How many it rests on.
    """

    mean: Floats
    scale: Floats
    covariance: Floats
    cases: int

    def distance(self, feature: Floats) -> float:
        """Return the Mahalanobis distance of one feature, divided by the root of their number. Shape: (W,)."""
        z = (np.asarray(feature, np.float64) - self.mean) / self.scale
        return math.sqrt(max(float(z @ np.linalg.solve(self.covariance, z)), 0.0) / len(z))

    def to_json(self) -> dict[str, Any]:
        """Return plain types; numbers as base64 of little-endian float32, of the covariance its lower triangle."""
        lower = self.covariance[np.tril_indices(len(self.mean))]
        return {
            "cases": self.cases,
            "width": len(self.mean),
            "encoding": "base64 of little-endian float32; covariance: lower triangle, row by row",
            "mean": _encoded(self.mean),
            "scale": _encoded(self.scale),
            "covariance": _encoded(lower),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Reference:
        """Return what `to_json` wrote."""
        width = int(content["width"])
        mean, scale, lower = (_decoded(content[name]) for name in ("mean", "scale", "covariance"))
        covariance = np.zeros((width, width))
        covariance[np.tril_indices(width)] = lower
        covariance += np.tril(covariance, -1).T
        return cls(mean, scale, covariance, int(content["cases"]))


def fit_reference(features: Floats) -> Reference:
    """Return the Gaussian of the training cases.

    Args:
        features: Shape: (N, W), N >= 3.

    Raises:
        DataError: If there are too few cases, or a feature is not a number.
    """
    from sklearn.covariance import LedoitWolf

    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < LEAST_CASES:
        raise DataError(f"An embedding distance needs {LEAST_CASES} training cases or more, got shape {x.shape}.")
    if not np.isfinite(x).all():
        raise DataError("The network's features of a training case are not finite: its weights are probably not.")
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    # A feature that hardly varies among the known ones may tell strangers: it is not divided by next to nothing.
    floor = 0.01 * float(np.median(deviation[deviation > 0])) if (deviation > 0).any() else 1.0
    scale = np.maximum(deviation, floor)
    covariance = LedoitWolf(assume_centered=True).fit((x - mean) / scale).covariance_
    ridge = 1e-6 * max(float(np.trace(covariance)) / len(mean), 1e-6)  # float32 must be able to tell it from singular
    return Reference(mean, scale, covariance + ridge * np.eye(len(mean)), len(x))


def _encoded(values: Floats) -> str:
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def _decoded(text: str) -> Floats:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float64)
