"""Linear and nearest resampling of a batch along an affine map with an optional displacement, in one interpolation.

On CUDA this is `grid_sample`. On the CPU that is several times slower than need be: it makes a grid of three floats per
voxel and visits it one voxel at a time. There, a slab of output at a time has its eight neighbours gathered and mixed
by vectorised operations that stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Output voxels that are made at once on the CPU: the dozen temporaries of this size stay in the cache.
VOXELS_AT_ONCE = 1 << 17
# Whole numbers up to here are exact in float32, which is faster to compute an index in than integers.
EXACT_IN_FLOAT32 = 1 << 24


def resample(
    image: Tensor, matrix: Tensor, size: Sequence[int], *, offset: Tensor | None = None, mode: str = "bilinear"
) -> Tensor:
    """Sample a batch at mapped positions; positions outside take the nearest voxel of the border.

    Args:
        image: Input. Shape: (N, C, *size_in).
        matrix: Output voxel (z, y, x, 1) or (y, x, 1) to input voxel, on the CPU. Shape: (N, D, D + 1).
        size: Spatial size of the output.
        offset: Added to the mapped positions, in input voxels, order (z, y, x). Shape: (N, D, *size).
        mode: `bilinear` (linear along each axis) or `nearest`.

    Returns:
        Same dtype as the image. Shape: (N, C, *size).
    """
    if image.device.type == "cpu":
        result = image.new_empty((*image.shape[:2], *size))
        for rows, part in blocks(len(image), size):
            moved = None if offset is None else offset[rows, :, part]
            _resample_block(image[rows], matrix[rows].float(), result[rows], part, moved, mode)
        return result
    theta = _moved(normalised_theta(matrix.double(), image.shape[2:], size).float(), image.device)
    grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)
    if offset is not None:
        scale = _moved(torch.tensor([2.0 / edge for edge in image.shape[2:]]), image.device)
        scaled = offset * scale.reshape(1, -1, *([1] * len(size)))
        grid = grid + scaled.flip(1).movedim(1, -1)
    floating = image if image.is_floating_point() else image.float()
    return F.grid_sample(floating, grid, mode=mode, padding_mode="border", align_corners=False).to(image.dtype)


def normalised_theta(matrix: Tensor, size_in: Sequence[int], size_out: Sequence[int]) -> Tensor:
    """Turn a voxel-to-voxel map into the form that `affine_grid` and `grid_sample` use (`align_corners=False`).

    Args:
        matrix: Output voxel to input voxel. Shape: (N, D, D + 1), float64.
        size_in: Spatial size of the input.
        size_out: Spatial size of the output.

    Returns:
        Map between coordinates in [-1, 1] in the order x, y, z. Shape: (N, D, D + 1), float64.
    """
    s_in = torch.tensor(size_in, dtype=matrix.dtype)
    s_out = torch.tensor(size_out, dtype=matrix.dtype)
    # voxel = (size * (normalised + 1) - 1) / 2 on either side.
    linear = matrix[:, :, :-1] * s_out / s_in[:, None]
    centre_out = (s_out - 1) / 2
    centre_in = matrix[:, :, :-1] @ centre_out + matrix[:, :, -1]
    shift = (2 * centre_in + 1) / s_in - 1
    return torch.cat([linear.flip(1, 2), shift.flip(1)[:, :, None]], dim=2)


def blocks(count: int, size: Sequence[int]) -> list[tuple[slice, slice]]:
    """Divide the output of `count` samples into blocks of about `VOXELS_AT_ONCE`: small samples, or a slab of one.

    Returns:
        Samples, and range of the first spatial axis.
    """
    plane = max(1, math.prod(size[1:]))
    samples = max(1, VOXELS_AT_ONCE // (plane * size[0]))
    thickness = size[0] if samples > 1 else max(1, VOXELS_AT_ONCE // plane)
    return [
        (slice(row, min(row + samples, count)), slice(start, min(start + thickness, size[0])))
        for row in range(0, count, samples)
        for start in range(0, size[0], thickness)
    ]


def positions(row: Tensor, size: Sequence[int], part: slice) -> Tensor:
    """Return one coordinate of the mapped position of each voxel of a block.

    Args:
        row: The coordinate's row of each sample's map. Shape: (n, D + 1), float32.
        size: Spatial size of the output.
        part: Range of the first spatial axis.

    Returns:
        Shape: (n, slab, *size[1:]), float32.
    """
    first = torch.arange(part.start, part.stop, dtype=torch.float32)
    axes = [first, *(torch.arange(edge, dtype=torch.float32) for edge in size[1:])]
    count = len(axes)
    # The small axes are summed first, so that only one addition is as large as the block.
    result = row[:, count].reshape(-1, *([1] * count))
    for number, axis in enumerate(axes):
        along = [1] * count
        along[number] = -1
        result = result + (row[:, number, None] * axis).reshape(len(row), *along)
    return result


def _resample_block(
    source: Tensor, matrix: Tensor, target: Tensor, part: slice, offset: Tensor | None, mode: str
) -> None:
    """Fill a range of the first axis of some samples.

    Args:
        source: Shape: (n, C, *size_in).
        matrix: Shape: (n, D, D + 1), float32.
        target: To be filled. Shape: (n, C, *size).
        part: Range of the first spatial axis.
        offset: Of that range. Shape: (n, D, slab, *size[1:]), or None.
        mode: `bilinear` or `nearest`.
    """
    size_in, size = source.shape[2:], target.shape[2:]
    voxels = math.prod(size_in)
    exact = len(source) * voxels < EXACT_IN_FLOAT32
    index_dtype = torch.float32 if exact else torch.int64
    first = torch.arange(len(source), dtype=index_dtype).mul_(voxels).reshape(-1, *([1] * len(size)))
    shape = (len(source), part.stop - part.start, *size[1:])
    lower = first.expand(shape).clone()
    weights: list[Tensor] = []
    steps: list[int] = []
    for axis, edge in enumerate(size_in):
        stride = math.prod(size_in[axis + 1 :])
        position = positions(matrix[:, axis], size, part)
        if offset is not None:
            position = position + offset[:, axis]
        position.clamp_(0, edge - 1)
        if mode == "nearest":
            voxel = position.round_()
        elif edge > 1:
            voxel = position.floor().clamp_(max=edge - 2)
            weights.append(position.sub_(voxel).reshape(-1).to(source.dtype))
            steps.append(stride)
        else:
            continue
        lower.add_(voxel.to(index_dtype), alpha=stride)
    index = lower.reshape(-1)
    index = index.int() if exact else index
    for channel in range(source.shape[1]):
        values = source[:, channel].reshape(-1)
        if len(source) == 1:
            _mix(values, index, weights, steps, target[0, channel, part].view(-1))
        else:
            mixed = _mix(values, index, weights, steps, target.new_empty(index.shape))
            target[:, channel, part] = mixed.reshape(shape)


def _mix(values: Tensor, index: Tensor, weights: Sequence[Tensor], steps: Sequence[int], out: Tensor) -> Tensor:
    """Write the linear mixture of the neighbours of each index along each of the axes to `out`, and return it."""
    if not weights:
        return torch.index_select(values, 0, index, out=out)
    below = _mix(values, index, weights[1:], steps[1:], out)
    above = _mix(values[steps[0] :], index, weights[1:], steps[1:], torch.empty_like(out))
    return torch.lerp(below, above, weights[0], out=out)


def _moved(values: Tensor, device: torch.device) -> Tensor:
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
