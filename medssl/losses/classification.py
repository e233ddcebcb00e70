"""Errors of a classifier: cross-entropy, binary cross-entropy of several labels, and CORAL for ordered classes.

Class weights follow the effective number of samples (Cui et al., CVPR 2019, eq. 4). Ordered classes follow CORAL (Cao,
Mirjalili and Raschka, Pattern Recognition Letters 2020). Deliberate deviation from both: a weight multiplies the error
of its sample and the sum is divided by the number of samples, not by the sum of the weights, so that a sample counts
the same whichever others share its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.data.targets import KINDS
from medssl.losses.precision import at_least_float32


def classification_error(
    logits: Tensor, target: Tensor, kind: str, *, weights: Tensor | None = None, smoothing: float = 0.0
) -> Tensor:
    """Return the mean error of a batch.

    Args:
        logits: Outputs of the network. Shape: (B, K); (B, K - 1) for `ordinal`, the logits of "above class k".
        target: Class of each sample, int64, shape (B,); for `multilabel` 0 and 1, shape (B, K).
        kind: `multiclass`, `multilabel` or `ordinal`.
        weights: Factor of each class, or None for 1. Shape: (K,). For `multilabel` it is the factor of a positive.
        smoothing: Part of the target's mass that is spread evenly over all classes, in [0, 1); `multiclass` only.

    Returns:
        A scalar, float32 or wider. For `multilabel` the mean over samples and labels, for `ordinal` over samples and
        thresholds.

    Raises:
        ValueError: If the shapes do not fit the kind, a class is out of range, or there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no kind of target '{kind}': use {', '.join(KINDS)}")
    classes = logits.shape[1] + (kind == "ordinal") if logits.ndim == 2 else 0
    expected = tuple(logits.shape) if kind == "multilabel" else tuple(logits.shape[:1])
    if logits.ndim != 2 or tuple(target.shape) != expected:
        raise ValueError(f"A {kind} error needs targets of shape {expected}, got {tuple(target.shape)}")
    if weights is not None and tuple(weights.shape) != (classes,):
        raise ValueError(f"{classes} classes need {classes} weights, got {tuple(weights.shape)}")
    logits = at_least_float32(logits)
    if kind == "multilabel":
        factor = None if weights is None else weights.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), pos_weight=factor)
    if kind == "ordinal":
        # One question for each threshold: does the class lie above it?
        above = (target[:, None] > torch.arange(classes - 1, device=target.device)).to(logits.dtype)
        error = F.binary_cross_entropy_with_logits(logits, above, reduction="none").mean(dim=1)
    else:
        error = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    return (error if weights is None else error * weights.to(error.dtype)[target]).mean()


def effective_number_weights(counts: Sequence[int], beta: float = 0.999) -> list[float]:
    """Return a factor for each class that falls with its effective number of samples (1 - beta^n) / (1 - beta).

    Args:
        counts: Samples of each class, all positive.
        beta: 0 gives all classes one weight; towards 1 the weight becomes the inverse of the count.

    Returns:
        Factors whose mean over the samples is 1, so that the learning rate keeps its meaning (the paper lets them sum
        to the number of classes).

    Raises:
        ValueError: If a count is not positive or beta is not in [0, 1).
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"Weights need at least one sample of each class, got {list(counts)}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    weights = [(1 - beta) / (1 - beta**count) for count in counts]
    mean = sum(weight * count for weight, count in zip(weights, counts, strict=True)) / sum(counts)
    return [weight / mean for weight in weights]


def positive_weights(positives: Sequence[int], samples: int, beta: float = 0.999) -> list[float]:
    """Return the factor of a positive for each of several labels: effective number of negatives over that of positives.

    Args:
        positives: Samples that carry each label.
        samples: Samples in all.
        beta: As in `effective_number_weights`.

    Raises:
        ValueError: If a label is carried by none or by all.
    """
    factors = []
    for number, count in enumerate(positives):
        if not 0 < count < samples:
            raise ValueError(f"Label {number} has {count} positives of {samples} samples: both sides are needed")
        positive, negative = effective_number_weights([count, samples - count], beta)
        factors.append(positive / negative)
    return factors
