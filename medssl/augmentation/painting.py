"""Corruptions that a network has to undo: painted regions and shuffled voxels (Models Genesis, Zhou et al., 2019)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from medssl.augmentation.boxes import box_mask_of, draw_boxes_of_sides, sizes_of
from medssl.augmentation.mixing import partners, wide
from medssl.augmentation.pasting import overwrite_, taken
from medssl.augmentation.transform import broadcast, to_device
from medssl.data.draw import Draw

How = Literal["noise", "uniform", "zero", "mean", "alien", "background"]
# Voxels that Models Genesis leaves along the border.
MARGIN = 3
# Window lengths along each axis, and orders per window shape, that one sample has: enough for no two neighbours to be
# alike by eye, few enough to go shape by shape.
LENGTHS = 3
ORDERS = 16


def in_painting(
    draw: Draw,
    size: Sequence[int],
    count: tuple[int, int] = (1, 5),
    side: tuple[float, float] = (1 / 6, 1 / 3),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Hide a few boxes inside the image.

    Models Genesis stops after each box with a probability of 5 %, and may hide none; here the number is drawn evenly.

    Args:
        draw: Stream of the batch.
        size: (Z, Y, X) or (Y, X).
        count: Fewest and most boxes of a sample.
        side: Range of the sides as part of the image's edge, drawn for each box and axis.
        device: Where the mask is returned.

    Returns:
        True where hidden. Shape: (B, 1, *size), bool.

    Raises:
        ValueError: If `side` is not an ordered range in (0, 1], or `count` not an ordered range of positive numbers.
    """
    return box_mask_of(_inner_boxes(draw, size, count, side), size, device)


def out_painting(
    draw: Draw,
    size: Sequence[int],
    count: tuple[int, int] = (1, 5),
    side: tuple[float, float] = (3 / 7, 4 / 7),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Hide all but the union of a few boxes; arguments and errors as in `in_painting`."""
    return ~box_mask_of(_inner_boxes(draw, size, count, side), size, device)


def fill(
    image: Tensor,
    mask: Tensor,
    how: How,
    draw: Draw | None = None,
    *,
    background: Tensor | None = None,
    partner: Tensor | None = None,
) -> Tensor:
    """Return the image with something else where the mask is True.

    What is filled in follows each channel's own visible voxels, whatever its normalisation; U(0, 1) or N(0, 1), as
    peers draw, is out of the range of many images. Where a whole sample is hidden nothing is known of it, and `noise`,
    `uniform` and `mean` fill 0. Random numbers are made on the image's device and differ between CPU and CUDA.

    Args:
        image: Shape: (B, C, *spatial).
        mask: Shape: (B, 1, *spatial), bool, on the image's device.
        how: `noise`: normal with mean and standard deviation of the visible voxels. `uniform`: from their smallest to
            their largest value. `mean`: their mean. `zero`: 0. `background`: the value outside the body. `alien`: the
            partner's voxels at the same place.
        draw: Stream of the batch, for `noise`, `uniform`, and for `alien` without `partner`.
        background: For `background`; see `Batch`. Shape: (B,), on the CPU.
        partner: For `alien`: row that is shown instead. Shape: (B,), int64, on the CPU.

    Raises:
        ValueError: If the mask does not fit, `how` is unknown, or what it needs is missing.
    """
    if mask.shape != (len(image), 1, *image.shape[2:]) or mask.dtype != torch.bool:
        expected = (len(image), 1, *image.shape[2:])
        raise ValueError(
            f"A mask of an image {tuple(image.shape)} is bool {expected}, got {mask.dtype} {tuple(mask.shape)}"
        )
    if how not in get_args(How):
        raise ValueError(f"how is one of {', '.join(get_args(How))}; got '{how}'")
    if how == "background" and background is None:
        raise ValueError("fill with background needs the value outside the body, one per sample: pass background")
    if how == "alien":
        if partner is None:
            partner = partners(_checked_draw(image, how, draw))
        if bool((partner == torch.arange(len(image))).any()):
            raise ValueError(
                "fill with alien needs another sample for each: a partner that is the sample itself shows it"
            )
        return taken(image, partner, mask)
    result = image.clone(memory_format=torch.contiguous_format)
    if how in ("noise", "uniform"):
        return _randomly_filled_(result, mask, how, _checked_draw(image, how, draw))
    value = torch.zeros((), dtype=image.dtype, device=image.device)
    if how == "background" and background is not None:
        value = broadcast(background.to(image.dtype), image)
    elif how == "mean":
        value = visible_moments(image, mask)[0].to(image.dtype)
    overwrite_(result, mask, value)
    return result


def local_shuffle(image: Tensor, draw: Draw, *, side: float = 0.1, fraction: float = 0.85) -> Tensor:
    """Shuffle the voxels inside small windows, so that texture is lost and shape stays.

    Models Genesis shuffles 10,000 windows that may overlap; in its 64 x 64 x 32 cubes they cover 85 % of the voxels.
    Here the image is divided into windows that do not overlap, and a part of them is shuffled: every voxel moves
    within its window, none is lost or doubled. Along each axis the windows have three lengths drawn from one voxel to
    the largest, in random order. All channels of a voxel move together.

    Args:
        image: Shape: (B, C, *spatial).
        draw: Stream of the batch.
        side: Largest length of a window as part of the image's edge.
        fraction: Part of the windows of each shape that is shuffled.

    Raises:
        ValueError: If the draw is of another batch, an argument is not in (0, 1], or all windows have one voxel.
    """
    if len(draw) != len(image):
        raise ValueError(f"The image has {len(image)} samples, the draw has {len(draw)}")
    if not (0 < side <= 1 and 0 <= fraction <= 1):
        raise ValueError(f"side lies in (0, 1] and fraction in [0, 1], got {side} and {fraction}")
    size = sizes_of(image.shape[2:])
    largest = [max(1, int(side * edge + 1e-6)) for edge in size]
    if max(largest) == 1:
        raise ValueError(
            f"Windows of {side} of an image of {tuple(size)} have one voxel, which cannot be shuffled: raise side"
        )
    lengths = torch.stack([draw.integers(1, most + 1, (LENGTHS,)) for most in largest], dim=1)
    order = draw.integers(0, LENGTHS, (len(size), max(size)))
    seeds = draw.integers(0, 2**62).tolist()
    result = image.clone(memory_format=torch.contiguous_format)
    for row, seed in enumerate(seeds):
        starts = [
            _starts_by_length(lengths[row, axis][order[row, axis]].tolist(), edge) for axis, edge in enumerate(size)
        ]
        generator = torch.Generator(device=image.device).manual_seed(seed)
        _shuffle_windows(image[row].flatten(1), result[row].view(image.shape[1], -1), starts, size, fraction, generator)
    return result


def _inner_boxes(draw: Draw, size: Sequence[int], count: tuple[int, int], side: tuple[float, float]) -> Tensor:
    if not 0 < side[0] <= side[1] <= 1:
        raise ValueError(f"side is an ordered range in (0, 1], got {side}")
    edges = sizes_of(size)
    low = [max(1, int(side[0] * edge + 1e-6)) for edge in edges]
    high = [max(least, int(side[1] * edge + 1e-6)) for least, edge in zip(low, edges, strict=True)]
    return draw_boxes_of_sides(draw, edges, low, high, count, MARGIN)


def _checked_draw(image: Tensor, how: How, draw: Draw | None) -> Draw:
    if draw is None:
        raise ValueError(f"fill with {how} needs a draw")
    if len(draw) != len(image):
        raise ValueError(f"The image has {len(image)} samples, the draw has {len(draw)}")
    return draw


def _randomly_filled_(image: Tensor, mask: Tensor, how: How, draw: Draw) -> Tensor:
    if how == "noise":
        low, spread = visible_moments(image, mask)
        high = low
    else:
        low, high = _visible_range_(image, mask)
        spread = high - low
    seeds = draw.integers(0, 2**62, (image.shape[1],)).tolist()
    for row, channel in itertools.product(range(len(image)), range(image.shape[1])):
        hidden = mask[row, 0]
        # Counting what is hidden is free on the CPU and saves numbers; it would make the host wait for a GPU.
        amount = int(np.count_nonzero(hidden.numpy())) if image.device.type == "cpu" else hidden.numel()
        numbers = torch.empty(amount, dtype=spread.dtype, device=image.device)
        generator = torch.Generator(device=image.device).manual_seed(seeds[row][channel])
        numbers = numbers.normal_(generator=generator) if how == "noise" else numbers.uniform_(generator=generator)
        numbers.mul_(spread[row, channel].flatten()).add_(low[row, channel].flatten())
        if how == "uniform":
            # Rounding may pass the upper end.
            numbers = torch.minimum(numbers, high[row, channel].flatten())
        _scatter_(image[row, channel], hidden, numbers.to(image.dtype))
    return image


def _scatter_(channel: Tensor, hidden: Tensor, numbers: Tensor) -> None:
    """Write one number after the other into the hidden voxels."""
    if channel.device.type == "cpu" and channel.dtype != torch.bfloat16:
        # Twice as fast as torch (2.15), but NumPy has no bfloat16.
        channel.numpy()[hidden.numpy()] = numbers.numpy()
    else:
        channel.masked_scatter_(hidden, numbers)


def visible_moments(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel's visible voxels, 0 where none is visible.

    Args:
        image: Shape: (B, C, *spatial).
        mask: True where hidden. Shape: (B, 1, *spatial), bool.

    Returns:
        Each of shape (B, C, 1, ...), float32 or wider.
    """
    count = (mask[0].numel() - mask.flatten(1).sum(dim=1, keepdim=True)).clamp(min=1)
    seen = image.to(wide(image.dtype), copy=True, memory_format=torch.contiguous_format)
    overwrite_(seen, mask, torch.zeros((), dtype=seen.dtype, device=seen.device))
    mean = _of_each(seen.flatten(2).sum(dim=2) / count, image)
    # Hidden voxels become the mean, so that they add nothing about it.
    overwrite_(seen, mask, mean)
    about = seen.sub_(mean).flatten(2)
    return mean, _of_each(torch.linalg.vector_norm(about, dim=2) / count.sqrt(), image)


def _visible_range_(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest visible value, 0 where none is visible; hidden voxels are overwritten."""
    first = _first_visible(mask)
    hidden = mask.flatten(2).gather(2, first)
    flat = image.flatten(2)
    # A visible value in the place of the hidden ones changes neither end.
    known = flat.gather(2, first.expand(-1, flat.shape[1], -1)).masked_fill(hidden, 0)
    overwrite_(image, mask, _of_each(known[:, :, 0], image))
    low, high = (_of_each(end.to(wide(image.dtype)), image) for end in (flat.amin(dim=2), flat.amax(dim=2)))
    return low, high


def _first_visible(mask: Tensor) -> Tensor:
    """Return the flat index of each sample's first visible voxel, 0 where there is none. Shape: (B, 1, 1)."""
    if mask.device.type == "cpu":
        # NumPy stops at the first one; torch (2.15) looks at all.
        return torch.from_numpy(mask.flatten(2).numpy().argmin(axis=2))[:, :, None]
    return mask.flatten(2).to(torch.uint8).argmin(dim=2, keepdim=True)


def _of_each(values: Tensor, image: Tensor) -> Tensor:
    return values.reshape(*values.shape, *([1] * (image.ndim - 2)))


def _starts_by_length(lengths: list[int], edge: int) -> dict[int, list[int]]:
    """Divide an edge into intervals of the given lengths, the last one cut, and return their starts by length."""
    starts: dict[int, list[int]] = {}
    start = 0
    for length in lengths:
        if start == edge:
            break
        length = min(length, edge - start)
        starts.setdefault(length, []).append(start)
        start += length
    return starts


def _shuffle_windows(
    before: Tensor,
    after: Tensor,
    starts: list[dict[int, list[int]]],
    size: list[int],
    fraction: float,
    generator: torch.Generator,
) -> None:
    """Write the shuffled windows of one sample (C, voxels), all windows of one shape at once."""
    device = before.device
    strides = [1]
    for edge in reversed(size[1:]):
        strides.insert(0, strides[0] * edge)
    for shape in itertools.product(*starts):
        inside = _flat_index([list(range(length)) for length in shape], strides, device)
        if len(inside) == 1:
            continue
        corner = _flat_index([starts[axis][length] for axis, length in enumerate(shape)], strides, device)
        count = round(fraction * len(corner))
        if count == 0:
            continue
        corner = corner[torch.randperm(len(corner), generator=generator, device=device)[:count]]
        orders = min(ORDERS, count)
        order = torch.rand((orders, len(inside)), generator=generator, device=device).argsort(dim=1)
        chosen = torch.randint(orders, (count,), generator=generator, device=device)
        source = corner[:, None] + inside[order].index_select(0, chosen)
        target = corner[:, None] + inside
        after.index_copy_(1, target.flatten(), before.index_select(1, source.flatten()))


def _flat_index(positions: list[list[int]], strides: list[int], device: torch.device) -> Tensor:
    """Return the flat index of every combination of positions along the axes."""
    flat = torch.zeros(1, dtype=torch.int64)
    for along, stride in zip(positions, strides, strict=True):
        flat = (flat[:, None] + torch.tensor(along) * stride).flatten()
    return to_device(flat, device)
