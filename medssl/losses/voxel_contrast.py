"""Contrast of points by their distance in mm: vox2vec and SAM in one loss.

Goncharov et al., vox2vec, MICCAI 2023: InfoNCE over points that two crops share. Yan et al., SAM, IEEE TMI 2022: points
within some mm are one point, and near ones are no negatives. Deviations: all points of the batch are compared and none
is mined, so that nothing depends on an order; negatives come from the other view only, which halves their number and
takes a quarter of the memory; several positives of an anchor do not compete (the mean over positives stands outside the
logarithm).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.similarity import check_positive, checked_rows, leave_out, product, same_group, unit_rows

NAME = "Voxel contrast"


def voxel_contrast(
    first: Tensor,
    second: Tensor,
    *,
    positions_mm: Tensor,
    groups: Tensor,
    positive_mm: float,
    ignore_radius_mm: float,
    temperature: float,
    valid: Tensor | None = None,
    other_volumes: bool = True,
) -> Tensor:
    """Return InfoNCE over points seen in two views, each view the anchor by turns.

    Args:
        first: Embeddings of the points in the first view; normalised here. Shape: (R, D).
        second: Embeddings of the same points in the second view. Shape: (R, D).
        positions_mm: Where the points lie in their volume. Shape: (R, 3).
        groups: The volume of each point. Shape: (R,), integer.
        positive_mm: Points of one volume up to this distance are positives; each point is its own at 0.
        ignore_radius_mm: Points of one volume nearer than this that are no positives take no part.
        temperature: Cosines are divided by it.
        valid: Which points count; all by default. Shape: (R,), bool.
        other_volumes: Whether points of other volumes are negatives.

    Returns:
        Mean over valid points and both directions of the mean over positives p of
        -log(exp(s_p) / (exp(s_p) + sum over negatives of exp(s_n))); a scalar, float32 or wider. A point without
        negatives counts as 0, and so does a batch without valid points.

    Raises:
        ValueError: If shapes differ or a number makes no sense.
    """
    first, second = checked_rows(NAME, first, second)
    check_positive(NAME, temperature=temperature)
    positive, negative = pairs_by_distance(
        positions_mm, groups, positive_mm=positive_mm, ignore_radius_mm=ignore_radius_mm, valid=valid
    )
    if len(positive) != len(first):
        raise ValueError(f"{NAME} needs a position for each of {len(first)} points, got {len(positive)}")
    if not other_volumes:
        negative = negative & (groups[:, None] == groups)
    logits = product(unit_rows(first), unit_rows(second).T) / temperature
    anchors = positive.diagonal().sum().clamp(min=1)
    return (_info_nce(logits, positive, negative) + _info_nce(logits.T, positive, negative)) / (2 * anchors)


def pairs_by_distance(
    positions_mm: Tensor,
    groups: Tensor,
    *,
    positive_mm: float,
    ignore_radius_mm: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return which pairs of points are positives and which are negatives; both matrices are symmetric.

    Args:
        positions_mm: Shape: (R, 3).
        groups: The volume of each point. Shape: (R,), integer.
        positive_mm: Largest distance of positives.
        ignore_radius_mm: Least distance of negatives of the same volume.
        valid: Which points count; all by default. Shape: (R,), bool.

    Returns:
        Two matrices of shape (R, R), bool.

    Raises:
        ValueError: If shapes differ or the radii do not fit.
    """
    if not 0 <= positive_mm <= ignore_radius_mm:
        raise ValueError(
            f"{NAME} needs 0 <= positive_mm <= ignore_radius_mm, got {positive_mm} and {ignore_radius_mm} mm"
        )
    if positions_mm.ndim != 2 or positions_mm.shape[1] != 3:
        raise ValueError(f"{NAME} needs positions of shape (R, 3), got {tuple(positions_mm.shape)}")
    together = same_group(NAME, groups, len(positions_mm))
    assert together is not None
    if valid is not None and (valid.shape != groups.shape or valid.dtype != torch.bool):
        raise ValueError(f"{NAME} needs 'valid' of shape {tuple(groups.shape)} and bool, got {tuple(valid.shape)}")
    # Without the matrix product, whose rounding would make a point's distance from itself some tenths of a mm.
    distance = torch.cdist(positions_mm, positions_mm, compute_mode="donot_use_mm_for_euclid_dist")
    both = torch.ones_like(together) if valid is None else valid[:, None] & valid
    positive = together & (distance <= positive_mm) & both
    return positive, both & ~positive & ~(together & (distance < ignore_radius_mm))


def _info_nce(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """Return the sum over anchors (rows) of the mean over their positives."""
    others = torch.logsumexp(leave_out(logits, ~negative), dim=1, keepdim=True)
    # -log(exp(s) / (exp(s) + exp(others))) without leaving logarithms.
    costs = F.softplus(others - logits)
    return (torch.where(positive, costs, 0.0).sum(dim=1) / positive.sum(dim=1).clamp(min=1)).sum()
