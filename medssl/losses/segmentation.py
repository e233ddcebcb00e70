"""Errors of a dense classifier: soft Dice over the batch (Milletari et al., 3DV 2016) and cross-entropy.

As nnU-Net adds them up. A voxel that does not count, because it lies outside the volume or is to be ignored, changes
neither value nor gradient, whatever it holds. Dice is not a mean over samples: its sums run over the whole batch. With
several ranks the sums of each sample are gathered, three numbers per class, and not the images:

    dice = soft_dice(gather(dice_sums(logits, target, where)))
    cross_entropy = masked_cross_entropy(logits, target, where, count=mean_across_ranks(where.sum().float()))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.precision import at_least_float32


def dice_sums(logits: Tensor, target: Tensor, where: Tensor | None = None) -> Tensor:
    """Return what Dice is made of, for each sample: overlap, predicted and true voxels of each class.

    Args:
        logits: Outputs of the network. Shape: (B, K, *spatial).
        target: Class of each voxel, int64, (B, *spatial), from 0 to K - 1 where it counts; or its probabilities,
            floating point, (B, K, *spatial).
        where: True on voxels that count; None counts all. Shape: (B, 1, *spatial), bool.

    Returns:
        Shape: (B, 3, K), float32 or wider; the class's probability counts as part of a voxel.

    Raises:
        ValueError: If the shapes or types do not fit.
    """
    logits, target = _counted(logits, target, where)
    predicted = logits.softmax(dim=1)
    if where is not None:
        predicted = torch.where(where, predicted, 0.0)
    if target.is_floating_point():
        overlap, true = predicted * target, target
    else:
        true = target[:, None] == _classes(logits)
        if where is not None:
            true = true & where
        overlap = torch.where(true, predicted, 0.0)
    axes = tuple(range(2, logits.ndim))
    return torch.stack([part.sum(dim=axes).to(logits.dtype) for part in (overlap, predicted, true)], dim=1)


def soft_dice(sums: Tensor, *, background: bool = True, smooth: float = 1e-5) -> Tensor:
    """Return one minus the mean over classes of the soft Dice of a whole batch.

    Args:
        sums: What `dice_sums` returned, of all samples of all ranks. Shape: (B, 3, K).
        background: Whether class 0 is one of the classes.
        smooth: Added to numerator and denominator, in voxels. A class that is neither present nor predicted has a Dice
            of 1; one that is not present and predicted somewhere has about 0, and hardly a gradient.

    Returns:
        A scalar.

    Raises:
        ValueError: If the sums have another shape, or no class is left.
    """
    if sums.ndim != 3 or sums.shape[1] != 3 or sums.shape[2] < 1 + (not background):
        raise ValueError(
            f"Dice needs sums of shape (B, 3, K) with {'one class' if background else 'two classes'} or more, got "
            f"{tuple(sums.shape)}"
        )
    overlap, predicted, true = at_least_float32(sums).sum(dim=0)[:, 0 if background else 1 :]
    return 1 - ((2 * overlap + smooth) / (predicted + true + smooth)).mean()


def masked_cross_entropy(
    logits: Tensor, target: Tensor, where: Tensor | None = None, *, count: Tensor | None = None
) -> Tensor:
    """Return the mean cross-entropy of the voxels that count.

    Args:
        logits: As in `dice_sums`.
        target: As in `dice_sums`.
        where: As in `dice_sums`.
        count: Number of voxels to divide by instead of the number counted here. With ranks that count different
            numbers, their mean: the average of the ranks' losses is then the error over all their voxels. Scalar.

    Returns:
        A scalar, float32 or wider; 0 where no voxel counts, and the gradient is 0 then too.

    Raises:
        ValueError: If the shapes or types do not fit.
    """
    logits, target = _counted(logits, target, where)
    error = F.cross_entropy(logits, target, reduction="none")
    if where is None:
        return error.mean() if count is None else error.sum() / count.clamp(min=1)
    total = torch.where(where[:, 0], error, 0.0).sum()
    return total / (where.sum() if count is None else count).clamp(min=1)


def dice_cross_entropy(
    logits: Tensor, target: Tensor, where: Tensor | None = None, *, background: bool = True
) -> dict[str, Tensor]:
    """Return both terms of a whole batch, `dice` and `cross_entropy`; arguments as in `dice_sums` and `soft_dice`."""
    return {
        "dice": soft_dice(dice_sums(logits, target, where), background=background),
        "cross_entropy": masked_cross_entropy(logits, target, where),
    }


def _classes(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[1], device=logits.device).view(1, -1, *(1,) * (logits.ndim - 2))


def _counted(logits: Tensor, target: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits and target in float32 or wider, with zeros where a voxel does not count."""
    voxels = (logits.shape[0], *logits.shape[2:])
    if logits.ndim < 3 or logits.shape[1] < 2:
        raise ValueError(
            f"A dense classifier needs logits (B, K, *spatial) of 2 classes or more, got {tuple(logits.shape)}"
        )
    if target.is_floating_point() and target.shape != logits.shape:
        raise ValueError(f"Probabilities need the logits' shape {tuple(logits.shape)}, got {tuple(target.shape)}")
    if not target.is_floating_point() and (target.dtype != torch.int64 or tuple(target.shape) != voxels):
        raise ValueError(f"Classes need shape {voxels} and int64, got {tuple(target.shape)} and {target.dtype}")
    if where is not None and (where.dtype != torch.bool or where.shape != (voxels[0], 1, *voxels[1:])):
        expected = (voxels[0], 1, *voxels[1:])
        raise ValueError(f"'where' needs shape {expected} and bool, got {tuple(where.shape)} and {where.dtype}")
    logits = at_least_float32(logits)
    if target.is_floating_point():
        target = at_least_float32(target).to(logits.dtype)
    if where is None:
        return logits, target
    # Voxels that do not count may hold anything, also NaN or a class of their own: they are replaced.
    same = where if target.is_floating_point() else where[:, 0]
    return torch.where(where, logits, 0.0), torch.where(same, target, 0)
