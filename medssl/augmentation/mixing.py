"""Samples mixed with others of their batch: MixUp, CutMix, Volume Fusion.

Each comes in two pure functions. `draw_...` returns the parameters of a batch as plain tensors on the CPU; the other
applies them, so that one draw can be given to images, labels and a teacher's predictions. A sample whose partner is
itself keeps every bit. No input is modified.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from scipy.special import betaincinv
from torch import Tensor

from medssl.augmentation.boxes import (
    class_map_of,
    draw_boxes_of_sides,
    place_boxes,
    sides_of,
    sizes_of,
    slices_of,
    volume_of,
)
from medssl.augmentation.transform import Parameters, to_device
from medssl.data.draw import Draw


class Mixed(NamedTuple):
    """A mixed batch.

    The loss of class labels that were not mixed is weight * loss(label) + (1 - weight) * loss(partner_label).

    Args:
        image: Shape: (B, C, *spatial).
        label: Mixed label where it is soft or dense and the mixing is per voxel, else the samples' own; or None.
        partner_label: Label of each sample's partner where `label` is the samples' own, else None.
        weight: Part of the sample's own image. Shape: (B,), float32, on the image's device.
    """

    image: Tensor
    label: Tensor | None
    partner_label: Tensor | None
    weight: Tensor


def partners(draw: Draw, groups: Sequence[Hashable] | None = None, probability: float = 1.0) -> Tensor:
    """Choose for each sample the row it is mixed with: another one of its group, each of them as likely.

    Within a group the partners are a permutation in one cycle, so that every image is used once.

    Args:
        draw: Stream of the batch.
        groups: What partners must share, for example the modality; None lets all mix.
        probability: How often a sample has a partner.

    Returns:
        Row of the partner; the own row where a sample is alone in its group or drew none. Shape: (B,), int64, on the
        CPU.

    Raises:
        ValueError: If the batch has fewer than two samples, or the groups are not one per sample.
    """
    if len(draw) < 2:
        raise ValueError(f"Mixing needs at least 2 samples, the batch has {len(draw)}: raise the batch size")
    if groups is not None and len(groups) != len(draw):
        raise ValueError(f"Mixing needs one group per sample, got {len(groups)} for {len(draw)} samples")
    if not 0 <= probability <= 1:
        raise ValueError(f"probability lies in [0, 1], got {probability}")
    rank = draw.uniform(0, 1).tolist()
    happens = draw.happens(probability).tolist()
    rows: dict[Hashable, list[int]] = {}
    for row in sorted(range(len(draw)), key=lambda row: (rank[row], row)):
        rows.setdefault(None if groups is None else groups[row], []).append(row)
    partner = list(range(len(draw)))
    for members in rows.values():
        for row, other in zip(members, members[1:] + members[:1], strict=True):
            partner[row] = other if happens[row] else row
    return torch.tensor(partner)


def beta(draw: Draw, a: float, b: float, shape: tuple[int, ...] = ()) -> Tensor:
    """Draw from the beta distribution by its inverse. Shape: (B, *shape), float32.

    Raises:
        ValueError: If a parameter is not positive.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"A beta distribution has positive parameters, got {a} and {b}")
    return torch.from_numpy(betaincinv(a, b, draw.uniform(0, 1, shape).double().numpy())).float().clamp_(0, 1)


def draw_mixup(
    draw: Draw,
    alpha: float = 0.4,
    groups: Sequence[Hashable] | None = None,
    *,
    probability: float = 1.0,
    own_majority: bool = False,
) -> Parameters:
    """Draw `partner` and `weight` (B,), the part of the own image, from Beta(alpha, alpha).

    Args:
        draw: Stream of the batch.
        alpha: Small values leave one of the two images nearly whole.
        groups: What partners must share; see `partners`.
        probability: How often a sample is mixed.
        own_majority: Take the larger of weight and 1 - weight, so that a sample stays closer to itself (MixMatch).
    """
    weight = beta(draw.child("weight"), alpha, alpha)
    if own_majority:
        weight = torch.maximum(weight, 1 - weight)
    return with_partner(draw, {"weight": weight}, groups, probability)


def mixup(image: Tensor, drawn: Parameters, label: Tensor | None = None) -> Mixed:
    """Blend each image with its partner's (Zhang et al., ICLR 2018), with a weight per sample.

    Args:
        image: Shape: (B, C, *spatial).
        drawn: What `draw_mixup` drew.
        label: Soft labels, floating point (B, ...), are blended alike. Hard labels, int64 (B, ...), cannot be: the own
            and the partner's are returned for a weighted loss.

    Raises:
        ValueError: If the batch, the draw and the labels differ in their number of samples.
    """
    partner = checked_partner(image, drawn, label)
    mixed = _blended(image, partner, drawn["weight"])
    weight = to_device(drawn["weight"], image.device)
    if label is None:
        return Mixed(mixed, None, None, weight)
    if label.is_floating_point():
        return Mixed(mixed, _blended(label, partner, drawn["weight"]), None, weight)
    return Mixed(mixed, label, label.index_select(0, to_device(partner, label.device)), weight)


def draw_cutmix(
    draw: Draw,
    size: Sequence[int],
    alpha: float = 1.0,
    groups: Sequence[Hashable] | None = None,
    *,
    probability: float = 1.0,
) -> Parameters:
    """Draw `partner`, `boxes` (B, 1, D, 2) and `weight` (B,), the part of voxels outside the box.

    The box has the image's shape and the part 1 - Beta(alpha, alpha) of its volume. It lies wholly inside the image;
    Yun et al. draw its centre and clip it, which makes the weight differ from what was drawn.

    Raises:
        ValueError: If the batch has fewer than two samples.
    """
    edges = sizes_of(size)
    inside = 1 - beta(draw.child("weight"), alpha, alpha, (1,)).double()
    boxes = place_boxes(draw.child("box"), edges, sides_of(edges, inside))
    # A fraction that rounds to no voxel still makes a box of one; nothing was asked for there.
    boxes = torch.where((inside > 0)[:, :, None, None], boxes, 0)
    weight = 1 - volume_of(boxes)[:, 0].double() / torch.tensor(edges).prod()
    return with_partner(draw, {"boxes": boxes, "weight": weight.float()}, groups, probability)


def cutmix(image: Tensor, drawn: Parameters, label: Tensor | None = None) -> Mixed:
    """Take a box of each image from its partner (Yun et al., ICCV 2019; in 3D a cuboid).

    Args:
        image: Shape: (B, C, *spatial).
        drawn: What `draw_cutmix` drew for images of this size.
        label: Dense labels (B, *spatial) or (B, K, *spatial) are taken from the partner inside the box, voxel by
            voxel. Labels of whole images are blended if soft (B, K), and returned as a pair if hard (B,), with the true
            part of voxels as weight.

    Raises:
        ValueError: If the batch, the draw and the labels do not fit each other.
    """
    partner = checked_partner(image, drawn, label)
    mixed = _boxes_taken(image, partner, drawn["boxes"])
    weight = to_device(drawn["weight"], image.device)
    if label is None:
        return Mixed(mixed, None, None, weight)
    if _is_dense(label, image):
        return Mixed(mixed, _boxes_taken(label, partner, drawn["boxes"]), None, weight)
    if label.is_floating_point():
        return Mixed(mixed, _blended(label, partner, drawn["weight"]), None, weight)
    return Mixed(mixed, label, label.index_select(0, to_device(partner, label.device)), weight)


def draw_volume_fusion(
    draw: Draw,
    size: Sequence[int],
    classes: int = 5,
    count: tuple[int, int] = (10, 39),
    smallest: int = 8,
    largest: float = 0.625,
) -> Parameters:
    """Draw `boxes` (B, K, D, 2) and the class of each, `box_class` (B, K), for `volume_fusion`.

    Args:
        draw: Stream of the batch.
        size: (Z, Y, X) or (Y, X).
        classes: Steps of the mixture from pure background to pure foreground.
        count: Fewest and most boxes of a sample.
        smallest: Shortest side in voxels.
        largest: Longest side as part of the image's edge. Where it is shorter than `smallest`, it is the only side.

    Raises:
        ValueError: If there are fewer than 2 or more than 256 classes, or `largest` is not in (0, 1].
    """
    if not 2 <= classes <= 256:
        raise ValueError(f"Volume fusion needs 2 to 256 classes, got {classes}")
    if not 0 < largest <= 1:
        raise ValueError(f"largest is a part of the image's edge, in (0, 1]; got {largest}")
    high = [max(1, int(largest * edge)) for edge in sizes_of(size)]
    low = [min(smallest, edge) for edge in high]
    boxes = draw_boxes_of_sides(draw.child("boxes"), size, low, high, count)
    box_class = draw.child("classes").integers(0, classes, (boxes.shape[1],))
    return {"boxes": boxes, "box_class": box_class, "classes": torch.full((len(draw),), classes)}


def volume_fusion(foreground: Tensor, background: Tensor, drawn: Parameters) -> tuple[Tensor, Tensor]:
    """Fuse two volumes by a map of classes that a network then has to find (Wang et al., MIS-FM, 2023).

    Later boxes overwrite earlier ones. Class k of K mixes k / (K - 1) of the foreground with the rest of the
    background; what no box covers is class 0, pure background.

    Args:
        foreground: Shape: (B, C, *spatial).
        background: Shape: (B, C, *spatial), for example the partners' images.
        drawn: What `draw_volume_fusion` drew for images of this size.

    Returns:
        The fused images (B, C, *spatial) in the images' dtype, and the class of each voxel (B, *spatial), int64.

    Raises:
        ValueError: If the two batches differ in shape or dtype, or the draw is of another batch.
    """
    if foreground.shape != background.shape or foreground.dtype != background.dtype:
        raise ValueError(
            f"Volume fusion needs two batches of one shape and dtype, got {tuple(foreground.shape)} {foreground.dtype} "
            f"and {tuple(background.shape)} {background.dtype}"
        )
    if len(drawn["boxes"]) != len(foreground):
        raise ValueError(f"The draw is for {len(drawn['boxes'])} samples, the batch has {len(foreground)}")
    size = foreground.shape[2:]
    painted = class_map_of(drawn["boxes"], drawn["box_class"], size, foreground.device)
    fused = torch.empty_like(foreground, memory_format=torch.contiguous_format)
    for row, (own, other, map_of_classes) in enumerate(zip(foreground, background, painted, strict=True)):
        share = map_of_classes.to(wide(own.dtype)).div_(int(drawn["classes"][row]) - 1)
        fused[row] = torch.lerp(other.to(share.dtype), own.to(share.dtype), share)
    return fused, painted.long()


def _blended(values: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    # `lerp` is exact at both ends and between equal numbers. One row after the other needs no copy of the partners.
    result = torch.empty_like(values, memory_format=torch.contiguous_format)
    dtype = wide(values.dtype)
    for row, (other, own_part) in enumerate(zip(partner.tolist(), weight.tolist(), strict=True)):
        if values.dtype == dtype:
            torch.lerp(values[row], values[other], 1 - own_part, out=result[row])
        else:
            result[row] = torch.lerp(values[row].to(dtype), values[other].to(dtype), 1 - own_part)
    return result


def _boxes_taken(values: Tensor, partner: Tensor, boxes: Tensor) -> Tensor:
    result = values.clone(memory_format=torch.contiguous_format)
    for row, (other, of_sample) in enumerate(zip(partner.tolist(), boxes.tolist(), strict=True)):
        for box in of_sample:
            index: tuple[Any, ...] = (..., *slices_of(box))
            result[row][index] = values[other][index]
    return result


def with_partner(draw: Draw, drawn: Parameters, groups: Sequence[Hashable] | None, probability: float) -> Parameters:
    """Return the parameters and `partner` (B,); `weight` (B,) is 1 where a sample is its own partner.

    Args:
        draw: Stream of the batch.
        drawn: Other parameters of the batch, each (B, ...), on the CPU; not modified.
        groups: What partners must share; see `partners`.
        probability: How often a sample has a partner.

    Raises:
        ValueError: See `partners`.
    """
    partner = partners(draw.child("partner"), groups, probability)
    found = {"partner": partner, **drawn}
    if "weight" in drawn:
        found["weight"] = torch.where(partner == torch.arange(len(partner)), 1.0, drawn["weight"])
    return found


def checked_partner(image: Tensor, drawn: Parameters, label: Tensor | None) -> Tensor:
    """Return the row of each sample's partner, after a look whether draw, images and labels fit. Shape: (B,), int64.

    Args:
        image: Shape: (B, C, *spatial), with two or three spatial axes.
        drawn: `partner` (B,), and where boxes were drawn `boxes` (B, K, D, 2), on the CPU.
        label: Shape: (B, ...), or None.

    Raises:
        ValueError: If the numbers of samples differ, the image has no such shape, or boxes reach out of it.
    """
    partner = drawn["partner"]
    if image.ndim not in (4, 5) or len(image) != len(partner):
        raise ValueError(
            f"The draw is for {len(partner)} samples, got an image of {tuple(image.shape)}; it must be (B, C, Z, Y, X) "
            "or (B, C, Y, X)"
        )
    if label is not None and len(label) != len(image):
        raise ValueError(f"The batch has {len(image)} images and {len(label)} labels")
    boxes = drawn.get("boxes")
    if boxes is not None:
        size = torch.tensor(image.shape[2:])
        if boxes.shape[2] != len(size) or bool((boxes[..., 1] > size).any()):
            raise ValueError(f"The drawn boxes do not fit an image of {tuple(image.shape[2:])}: draw with its size")
    return partner


def _is_dense(label: Tensor, image: Tensor) -> bool:
    axes = image.ndim - 2
    if label.ndim <= 2:
        return False
    if label.ndim not in (axes + 1, axes + 2) or label.shape[-axes:] != image.shape[2:]:
        raise ValueError(
            f"A dense label of an image {tuple(image.shape)} has its spatial shape, got {tuple(label.shape)}"
        )
    return True


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return what images of a type are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
