"""Random boxes in an image: drawn on the CPU per sample, painted into maps, or laid until enough is covered.

Boxes are plain tensors (B, K, D, 2) with start and stop along each axis, int64, on the CPU; an empty box has start
equal to stop. They are painted on the CPU, where a box costs microseconds, and one small map travels to the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.augmentation.transform import to_device
from medssl.data.draw import Draw

# No more random boxes are laid per sample; tiles cover what they leave.
MOST_BOXES = 2048
MOST_TILES = 4096


def draw_boxes(
    draw: Draw,
    size: Sequence[int],
    volume_fraction: tuple[float, float],
    count: int | tuple[int, int] = 1,
) -> Tensor:
    """Draw boxes that have the image's shape and a drawn part of its volume, wholly inside the image.

    Sides are rounded to whole voxels, so the volume is met as well as they allow; an axis of one voxel keeps it.

    Args:
        draw: Stream of the batch.
        size: (Z, Y, X) or (Y, X).
        volume_fraction: Range of a box's volume relative to the image's, drawn uniformly for each box.
        count: Boxes per sample; a range is drawn per sample, and the boxes that are too many are empty.

    Returns:
        Start and stop in voxels. Shape: (B, largest count, D, 2), int64, on the CPU.

    Raises:
        ValueError: If a fraction is not in [0, 1], or a range is not ordered.
    """
    low, high = volume_fraction
    if not 0 <= low <= high <= 1:
        raise ValueError(f"volume_fraction is an ordered range in [0, 1], got {volume_fraction}")
    most = _count_range(count)[1]
    fraction = low + (high - low) * draw.uniform(0, 1, (most,)).double()
    return place_boxes(draw, size, sides_of(size, fraction), count)


def draw_boxes_of_sides(
    draw: Draw,
    size: Sequence[int],
    smallest: Sequence[int],
    largest: Sequence[int],
    count: int | tuple[int, int] = 1,
    margin: int = 0,
) -> Tensor:
    """Draw boxes whose sides are drawn apart for each axis, wholly inside the image.

    Args:
        draw: Stream of the batch.
        size: (Z, Y, X) or (Y, X).
        smallest: Shortest side in voxels for each axis.
        largest: Longest side in voxels for each axis; both ends are drawn as often as the rest.
        count: As in `draw_boxes`.
        margin: Voxels that stay free along each border, or as many as fit beside the box.

    Returns:
        Start and stop in voxels. Shape: (B, largest count, D, 2), int64, on the CPU.

    Raises:
        ValueError: If the sides do not fit the image.
    """
    edges = sizes_of(size)
    low, high = torch.tensor(list(smallest)), torch.tensor(list(largest))
    if len(low) != len(edges) or len(high) != len(edges) or bool((low < 1).any() | (low > high).any()):
        raise ValueError(f"Sides from {tuple(smallest)} to {tuple(largest)} make no boxes of {len(edges)} axes")
    if bool((high > torch.tensor(edges)).any()):
        raise ValueError(f"Boxes with sides up to {tuple(largest)} do not fit into an image of {tuple(edges)}")
    most = _count_range(count)[1]
    # In float64: a float32 below one, times a whole number, can round up to that number.
    sides = low + ((high - low + 1) * draw.uniform(0, 1, (most, len(edges))).double()).long()
    return place_boxes(draw, size, sides, count, margin)


def place_boxes(
    draw: Draw, size: Sequence[int], sides: Tensor, count: int | tuple[int, int] = 1, margin: int = 0
) -> Tensor:
    """Place boxes of given sides (B, K, D), every position inside the image as likely as any other."""
    edges = torch.tensor(sizes_of(size))
    fewest, most = _count_range(count)
    free = edges - sides
    border = torch.minimum(torch.tensor(margin), free // 2)
    positions = free - 2 * border + 1
    start = border + (positions * draw.uniform(0, 1, tuple(sides.shape[1:])).double()).long()
    boxes = torch.stack([start, start + sides], dim=-1)
    if fewest == most:
        return boxes
    kept = torch.arange(most) < draw.integers(fewest, most + 1)[:, None]
    return torch.where(kept[:, :, None, None], boxes, 0)


def sides_of(size: Sequence[int], fraction: Tensor) -> Tensor:
    """Return the sides of boxes with the image's shape and a part of its volume. Shape: (*fraction.shape, D), int64."""
    edges = torch.tensor(sizes_of(size), dtype=torch.float64)
    axes = max(int((edges > 1).sum()), 1)
    scale = fraction.double()[..., None] ** (1 / axes)
    return torch.round(scale * edges).clamp(min=1).long().minimum(edges.long())


def volume_of(boxes: Tensor) -> Tensor:
    """Return the number of voxels in each box. Shape: (B, K), int64."""
    return (boxes[..., 1] - boxes[..., 0]).prod(dim=-1)


def box_mask_of(boxes: Tensor, size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return where any box of a sample lies. Shape: (B, 1, *size), bool."""
    mask = np.zeros((len(boxes), *sizes_of(size)), dtype=bool)
    for canvas, of_sample in zip(mask, boxes.tolist(), strict=True):
        for box in of_sample:
            canvas[slices_of(box)] = True
    return to_device(torch.from_numpy(mask)[:, None], torch.device(device))


def class_map_of(boxes: Tensor, classes: Tensor, size: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Paint each box with its class over those before it; what no box covers is class 0.

    Args:
        boxes: Shape: (B, K, D, 2).
        classes: Class of each box, 0 to 255. Shape: (B, K).
        size: (Z, Y, X) or (Y, X).
        device: Where the map is returned.

    Returns:
        Shape: (B, *size), uint8.
    """
    painted = np.zeros((len(boxes), *sizes_of(size)), dtype=np.uint8)
    for canvas, of_sample, values in zip(painted, boxes.tolist(), classes.tolist(), strict=True):
        for box, value in zip(of_sample, values, strict=True):
            canvas[slices_of(box)] = value
    return to_device(torch.from_numpy(painted), torch.device(device))


def draw_cover(
    draw: Draw,
    size: Sequence[int],
    fraction: tuple[float, float],
    side: tuple[float, float],
    *,
    at_most: bool = False,
) -> Tensor:
    """Lay random boxes until a drawn part of the image is covered; overlaps count once.

    The number of boxes is bounded: it suffices for the largest fraction on average, and where a sample's boxes leave
    too much, tiles of the largest side follow in random order, which together cover everything.

    Args:
        draw: Stream of the batch.
        size: (Z, Y, X) or (Y, X).
        fraction: Range of the part of the voxels that is covered, drawn uniformly per sample.
        side: Range of a box's sides relative to the image's, drawn uniformly for each box and axis.
        at_most: Stop before the box that would cover more than was drawn, instead of after the one that reaches it.

    Returns:
        True where covered: at least the drawn part, without the last box less than it; with `at_most` no more than it.
        Shape: (B, *size), bool, on the CPU.

    Raises:
        ValueError: If a range is not ordered or not in [0, 1], or the boxes are too small to cover an image one by one.
    """
    edges = sizes_of(size)
    for name, value in (("fraction", fraction), ("side", side)):
        if not 0 <= value[0] <= value[1] <= 1:
            raise ValueError(f"{name} is an ordered range in [0, 1], got {value}")
    low = [max(1, math.floor(side[0] * edge)) for edge in edges]
    high = [max(least, math.floor(side[1] * edge)) for least, edge in zip(low, edges, strict=True)]
    tiles = math.prod(math.ceil(edge / most) for edge, most in zip(edges, high, strict=True))
    if tiles > MOST_TILES and not at_most:
        raise ValueError(
            f"Boxes with sides up to {tuple(high)} are too small to cover an image of {tuple(edges)} one by one: raise "
            "side, or use random_mask"
        )
    asked = draw.child("fraction").uniform(fraction[0], fraction[1]).double().clamp(*fraction)
    count = _enough_boxes(edges, low, high, fraction[1])
    boxes = draw_boxes_of_sides(draw.child("boxes"), edges, low, high, count)
    if not at_most:
        order = draw.child("tiles").permutation(tiles)
        boxes = torch.cat([boxes, _tiles(edges, high)[order]], dim=1)
    mask = np.zeros((len(draw), *edges), dtype=bool)
    for canvas, of_sample, part in zip(mask, boxes.tolist(), asked.tolist(), strict=True):
        _cover(canvas, of_sample, part * canvas.size, at_most)
    return torch.from_numpy(mask)


def slices_of(box: Sequence[Sequence[int]]) -> tuple[slice, ...]:
    """Return the index of a box given as its (start, stop) along each axis."""
    return tuple(slice(start, stop) for start, stop in box)


def sizes_of(size: Sequence[int]) -> list[int]:
    """Return the edges of an image.

    Raises:
        ValueError: If an edge has no voxel.
    """
    edges = [int(edge) for edge in size]
    if not edges or min(edges) < 1:
        raise ValueError(f"An image of {tuple(edges)} voxels has no place for boxes")
    return edges


def _cover(canvas: NDArray[np.bool_], boxes: list[list[list[int]]], voxels: float, at_most: bool) -> None:
    covered = 0
    for box in boxes:
        if not at_most and covered >= voxels:
            return
        region = canvas[slices_of(box)]
        more = region.size - int(np.count_nonzero(region))
        if at_most and covered + more > voxels:
            return
        region[...] = True
        covered += more


def _enough_boxes(edges: list[int], low: list[int], high: list[int], fraction: float) -> int:
    """Return how many boxes cover a fraction on average, and a quarter more."""
    part = math.prod((least + most) / 2 / edge for least, most, edge in zip(low, high, edges, strict=True))
    if fraction >= 1 or part >= 1:
        return MOST_BOXES if part < 1 else 1
    return min(MOST_BOXES, 16 + math.ceil(1.25 * math.log1p(-fraction) / math.log1p(-part)))


def _tiles(edges: list[int], sides: list[int]) -> Tensor:
    """Return the boxes of a grid that covers the image. Shape: (T, D, 2)."""
    starts = torch.meshgrid(
        *(torch.arange(0, edge, side) for edge, side in zip(edges, sides, strict=True)), indexing="ij"
    )
    start = torch.stack([axis.flatten() for axis in starts], dim=1)
    return torch.stack([start, torch.minimum(start + torch.tensor(sides), torch.tensor(edges))], dim=-1)


def _count_range(count: int | tuple[int, int]) -> tuple[int, int]:
    low, high = (count, count) if isinstance(count, int) else count
    if not 1 <= low <= high:
        raise ValueError(f"count is a positive number of boxes, or an ordered range of it; got {count}")
    return low, high
