"""Parts of one sample pasted into another of its batch, at the same place: alien patches and Copy-Paste.

As in `mixing`, `draw_...` returns the parameters of a batch as plain tensors on the CPU, the other function applies
them, a sample whose partner is itself keeps every bit, and no input is modified.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from medssl.augmentation.boxes import draw_cover
from medssl.augmentation.intensity import blur_along
from medssl.augmentation.mixing import checked_partner, wide, with_partner
from medssl.augmentation.transform import Parameters, to_device
from medssl.data.draw import Draw


def draw_alien_patch(
    draw: Draw,
    size: Sequence[int],
    fraction: tuple[float, float] = (0.0, 0.3),
    side: tuple[float, float] = (0.05, 0.25),
    groups: Sequence[Hashable] | None = None,
    *,
    probability: float = 1.0,
) -> Parameters:
    """Draw `partner` and `mask` (B, *size): boxes that together cover no more than a drawn fraction of the image.

    Args:
        draw: Stream of the batch.
        size: (Z, Y, X) or (Y, X).
        fraction: Range of the part that may be replaced, drawn per sample. GMML's code replaces up to 0.3.
        side: Range of the boxes' sides as part of the image's edge.
        groups: What partners must share; see `partners`.
        probability: How often a sample is changed.
    """
    mask = draw_cover(draw.child("boxes"), size, fraction, side, at_most=True)
    return with_partner(draw, {"mask": mask}, groups, probability)


def alien_patch(image: Tensor, drawn: Parameters) -> tuple[Tensor, Tensor]:
    """Replace boxes of each image by its partner's at the same place (Atito et al., GMML, 2022).

    Args:
        image: Shape: (B, C, *spatial).
        drawn: What `draw_alien_patch` drew for images of this size.

    Returns:
        The image, and where it was replaced (B, 1, *spatial), bool.

    Raises:
        ValueError: If the draw is of another batch.
    """
    partner = checked_partner(image, drawn, None)
    if drawn["mask"].shape[1:] != image.shape[2:]:
        raise ValueError(f"The draw is for images of {tuple(drawn['mask'].shape[1:])}, got {tuple(image.shape[2:])}")
    moved = (partner != torch.arange(len(partner))).reshape(-1, *([1] * (image.ndim - 2)))
    mask = to_device((drawn["mask"] & moved)[:, None], image.device)
    return taken(image, partner, mask), mask


def draw_copy_paste(draw: Draw, groups: Sequence[Hashable] | None = None, *, probability: float = 1.0) -> Parameters:
    """Draw the donor of each sample, `partner` (B,)."""
    return with_partner(draw, {}, groups, probability)


def copy_paste(
    image: Tensor, label: Tensor, drawn: Parameters, classes: Sequence[int] | None = None, soft_edge: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Paste labelled structures of each sample's donor at their place; the label follows (Ghiasi et al., CVPR 2021).

    Args:
        image: Shape: (B, C, *spatial).
        label: Class of each voxel. Shape: (B, *spatial), int64.
        drawn: What `draw_copy_paste` drew.
        classes: Classes that are pasted; None pastes all above 0.
        soft_edge: Standard deviation in voxels of a Gaussian that blends the image across the structure's edge; 0 cuts
            it sharply. The label is always cut sharply.

    Returns:
        The image, the label, and where something was pasted (B, 1, *spatial), bool.

    Raises:
        ValueError: If image and label do not fit, no class is named, or the edge is negative.
    """
    partner = checked_partner(image, drawn, label)
    if label.shape != (len(image), *image.shape[2:]) or label.is_floating_point():
        raise ValueError(
            f"Copy-Paste needs a class for each voxel, (B, *spatial) int64, of an image {tuple(image.shape)}; got "
            f"{tuple(label.shape)} {label.dtype}"
        )
    if classes is not None and len(classes) == 0:
        raise ValueError("Copy-Paste needs at least one class to paste, or None for all above 0")
    if soft_edge < 0:
        raise ValueError(f"soft_edge is a width in voxels and not negative, got {soft_edge}")
    pasted = torch.zeros(label.shape, dtype=torch.bool, device=label.device)
    for row, other in enumerate(partner.tolist()):
        if other != row and classes is None:
            torch.gt(label[other], 0, out=pasted[row])
        for value in classes or ():
            if other != row:
                pasted[row] |= label[other] == value
    mask = pasted[:, None]
    result = taken(image, partner, mask) if soft_edge == 0 else _softly_taken(image, partner, pasted, soft_edge)
    return result, taken(label, partner, pasted), mask


def taken(values: Tensor, partner: Tensor, mask: Tensor) -> Tensor:
    """Return `values` (B, ...) with the partner's where the mask (broadcast to them) is True."""
    result = values.clone(memory_format=torch.contiguous_format)
    for row, other in enumerate(partner.tolist()):
        if other != row:
            overwrite_(result[row], mask[row], values[other])
    return result


def overwrite_(target: Tensor, mask: Tensor, values: Tensor) -> None:
    """Write values, broadcast to the target, where the mask is True."""
    if target.device.type == "cpu" and target.dtype != torch.bfloat16:
        # Writes the masked values only: torch takes five times as long (2.15), but NumPy has no bfloat16.
        np.copyto(target.numpy(), values.numpy(), where=mask.numpy())
    else:
        torch.where(mask, values, target, out=target)


def _softly_taken(image: Tensor, partner: Tensor, pasted: Tensor, soft_edge: float) -> Tensor:
    share = pasted.to(wide(image.dtype))
    for axis in range(1, share.ndim):
        share = blur_along(share, axis, torch.full((len(share),), soft_edge))
    result = torch.empty_like(image, memory_format=torch.contiguous_format)
    for row, other in enumerate(partner.tolist()):
        result[row] = torch.lerp(image[row].to(share.dtype), image[other].to(share.dtype), share[row].clamp_(0, 1))
    return result
