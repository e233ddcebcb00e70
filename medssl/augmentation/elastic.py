"""Smooth displacements from a coarse grid of cubic B-splines that cannot fold (Rueckert et al., IEEE TMI 1999)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.augmentation.transform import to_device

# A cubic B-spline displacement is one-to-one if no component exceeds 0.40 of the control spacing in 3D and 0.48 in 2D
# (Choi and Lee, 2000); the smaller bound holds for both.
FOLD_FREE_PART = 0.40


def control_shape(size: Sequence[int], cells: int) -> tuple[int, ...]:
    """Return the number of control points along each axis of an image; an axis of one voxel needs no cells."""
    return tuple((cells if edge > 1 else 1) + 3 for edge in size)


def largest_shift_mm(size: Sequence[int], spacing_mm: Tensor, cells: int) -> Tensor:
    """Return how far a component may move without folding. `spacing_mm` has shape (B, D), the result (B,)."""
    extents = torch.tensor([float(edge - 1) if edge > 1 else float("inf") for edge in size], dtype=spacing_mm.dtype)
    shift = FOLD_FREE_PART * (extents * spacing_mm / cells).amin(dim=1)
    return torch.where(torch.isfinite(shift), shift, 0.0)


def displacement_mm(control: Tensor, size: Sequence[int], device: torch.device) -> Tensor:
    """Evaluate the splines at every voxel.

    Args:
        control: Displacement of the control points in mm. Shape: (N, D, *control_shape), on the CPU.
        size: Spatial size of the image.
        device: Where the field is needed.

    Returns:
        Shape: (N, D, *size), float32.
    """
    field = to_device(control, device, torch.float32)
    for axis, edge in enumerate(size, start=2):
        weights = to_device(_spline_weights(edge, field.shape[axis] - 3), device)
        field = torch.tensordot(field, weights, dims=([axis], [1])).movedim(-1, axis)
    return field.contiguous()


def _spline_weights(edge: int, cells: int) -> Tensor:
    """Return the weight of each control point at each voxel. Shape: (edge, cells + 3), float32; rows sum to one."""
    position = torch.linspace(0, cells, edge, dtype=torch.float64) if edge > 1 else torch.zeros(1, dtype=torch.float64)
    cell = position.floor().clamp(max=cells - 1)
    t = position - cell
    basis = torch.stack(
        [(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3],
        dim=1,
    )
    weights = torch.zeros(edge, cells + 3, dtype=torch.float64)
    weights.scatter_(1, cell.long()[:, None] + torch.arange(4), basis / 6)
    return weights.float()
