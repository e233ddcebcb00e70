"""From a classifier's outputs to probabilities, and one number that makes them honest (Guo et al., ICML 2017)."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from medssl.data.targets import KINDS, Kind
from medssl.training.ranking import Floats

logger = logging.getLogger(__name__)

COLDEST, HOTTEST = 0.05, 20.0


def probabilities_of(logits: Floats, kind: Kind, temperature: float = 1.0) -> Floats:
    """Return the probabilities that a classifier's outputs stand for.

    Args:
        logits: Outputs. `multiclass`: one per class. `multilabel`: log-odds of each label. `ordinal`: K - 1 falling
            log-odds, the k-th of "above class k"; where they rise, the smallest so far counts. Shape: (N, K or K - 1).
        kind: `multiclass`, `multilabel` or `ordinal`.
        temperature: Divides the outputs.

    Returns:
        Shape: (N, K), float64; rows sum to 1 but for `multilabel`.

    Raises:
        ValueError: If the kind is unknown, the shape does not fit, or an output is not finite.
    """
    z = np.asarray(logits, dtype=np.float64)
    if kind not in KINDS:
        raise ValueError(f"There is no kind of target '{kind}': use {', '.join(KINDS)}")
    if z.ndim != 2 or z.shape[1] < 1:
        raise ValueError(f"Outputs of a classifier need shape (N, K), got {z.shape}")
    if not np.isfinite(z).all():
        raise ValueError(f"The outputs of row {int(np.flatnonzero(~np.isfinite(z).all(axis=1))[0])} are not finite")
    if not temperature > 0:
        raise ValueError(f"A temperature is above 0, got {temperature}")
    z = z / temperature
    if kind == "multiclass":
        raised = np.exp(z - z.max(axis=1, keepdims=True))
        return raised / raised.sum(axis=1, keepdims=True)
    if kind == "multilabel":
        return _sigmoid(z)
    above = _sigmoid(np.minimum.accumulate(z, axis=1))
    edges = np.concatenate([np.ones((len(z), 1)), above, np.zeros((len(z), 1))], axis=1)
    return edges[:, :-1] - edges[:, 1:]


def fit_temperature(logits: Floats, targets: NDArray[np.integer], kind: Kind) -> float:
    """Return the temperature with the least negative log-likelihood on cases that were not trained on.

    It changes no decision and no ranking within a class. Where the likelihood grows without end towards sharper
    probabilities, as on cases that are all answered right, the cases do not tell it, and 1 is returned.

    Args:
        logits: Outputs, see `probabilities_of`.
        targets: Class of each case, shape (N,); for `multilabel` 0 or 1, shape (N, K).
        kind: `multiclass`, `multilabel` or `ordinal`.

    Returns:
        Between 0.05 and 20; above 1 where the classifier is too sure of itself.

    Raises:
        ValueError: If there is no case, or shapes do not fit.
    """
    from scipy.optimize import minimize_scalar

    z, t = np.asarray(logits, dtype=np.float64), np.asarray(targets)
    expected = z.shape if kind == "multilabel" else z.shape[:1]
    if len(z) == 0 or t.shape != expected:
        raise ValueError(f"Outputs of shape {z.shape} need targets of shape {expected} and a case, got {t.shape}")

    def loss(log_temperature: float) -> float:
        return _negative_log_likelihood(z, t, kind, float(np.exp(log_temperature)))

    found = minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded", options={"xatol": 1e-6})
    temperature = float(np.exp(found.x))
    if temperature < COLDEST * 1.01 or loss(float(np.log(COLDEST))) <= found.fun + 1e-12:
        logger.warning("All %d cases are answered right: they tell no temperature, 1 is kept.", len(z))
        return 1.0
    return temperature


def _negative_log_likelihood(logits: Floats, targets: NDArray[np.integer], kind: Kind, temperature: float) -> float:
    z = logits / temperature
    if kind == "multiclass":
        highest = z.max(axis=1)
        total = highest + np.log(np.exp(z - highest[:, None]).sum(axis=1))
        return float((total - z[np.arange(len(z)), targets]).mean())
    if kind == "multilabel":
        return float((np.logaddexp(0, z) - targets * z).mean())
    p = probabilities_of(logits, kind, temperature)[np.arange(len(z)), targets]
    return float(-np.log(np.maximum(p, np.finfo(np.float64).tiny)).mean())


def _sigmoid(z: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -z))
