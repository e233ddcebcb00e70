"""Error of a reconstruction on chosen voxels: the loss of masked autoencoders (He et al., CVPR 2022, eq. in sec. 3)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.precision import at_least_float32

Kind = Literal["l2", "l1", "huber"]


def masked_reconstruction(
    prediction: Tensor, target: Tensor, where: Tensor, *, kind: Kind = "l2", count: Tensor | None = None
) -> Tensor:
    """Return the mean error over the chosen voxels of a batch.

    Args:
        prediction: Restored image. Shape: (B, C, *spatial).
        target: Image to restore. Shape: (B, C, *spatial).
        where: True on voxels that count. Shape: (B, 1, *spatial), bool; one channel holds for all.
        kind: `l2` squares the error, `l1` takes its size, `huber` squares it below 1 and is linear above.
        count: Number of voxels to divide by instead of the number chosen here. With ranks that choose different
            numbers, their mean: the average of the ranks' losses is then the error over all their voxels. Scalar.

    Returns:
        A scalar, float32 or wider; 0 where no voxel is chosen, and the gradient is 0 then too.

    Raises:
        ValueError: If the shapes do not fit, `where` is not boolean, or there is no such kind.
    """
    _check(prediction, target, where)
    # Voxels that do not count may hold anything, also NaN: they are replaced and not multiplied by zero.
    prediction = torch.where(where, at_least_float32(prediction), 0.0)
    target = torch.where(where, at_least_float32(target), 0.0)
    total = _error(prediction, target, kind).sum()
    chosen = where.sum() if count is None else count
    return total / (chosen * prediction.shape[1]).clamp(min=1)


def masked_mean(image: Tensor, where: Tensor) -> Tensor:
    """Return the mean of each sample and channel over the chosen voxels; 0 where none is.

    Args:
        image: Shape: (B, C, *spatial).
        where: Shape: (B, 1, *spatial), bool.

    Returns:
        Shape: (B, C, 1, ...), float32 or wider, ready to be broadcast over the image.
    """
    axes = tuple(range(2, image.ndim))
    total = torch.where(where, at_least_float32(image), 0.0).sum(dim=axes, keepdim=True)
    return total / where.sum(dim=axes, keepdim=True).clamp(min=1)


def _error(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    if kind == "l2":
        return (prediction - target).square()
    if kind == "l1":
        return (prediction - target).abs()
    if kind == "huber":
        return F.huber_loss(prediction, target, reduction="none")
    raise ValueError(f"There is no reconstruction error '{kind}': use l2, l1 or huber")


def _check(prediction: Tensor, target: Tensor, where: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"A reconstruction needs the target's shape, got {tuple(prediction.shape)} for {tuple(target.shape)}"
        )
    if where.dtype != torch.bool or where.shape != (target.shape[0], 1, *target.shape[2:]):
        expected = (target.shape[0], 1, *target.shape[2:])
        raise ValueError(f"'where' needs shape {expected} and bool, got {tuple(where.shape)} and {where.dtype}")
