"""Regression of a target's direction, without negatives: BYOL and SimSiam. Targets get no gradient."""

from __future__ import annotations

from torch import Tensor

from medssl.losses.similarity import checked_rows, unit_rows


def cosine_regression(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 2 - 2 cos, the squared distance of unit rows, one direction (BYOL: Grill et al., NeurIPS 2020, eq. 2).

    Args:
        prediction: The predictor's output. Shape: (N, D).
        target: What it should point at; no gradient reaches it. Shape: (N, D).

    Returns:
        The mean over rows, a scalar in [0, 4], float32 or wider.

    Raises:
        ValueError: If the shapes differ or are not (N, D).
    """
    return 2 - 2 * _mean_cosine("Cosine regression", prediction, target)


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return -cos, one direction (SimSiam: Chen and He, CVPR 2021, eq. 1).

    Arguments and errors as in `cosine_regression`. Returns the mean over rows, a scalar in [-1, 1].
    """
    return -_mean_cosine("Negative cosine", prediction, target)


def byol(prediction_a: Tensor, prediction_b: Tensor, target_a: Tensor, target_b: Tensor) -> Tensor:
    """Return the sum over both directions: a's predictions of b's targets, and b's of a's.

    Args:
        prediction_a: The student's predictions from view a. Shape: (N, D).
        prediction_b: The student's predictions from view b. Shape: (N, D).
        target_a: The teacher's projections of view a. Shape: (N, D).
        target_b: The teacher's projections of view b. Shape: (N, D).

    Returns:
        A scalar in [0, 8]; 0 where all rows are equal, so that the value alone cannot tell collapse from success.

    Raises:
        ValueError: If the shapes differ or are not (N, D).
    """
    return cosine_regression(prediction_a, target_b) + cosine_regression(prediction_b, target_a)


def simsiam(prediction_a: Tensor, prediction_b: Tensor, projection_a: Tensor, projection_b: Tensor) -> Tensor:
    """Return the mean of both directions: a's predictions of b's projections, and b's of a's.

    Arguments and errors as in `byol`, with the network's own projections as targets. Returns a scalar in [-1, 1]; -1
    where all rows are equal.
    """
    return (negative_cosine(prediction_a, projection_b) + negative_cosine(prediction_b, projection_a)) / 2


def _mean_cosine(name: str, prediction: Tensor, target: Tensor) -> Tensor:
    prediction, target = checked_rows(name, prediction, target)
    return (unit_rows(prediction) * unit_rows(target.detach())).sum(dim=1).mean()
