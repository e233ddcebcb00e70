"""Contrast whose positives have weights: how near two samples lie in the body says how alike they should be.

Chaitanya et al. (NeurIPS 2020) call slices of one of four partitions of the volume positives (GD). Here the position
is continuous: a pair at distance d is a positive of weight exp(-d^2 / (2 sigma^2)), so that no positive is lost at
the edge of a partition. Deliberate deviation: as in SupCon (Khosla et al., NeurIPS 2020, L_out) the denominator holds
all other rows, where theirs holds one positive and the negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.losses.similarity import check_positive, checked_rows, leave_out, product, unit_rows


def weighted_contrast(
    first: Tensor, second: Tensor, weights: Tensor, *, temperature: float, known: Tensor | None = None
) -> Tensor:
    """Return SupCon with a weight for each pair of samples; it is SupCon where the weights are 0 and 1.

    Args:
        first: Embeddings of the first views; normalised here. Shape: (N, D), N >= 2.
        second: Embeddings of the second views. Shape: (N, D).
        weights: How far each pair of samples is positive, in [0, 1]; 0 is a negative. The diagonal weighs the other
            view of a sample, 1 as a rule. Shape: (N, N).
        temperature: Cosines are divided by it.
        known: False for samples of which it is not known whom they resemble: their pairs with other samples are
            neither positive nor negative. Shape: (N,), bool.

    Returns:
        The mean over the 2N anchors of the weighted mean over their positives, a scalar, float32 or wider;
        ln(2N - 1) where all rows are equal. An anchor whose weights are all 0 counts as 0.

    Raises:
        ValueError: If shapes do not fit, there are fewer than two samples, or the temperature is not positive.
    """
    check_positive("Weighted contrast", temperature=temperature)
    first, second = checked_rows("Weighted contrast", first, second, least=2)
    count = len(first)
    if weights.shape != (count, count):
        raise ValueError(f"Weighted contrast of {count} samples needs (N, N) weights, got {tuple(weights.shape)}")
    out = None
    if known is not None:
        if known.shape != (count,) or known.dtype != torch.bool:
            raise ValueError(f"'known' needs shape ({count},) and bool, got {tuple(known.shape)} and {known.dtype}")
        own = torch.eye(count, dtype=torch.bool, device=first.device)
        out = (~(known[:, None] & known[None, :]) & ~own).repeat(2, 2)
    return weighted_rows(torch.cat([first, second]), weights.to(first.dtype).repeat(2, 2), temperature, out)


def weighted_rows(rows: Tensor, weights: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """Return the weighted mean, over the positives of each row, of minus the logarithm of their share.

    Args:
        rows: Embeddings; normalised here. Shape: (M, D), float32 or wider.
        weights: Weight of each pair as a positive; the diagonal is not read. Shape: (M, M).
        temperature: Cosines are divided by it.
        out: True for pairs that are neither positive nor in the denominator. Shape: (M, M), bool.

    Returns:
        The mean over rows, a scalar.
    """
    rows = unit_rows(rows)
    never = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    if out is not None:
        never = never | out
    logits = product(rows, rows.T) / temperature
    surprise = torch.logsumexp(leave_out(logits, never), dim=1, keepdim=True) - logits
    # Replaced and not multiplied by zero: nothing of a pair that is left out may reach the sum.
    weights = weights.masked_fill(never, 0.0)
    total = torch.where(never, 0.0, surprise * weights).sum(dim=1)
    mass = weights.sum(dim=1)
    return (total / torch.where(mass > 0, mass, 1.0)).mean()


def position_weights(positions: Tensor, *, sigma: float, known: Tensor | None = None) -> Tensor:
    """Return how far two samples resemble each other by the distance between their positions.

    Args:
        positions: Where each sample lies: a fraction of the body, or mm. Shape: (N,), or (N, P) for P coordinates.
        sigma: Distance, in the unit of the positions, at which the weight has fallen to exp(-1/2).
        known: False where the position is not known; it may then hold anything. Shape: (N,), bool.

    Returns:
        exp(-d^2 / (2 sigma^2)); off the diagonal 0 where a position is not known. Shape: (N, N), float32 or wider.

    Raises:
        ValueError: If shapes do not fit or sigma is not positive.
    """
    check_positive("Position weights", sigma=sigma)
    if positions.ndim not in (1, 2):
        raise ValueError(f"Position weights need positions of shape (N,) or (N, P), got {tuple(positions.shape)}")
    count = len(positions)
    points = positions.reshape(count, -1)
    points = points if points.dtype == torch.float64 else points.float()
    own = torch.eye(count, dtype=torch.bool, device=points.device)
    if known is None:
        known = torch.ones(count, dtype=torch.bool, device=points.device)
    elif known.shape != (count,) or known.dtype != torch.bool:
        raise ValueError(f"'known' needs shape ({count},) and bool, got {tuple(known.shape)} and {known.dtype}")
    distance = (points[:, None] - points[None, :]).square().sum(dim=2)
    weights = torch.where(known[:, None] & known[None, :], torch.exp(-distance / (2 * sigma**2)), 0.0)
    return weights.masked_fill(own, 1.0)
