"""Supervised contrast: several positives for each anchor (SupCon: Khosla et al., NeurIPS 2020, eq. 2, L_out)."""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import check_positive, checked_rows, same_group
from medssl.losses.weighted_contrast import weighted_rows


def supcon(first: Tensor, second: Tensor, *, temperature: float, groups: Tensor | None = None) -> Tensor:
    """Return the supervised contrastive loss of two views; the mean over positives stands outside the logarithm.

    Args:
        first: Embeddings of the first views; normalised here. Shape: (N, D), N >= 2.
        second: Embeddings of the second views. Shape: (N, D).
        temperature: Cosines are divided by it.
        groups: Both views of all samples of one group are positives of each other: a class, or the volume where any
            crop of it is to look like any other. None gives each sample its own group, and so NT-Xent.
            Shape: (N,), integer.

    Returns:
        A scalar, float32 or wider; ln(2N - 1) where all rows are equal.

    Raises:
        ValueError: If shapes differ, there are fewer than two samples, or the temperature is not positive.
    """
    first, second = checked_rows("SupCon", first, second, least=2)
    return supcon_of_views(torch.stack([first, second], dim=1), temperature=temperature, groups=groups)


def supcon_of_views(features: Tensor, *, temperature: float, groups: Tensor | None = None) -> Tensor:
    """Return the supervised contrastive loss of any number of views of each sample.

    Args:
        features: Embeddings; normalised here. Shape: (N, V, D), N V >= 2.
        temperature: Cosines are divided by it.
        groups: As in `supcon`. Shape: (N,), integer.

    Returns:
        The mean over the N V anchors, a scalar; an anchor without positive counts as 0.

    Raises:
        ValueError: If the shape is not (N, V, D), there are fewer than two rows, or the temperature is not positive.
    """
    check_positive("SupCon", temperature=temperature)
    if features.ndim != 3 or features.shape[0] * features.shape[1] < 2:
        raise ValueError(f"SupCon needs (N, V, D) features of at least two rows, got {tuple(features.shape)}")
    features = at_least_float32(features)
    samples, views = features.shape[:2]
    alike = same_group("SupCon", groups, samples)
    if alike is None:
        alike = torch.eye(samples, dtype=torch.bool, device=features.device)
    # Rows are ordered view by view, so that the pattern of samples repeats.
    rows = features.transpose(0, 1).flatten(0, 1)
    return weighted_rows(rows, alike.to(rows.dtype).repeat(views, views), temperature)
