"""Linear and nearest resampling of a batch along an affine map with an optional displacement, in one interpolation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Output voxels whose coordinates are made at once on the CPU: they stay in the cache between making and using them.
VOXELS_AT_ONCE = 1 << 15


def normalised_theta(matrix: Tensor, size_in: Sequence[int], size_out: Sequence[int]) -> Tensor:
    """Turn a voxel-to-voxel map into the form that `affine_grid` and `grid_sample` use (`align_corners=False`).

    Args:
        matrix: Output voxel (z, y, x, 1) or (y, x, 1) to input voxel. Shape: (N, D, D + 1), float64.
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


def resample(
    image: Tensor, matrix: Tensor, size: Sequence[int], *, offset: Tensor | None = None, mode: str = "bilinear"
) -> Tensor:
    """Sample a batch at mapped positions; positions outside take the nearest voxel of the border.

    Args:
        image: Input. Shape: (N, C, *size_in).
        matrix: Output voxel to input voxel, on the CPU. Shape: (N, D, D + 1).
        size: Spatial size of the output.
        offset: Added to the mapped positions, in input voxels, order (z, y, x). Shape: (N, D, *size).
        mode: `bilinear` (linear along each axis) or `nearest`.

    Returns:
        Shape: (N, C, *size).
    """
    size_in = image.shape[2:]
    theta = normalised_theta(matrix.double(), size_in, size)
    if image.device.type == "cuda":
        theta = theta.float().pin_memory().to(image.device, non_blocking=True)
        return _sample(image, _grid(theta, size, offset, size_in), mode)
    theta = theta.float()
    result = image.new_empty((len(image), image.shape[1], *size))
    first, rest = size[0], size[1:]
    slab = max(1, VOXELS_AT_ONCE // max(1, int(torch.tensor(rest).prod())))
    for row in range(len(image)):
        for start in range(0, first, slab):
            stop = min(start + slab, first)
            part = _slab_of(theta[row : row + 1], start, stop, first)
            moved = None if offset is None else offset[row : row + 1, :, start:stop]
            grid = _grid(part, (stop - start, *rest), moved, size_in)
            result[row : row + 1, :, start:stop] = _sample(image[row : row + 1], grid, mode)
    return result


def _sample(image: Tensor, grid: Tensor, mode: str) -> Tensor:
    return F.grid_sample(image, grid, mode=mode, padding_mode="border", align_corners=False)


def _grid(theta: Tensor, size: Sequence[int], offset: Tensor | None, size_in: Sequence[int]) -> Tensor:
    grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)
    if offset is None:
        return grid
    scale = torch.tensor([2.0 / edge for edge in size_in])
    if grid.is_cuda:
        scale = scale.pin_memory().to(grid.device, non_blocking=True)
    scaled = offset * scale.reshape(1, -1, *([1] * (offset.ndim - 2)))
    return grid + scaled.flip(1).movedim(1, -1)


def _slab_of(theta: Tensor, start: int, stop: int, first: int) -> Tensor:
    """Return the map for the output slab [start, stop) of the first axis, which `affine_grid` knows as [-1, 1]."""
    scale = (stop - start) / first
    centre = (start + stop) / first - 1
    part = theta.clone()
    column = theta.shape[1] - 1
    part[:, :, -1] += theta[:, :, column] * centre
    part[:, :, column] *= scale
    return part
