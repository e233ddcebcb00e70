"""Errors of predictions against other predictions: what semi-supervised methods learn from images without labels.

All work on logits or probabilities (B, K, *rest): `rest` is the grid of a segmentation, empty in classification. A
place that does not count (`where` is False) changes neither value nor gradient, whatever it holds; it never becomes
background. Each is a mean over the places that count; with ranks that count different numbers, `count` is their mean
(`mean_across_ranks(where.sum())`), so that the average of the ranks' losses is the loss of all places.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.precision import at_least_float32


def mean_where(values: Tensor, where: Tensor | None, count: Tensor | None = None) -> Tensor:
    """Return the mean of the values that count; 0 where none does.

    Args:
        values: One value a place. Shape: (B, *rest).
        where: Places that count; None counts all. Shape: (B, 1, *rest), bool.
        count: Number to divide by instead of the number counted here.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if where is None:
        return values.mean() if count is None else values.sum() / _divisor(count, values)
    _fits(where, (values.shape[0], 1, *values.shape[1:]))
    total = torch.where(where[:, 0], values, 0.0).sum()
    return total / (where.sum().clamp(min=1) if count is None else _divisor(count, values))


def squared_difference(
    probabilities: Tensor, target: Tensor, where: Tensor | None = None, *, count: Tensor | None = None
) -> Tensor:
    """Return the mean over places and classes of (p - q)^2, a Brier score against soft targets.

    Args:
        probabilities: Shape: (B, K, *rest).
        target: Probabilities to come near to; usually detached. Shape: (B, K, *rest).
        where: Places that count. Shape: (B, 1, *rest), bool.
        count: See the module.

    Raises:
        ValueError: If the shapes do not fit.
    """
    probabilities, target = _same(probabilities, target, where)
    return mean_where((probabilities - target).square().mean(dim=1), where, count)


def soft_cross_entropy(
    logits: Tensor, target: Tensor, where: Tensor | None = None, *, count: Tensor | None = None
) -> Tensor:
    """Return the mean over places of -sum_k q_k log p_k.

    Args:
        logits: Shape: (B, K, *rest).
        target: Probabilities. Shape: (B, K, *rest).
        where: Places that count. Shape: (B, 1, *rest), bool.
        count: See the module.

    Raises:
        ValueError: If the shapes do not fit.
    """
    logits, target = _same(logits, target, where)
    return mean_where(-(target * logits.log_softmax(dim=1)).sum(dim=1), where, count)


def divergence(logits: Tensor, target: Tensor, where: Tensor | None = None, *, count: Tensor | None = None) -> Tensor:
    """Return the mean over places of KL(q || p), the cross-entropy less the target's own entropy.

    Arguments as in `soft_cross_entropy`.
    """
    logits, target = _same(logits, target, where)
    logs = _times_log(target) - target * logits.log_softmax(dim=1)
    return mean_where(logs.sum(dim=1), where, count)


def entropy(logits: Tensor, where: Tensor | None = None, *, count: Tensor | None = None) -> Tensor:
    """Return the mean entropy of the predictions as a part of log K, in [0, 1] (Grandvalet and Bengio, NIPS 2004).

    Args:
        logits: Shape: (B, K, *rest).
        where: Places that count. Shape: (B, 1, *rest), bool.
        count: See the module.

    Raises:
        ValueError: If the shapes do not fit.
    """
    logits = _counted(_checked(logits), where)
    return mean_where(entropies(logits), where, count) / math.log(logits.shape[1])


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of each place in nats. Shape: (B, *rest)."""
    logs = _checked(logits).log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)


def entropy_of(probabilities: Tensor) -> Tensor:
    """Return the entropy of each place in nats, of probabilities. Shape: (B, *rest)."""
    return -_times_log(_checked(probabilities)).sum(dim=1)


def confident_cross_entropy(
    logits: Tensor, target: Tensor, threshold: float, where: Tensor | None = None, *, count: Tensor | None = None
) -> Tensor:
    """Return the cross-entropy against the likeliest class where the target is sure of it.

    As in FixMatch (Sohn et al., NeurIPS 2020): places below the threshold add nothing, and the mean is over all that
    count, so that few sure places mean a small loss. No place becomes background.

    Args:
        logits: Shape: (B, K, *rest).
        target: Probabilities, detached here. Shape: (B, K, *rest).
        threshold: Least probability of the likeliest class, in [0, 1].
        where: Places that count. Shape: (B, 1, *rest), bool.
        count: See the module.

    Raises:
        ValueError: If the shapes do not fit, or the threshold is no probability.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"The threshold is a probability in [0, 1], got {threshold}")
    logits, target = _same(logits, target.detach(), where)
    best, hard = target.max(dim=1)
    error = F.cross_entropy(logits, hard, reduction="none")
    return mean_where(torch.where(best >= threshold, error, 0.0), where, count)


def sharpened(probabilities: Tensor, temperature: float) -> Tensor:
    """Return probabilities raised to 1 / temperature, of sum 1 again (Berthelot et al., NeurIPS 2019).

    Args:
        probabilities: Shape: (B, K, *rest).
        temperature: Above 0; 1 changes nothing, near 0 leaves the likeliest class.

    Raises:
        ValueError: If the temperature is not above 0.
    """
    if temperature <= 0:
        raise ValueError(f"The temperature of sharpening must be above 0, got {temperature}")
    # In logarithms: a tenth root of small float32 numbers would vanish.
    smallest = torch.finfo(torch.float32).tiny
    return (_checked(probabilities).clamp(min=smallest).log() / temperature).softmax(dim=1)


def _checked(values: Tensor) -> Tensor:
    if values.ndim < 2 or values.shape[1] < 2:
        raise ValueError(f"Predictions need shape (B, K, *rest) with 2 classes or more, got {tuple(values.shape)}")
    return at_least_float32(values)


def _same(values: Tensor, target: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both in float32 or wider, with equal shapes; zeros where a place does not count."""
    values, target = _checked(values), _checked(target)
    if values.shape != target.shape:
        raise ValueError(f"The target needs the shape {tuple(values.shape)}, got {tuple(target.shape)}")
    return _counted(values, where), _counted(target.to(values.dtype), where)


def _counted(values: Tensor, where: Tensor | None) -> Tensor:
    """Return values with zeros where a place does not count: it may hold NaN, also in the gradient."""
    if where is None:
        return values
    _fits(where, (values.shape[0], 1, *values.shape[2:]))
    return torch.where(where, values, 0.0)


def _divisor(count: Tensor, values: Tensor) -> Tensor:
    # A mean over ranks may lie below 1; where it is 0 there is nothing to divide.
    return count.to(values.dtype).clamp(min=1e-6)


def _fits(where: Tensor, expected: tuple[int, ...]) -> None:
    if where.dtype != torch.bool or tuple(where.shape) != expected:
        raise ValueError(f"'where' needs shape {expected} and bool, got {tuple(where.shape)} and {where.dtype}")


def _times_log(probabilities: Tensor) -> Tensor:
    """Return p log p, 0 at 0 with a gradient that is finite there."""
    return probabilities * probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
