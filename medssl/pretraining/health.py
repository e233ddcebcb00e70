"""Figures that tell a healthy run from a collapsed or idle one."""

from __future__ import annotations

import torch
from torch import Tensor

from medssl.losses.precision import at_least_float32

MOST_ROWS = 512


def feature_std(features: Tensor) -> Tensor:
    """Return the mean over channels of the standard deviation over samples, in units of the features' own size.

    Near 0 all samples have one feature. Independent of the features' scale, unlike the bare deviation.

    Args:
        features: One row per sample or position. Shape: (N, D), N >= 2.

    Returns:
        Scalar, float32; 0 for features that are all zero.
    """
    features = at_least_float32(features)
    size = features.square().mean().sqrt()
    return features.std(dim=0, correction=0).mean() / size.clamp(min=1e-12)


def effective_rank(features: Tensor) -> Tensor:
    """Return the exponential of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007).

    Between 1 (all rows on one line) and min(N, D) (all directions equally used).

    Args:
        features: Shape: (N, D); of more than 512 rows, 512 evenly spaced ones are used.

    Returns:
        Scalar, float32; 1 for rows that are all equal.
    """
    features = at_least_float32(features)
    if len(features) > MOST_ROWS:
        features = features[torch.linspace(0, len(features) - 1, MOST_ROWS, device=features.device).long()]
    centred = features - features.mean(dim=0)
    if not torch.isfinite(centred).all():
        return torch.full((), float("nan"), device=features.device)
    values = torch.linalg.svdvals(centred)
    parts = values / values.sum().clamp(min=1e-12)
    return torch.exp(-(parts * parts.clamp(min=1e-12).log()).sum())


def rows(feature_map: Tensor) -> Tensor:
    """Return one row per sample and position. Shape: (B, D, *spatial) to (B * positions, D)."""
    return feature_map.flatten(2).transpose(1, 2).flatten(0, 1)


def local_mean(image: Tensor, visible: Tensor, reach: int) -> Tensor:
    """Return, for each voxel, the mean of the visible voxels within `reach` along each axis.

    What a hidden voxel would be filled with by someone who learned nothing; where nothing is visible within reach, the
    mean of the sample's visible voxels.

    Args:
        image: Shape: (B, C, *spatial).
        visible: True where the voxel may be used. Shape: (B, 1, *spatial), bool.
        reach: Voxels to each side.
    """
    image = at_least_float32(image)
    weight = visible.to(image.dtype)
    known = torch.where(visible, image, 0.0)
    axes = tuple(range(2, image.ndim))
    overall = known.sum(axes, keepdim=True) / weight.sum(axes, keepdim=True).clamp(min=1)
    total, count = _box_sum(known, reach), _box_sum(weight, reach)
    return torch.where(count > 0.5, total / count.clamp(min=0.5), overall)


def _box_sum(image: Tensor, reach: int) -> Tensor:
    """Return the sum over a box around each voxel, cut at the border, one axis after the other."""
    total = image.double()
    for axis in range(2, image.ndim):
        size = image.shape[axis]
        # Running sums in float64: their differences keep the precision that float32 would lose.
        running = torch.cat([torch.zeros_like(total.narrow(axis, 0, 1)), total.cumsum(axis)], dim=axis)
        place = torch.arange(size, device=image.device)
        after, before = (place + reach + 1).clamp(max=size), (place - reach).clamp(min=0)
        total = running.index_select(axis, after) - running.index_select(axis, before)
    return total.to(image.dtype)
