"""A linear head in closed form: cheap and without a random choice, so that a run can look at itself while it trains."""

from __future__ import annotations

import numpy as np

from medssl.data.targets import Kind
from medssl.errors import DataError
from medssl.training.heads import TEMPERATURE, Cases, Chosen, Head, Standardiser, softmax
from medssl.training.ranking import Floats

#: Penalties that are tried, in units of the mean squared singular value of the standardised features.
PENALTIES = tuple(10.0**power for power in range(-4, 4))


def ridge_probe(train: Cases, kind: Kind, classes: int) -> Chosen:
    """Fit a ridge regression to the classes; its penalty has the least squared error on each case left out in turn.

    All penalties and all left-out errors come from one singular value decomposition (Allen's PRESS, Technometrics
    1974: the residual of a case divided by one minus its leverage), where the logistic regression of
    `medssl.training.heads.linear_probe` needs forty fits.

    Args:
        train: What it learns from; every case counts as a patient of its own.
        kind: Several labels get one regression each; ordinal classes are treated as plain ones.
        classes: K.

    Returns:
        A head with probabilities of shape (N, K): the softmax, or of several labels the sigmoid, of the answers over
        0.1, which orders cases as the answers do and is not calibrated. The setting is the penalty.

    Raises:
        DataError: If the training cases are of one class, or a feature is not a number.
    """
    if kind != "multilabel" and len(np.unique(train.targets)) < 2:
        raise DataError(f"All {len(train.targets)} training cases of the probe are of one class: it needs two.")
    standardise = Standardiser(train.features)
    rows = standardise(train.features)
    truth = np.asarray(train.targets, np.float64) if kind == "multilabel" else np.eye(classes)[train.targets]
    left, sizes, right = np.linalg.svd(rows, full_matrices=False)
    mean = truth.mean(axis=0)
    projected = left.T @ (truth - mean)
    unit = max(float(np.square(sizes).mean()), 1e-30)
    scores: dict[float, float] = {}
    for penalty in PENALTIES:
        kept = np.square(sizes) / (np.square(sizes) + penalty * unit)
        residual = truth - mean - left @ (kept[:, None] * projected)
        # The mean takes its part of the leverage too.
        leverage = np.square(left) @ kept + 1 / len(rows)
        scores[penalty] = float(np.square(residual / np.maximum(1 - leverage, 1e-6)[:, None]).mean())
    best = min(scores, key=lambda penalty: scores[penalty])
    weights = right.T @ ((sizes / (np.square(sizes) + best * unit))[:, None] * projected)
    return Chosen(_head(standardise, weights, mean, kind), best, scores)


def _head(standardise: Standardiser, weights: Floats, mean: Floats, kind: Kind) -> Head:
    def head(features: Floats) -> Floats:
        answers = standardise(features) @ weights + mean
        if kind == "multilabel":
            # The sigmoid by its tangent, which does not overflow.
            raised: Floats = 0.5 + 0.5 * np.tanh((answers - 0.5) / TEMPERATURE / 2)
            return raised
        return softmax(answers / TEMPERATURE)

    return head
