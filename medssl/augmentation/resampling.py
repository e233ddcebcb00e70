"""Linear and nearest resampling of a batch along an affine map with an optional displacement, in one interpolation.

On CUDA this is `grid_sample`. On the CPU that is several times slower than need be: it makes a grid of three floats per
voxel and visits it one voxel at a time. There, a slab of output at a time has its eight neighbours gathered and mixed
by vectorised operations that stay in the cache; and where slices stay slices, as in a turn within the plane or a zoom,
they are mixed along their axis first and then share one index, with four neighbours instead of eight.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.augmentation.transform import to_device

# Output voxels that are made at once on the CPU: the dozen temporaries of this size stay in the cache.
VOXELS_PER_BLOCK = 1 << 17
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
        scratch = _scratch_of(threading.get_ident())
        for rows, sliced in _runs(_slices_stay_slices(matrix, offset)):
            if sliced:
                for row in range(rows.start, rows.stop):
                    _resample_slices(image[row], matrix[row].float(), result[row], mode, scratch)
                continue
            for few, part in blocks(rows.stop - rows.start, size):
                some = slice(rows.start + few.start, rows.start + few.stop)
                moved = None if offset is None else offset[some, :, part]
                _resample_block(image[some], matrix[some].float(), result[some], part, moved, mode, scratch)
        return result
    theta = to_device(normalised_theta(matrix.double(), image.shape[2:], size).float(), image.device)
    grid = F.affine_grid(theta, [len(theta), 1, *size], align_corners=False)
    if offset is not None:
        scale = to_device(torch.tensor([2.0 / edge for edge in image.shape[2:]]), image.device)
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
    """Divide the output of `count` samples into blocks of about `VOXELS_PER_BLOCK`: small samples, or a slab of one.

    Returns:
        Samples, and range of the first spatial axis.
    """
    plane = max(1, math.prod(size[1:]))
    samples = max(1, VOXELS_PER_BLOCK // (plane * size[0]))
    thickness = size[0] if samples > 1 else max(1, VOXELS_PER_BLOCK // plane)
    return [
        (slice(row, min(row + samples, count)), slice(start, min(start + thickness, size[0])))
        for row in range(0, count, samples)
        for start in range(0, size[0], thickness)
    ]


def positions(
    matrix: Tensor, size: Sequence[int], part: slice, out: Sequence[Tensor] | None = None
) -> Iterator[Tensor]:
    """Yield the coordinates of the mapped position of each voxel of a block, one after the other.

    Args:
        matrix: Each sample's map. Shape: (n, D, D + 1), float32.
        size: Spatial size of the output.
        part: Range of the first spatial axis.
        out: Memory for each coordinate.

    Yields:
        For each row of the map. Shape: (n, slab, *size[1:]), float32.
    """
    count = len(size)
    first = torch.arange(part.start, part.stop, dtype=torch.float32)
    terms = []
    for number, axis in enumerate((first, *(torch.arange(edge, dtype=torch.float32) for edge in size[1:]))):
        along = [1] * count
        along[number] = len(axis)
        terms.append((matrix[:, :, number, None] * axis).view(*matrix.shape[:2], *along))
    # The small axes are summed first, so that only one addition is as large as the block.
    small = matrix[:, :, count].reshape(*matrix.shape[:2], *([1] * count))
    for term in terms[:-1]:
        small = small + term
    for row, (base, line) in enumerate(zip(small.unbind(1), terms[-1].unbind(1), strict=True)):
        yield torch.add(base, line, out=None if out is None else out[row])


class _Scratch:
    """Memory to work in, kept from block to block and from call to call: new memory costs as much as the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return memory of a shape, with whatever is in it; what was taken under the same name before is lost."""
        count = math.prod(shape)
        found = self._memory.get((name, dtype))
        if found is None or found.numel() < count:
            found = self._memory[name, dtype] = torch.empty(count, dtype=dtype)
        return found[:count].view(tuple(shape))


@lru_cache(maxsize=16)
def _scratch_of(thread: int) -> _Scratch:
    """Return the memory of a thread, about ten times `VOXELS_PER_BLOCK` numbers."""
    return _Scratch()


def _runs(flags: Sequence[bool]) -> Iterator[tuple[slice, bool]]:
    """Yield the rows of each run of equal flags, and the flag."""
    start = 0
    for flag, run in itertools.groupby(flags):
        stop = start + len(list(run))
        yield slice(start, stop), flag
        start = stop


def _slices_stay_slices(matrix: Tensor, offset: Tensor | None) -> list[bool]:
    """Tell for which samples each slice of the output is parallel to the slices of the input and moved as a whole."""
    if offset is not None or matrix.shape[1] < 3:
        return [False] * len(matrix)
    stays: list[bool] = ((matrix[:, 0, 1:-1] == 0) & (matrix[:, 1:, 0] == 0)).all(dim=1).tolist()
    return stays


def _resample_slices(source: Tensor, matrix: Tensor, target: Tensor, mode: str, scratch: _Scratch) -> None:
    """Fill a view whose slices stay slices.

    Args:
        source: Shape: (C, *size_in).
        matrix: Shape: (3, 4), float32.
        target: To be filled. Shape: (C, *size).
        mode: `bilinear` or `nearest`.
        scratch: Memory to work in.
    """
    (depth_in, *plane_in), (depth, *plane) = source.shape[1:], target.shape[1:]
    index, weights, steps = _neighbours(matrix[None, 1:, 1:], plane_in, plane, slice(0, plane[0]), None, mode, scratch)
    height = (matrix[0, 0] * torch.arange(depth) + matrix[0, 3]).clamp_(0, depth_in - 1)
    lower = height.round() if mode == "nearest" else height.floor().clamp_(max=max(depth_in - 2, 0))
    share = height - lower
    mixes = mode == "bilinear" and bool((share != 0).any())
    together = max(1, VOXELS_PER_BLOCK // max(1, math.prod(plane_in)))
    for channel, first in itertools.product(range(len(source)), range(0, depth, together)):
        some = slice(first, first + together)
        planes, result = lower[some].int(), target[channel, some]
        shape = (len(planes), *plane_in)
        slices = torch.index_select(source[channel], 0, planes, out=scratch.take("slices", shape, source.dtype))
        if mixes:
            above = scratch.take("slices above", shape, source.dtype)
            torch.index_select(source[channel], 0, planes + 1, out=above)
            slices.lerp_(above, share[some, None, None].to(source.dtype))
        _mix(slices.flatten(1), index, weights, steps, result.view(len(planes), -1), scratch)


def _resample_block(
    source: Tensor, matrix: Tensor, target: Tensor, part: slice, offset: Tensor | None, mode: str, scratch: _Scratch
) -> None:
    """Fill a range of the first axis of some samples.

    Args:
        source: Shape: (n, C, *size_in).
        matrix: Shape: (n, D, D + 1), float32.
        target: To be filled. Shape: (n, C, *size).
        part: Range of the first spatial axis.
        offset: Of that range. Shape: (n, D, slab, *size[1:]), or None.
        mode: `bilinear` or `nearest`.
        scratch: Memory to work in.
    """
    index, weights, steps = _neighbours(matrix, source.shape[2:], target.shape[2:], part, offset, mode, scratch)
    for channel in range(source.shape[1]):
        values = source[:, channel].reshape(-1)
        if len(source) == 1:
            _mix(values, index, weights, steps, target[0, channel, part].view(-1), scratch)
        else:
            mixed = _mix(values, index, weights, steps, scratch.take("mixed", index.shape, source.dtype), scratch)
            target[:, channel, part] = mixed.view(len(source), -1, *target.shape[3:])


def _neighbours(
    matrix: Tensor,
    size_in: Sequence[int],
    size: Sequence[int],
    part: slice,
    offset: Tensor | None,
    mode: str,
    scratch: _Scratch,
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Return which voxels are mixed, and how.

    Returns:
        Number of the first neighbour of each output voxel in the flattened samples; for each axis that is mixed, the
        share of the further neighbour and how many voxels it is further. An axis of one voxel is not mixed.
    """
    voxels = math.prod(size_in)
    exact = len(matrix) * voxels < EXACT_IN_FLOAT32
    shape = (len(matrix), part.stop - part.start, *size[1:])
    sums = scratch.take("sums", shape, torch.float32 if exact else torch.int64)
    lower = torch.arange(len(matrix), dtype=sums.dtype).mul_(voxels).reshape(-1, *([1] * len(size)))
    memory = [scratch.take(f"position {axis}", shape) for axis in range(len(size))]
    weights: list[Tensor] = []
    steps: list[int] = []
    for axis, position in enumerate(positions(matrix, size, part, out=memory)):
        if size_in[axis] == 1:
            continue
        if offset is not None:
            position.add_(offset[:, axis])
        edge, stride = size_in[axis], math.prod(size_in[axis + 1 :])
        position.clamp_(0, edge - 1)
        if mode == "nearest":
            voxel = position.round_()
        else:
            voxel = torch.floor(position, out=scratch.take("voxel", shape)).clamp_(max=edge - 2)
            weights.append(position.sub_(voxel).reshape(-1))
            steps.append(stride)
        lower = torch.add(lower, voxel.to(sums.dtype), alpha=stride, out=sums)
    index = lower.expand(shape)
    index = scratch.take("index", shape, torch.int32).copy_(index) if exact else index
    return index.reshape(-1), weights, steps


def _mix(
    values: Tensor, index: Tensor, weights: Sequence[Tensor], steps: Sequence[int], out: Tensor, scratch: _Scratch
) -> Tensor:
    """Write the linear mixture of the neighbours of each index along each of the axes to `out`, and return it.

    Args:
        values: Voxels, or rows of voxels that share the index. Shape: (voxels,) or (K, voxels).
        index: Shape: (n,).
        weights: Of each axis. Shape: (n,).
        steps: Of each axis.
        out: Shape: (n,) or (K, n), contiguous.
        scratch: Memory to work in.
    """
    if not weights:
        # Rows at once are fast for float32 only (torch 2.15).
        if values.ndim == 1 or values.dtype == torch.float32:
            return torch.index_select(values, -1, index, out=out)
        for row, target in zip(values, out, strict=True):
            torch.index_select(row, 0, index, out=target)
        return out
    below = _mix(values, index, weights[1:], steps[1:], out, scratch)
    above = scratch.take(f"above {len(weights)}", out.shape, out.dtype)
    _mix(values[..., steps[0] :], index, weights[1:], steps[1:], above, scratch)
    return torch.lerp(below, above, weights[0].to(out.dtype), out=out)
