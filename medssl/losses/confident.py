"""Confident regional cross-entropy: what another network is sure of, and what it is sure is not (Liu et al., TraCoCo).

Sums run over the whole batch. With several ranks the sums of each sample are gathered, as for Dice:

    terms = confident_regional(gather(confident_sums(logits, target, where)))
"""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.losses.precision import at_least_float32


def confident_sums(
    logits: Tensor, target: Tensor, where: Tensor | None = None, *, sure: float = 0.65, excluded: float = 0.1
) -> Tensor:
    """Return what the loss is made of, for each sample.

    Positive places are those whose likeliest class has in the target at least the probability `sure`; the error there
    is the cross-entropy against that class, times its probability. Negative places are those whose least likely class
    has less than `excluded`; the error there is -log(1 - p) of that class, times the class's probability in the target,
    as in the published code. That code is written for two classes, where the least likely one is the other one.

    Args:
        logits: Shape: (B, K, *rest), K >= 2.
        target: Probabilities, detached here. Shape: (B, K, *rest).
        where: Places that count; None counts all. Shape: (B, 1, *rest), bool.
        sure: Least probability of a positive place's class.
        excluded: Probability below which a class is taken to be absent.

    Returns:
        Error and number of the positive places, then of the negative ones. Shape: (B, 2, 2), float32 or wider.

    Raises:
        ValueError: If the shapes or types do not fit.
    """
    logits, target = _checked(logits, target.detach(), where)
    logs = logits.log_softmax(dim=1)
    best, likely = target.max(dim=1, keepdim=True)
    least, unlikely = target.min(dim=1, keepdim=True)
    positive = -best * logs.gather(1, likely)
    negative = -least * _log_of_others(logs, unlikely)
    taken = [best >= sure, least < excluded]
    if where is not None:
        taken = [mask & where for mask in taken]
    rows = [
        torch.stack([torch.where(mask, error, 0.0), mask.to(error.dtype)], dim=1).flatten(2).sum(dim=2)
        for error, mask in zip((positive, negative), taken, strict=True)
    ]
    return torch.stack(rows, dim=1)


def confident_regional(sums: Tensor) -> dict[str, Tensor]:
    """Return the means over positive and over negative places of a whole batch.

    Args:
        sums: What `confident_sums` returned, of all samples of all ranks. Shape: (B, 2, 2).

    Returns:
        `positive` and `negative`: scalars, 0 where there is no such place.

    Raises:
        ValueError: If the sums have another shape.
    """
    if sums.ndim != 3 or sums.shape[1:] != (2, 2):
        raise ValueError(f"The confident cross-entropy needs sums of shape (B, 2, 2), got {tuple(sums.shape)}")
    error, count = at_least_float32(sums).sum(dim=0).unbind(dim=1)
    positive, negative = error / count.clamp(min=1)
    return {"positive": positive, "negative": negative}


def _log_of_others(logs: Tensor, chosen: Tensor) -> Tensor:
    """Return log(1 - p) of a class, as the logarithm of the sum of all others. Shape: (B, 1, *rest)."""
    return logs.scatter(1, chosen, -torch.inf).logsumexp(dim=1, keepdim=True)


def _checked(logits: Tensor, target: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both in float32 or wider; zeros where a place does not count."""
    if logits.ndim < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"The confident cross-entropy needs logits (B, K, *rest) of 2 classes or more, got {tuple(logits.shape)}"
        )
    if target.shape != logits.shape or not target.is_floating_point():
        raise ValueError(
            f"The target needs the shape {tuple(logits.shape)} and probabilities, got {tuple(target.shape)} and "
            f"{target.dtype}"
        )
    expected = (logits.shape[0], 1, *logits.shape[2:])
    if where is not None and (where.dtype != torch.bool or tuple(where.shape) != expected):
        raise ValueError(f"'where' needs shape {expected} and bool, got {tuple(where.shape)} and {where.dtype}")
    logits = at_least_float32(logits)
    target = at_least_float32(target).to(logits.dtype)
    if where is None:
        return logits, target
    return torch.where(where, logits, 0.0), torch.where(where, target, 0.0)
