"""Where the voxels of a view lie in the crop that was read: maps, and what of a view shows the volume.

Everything here is in three dimensions (Z, Y, X), with one slice in 2D, and lives on the CPU unless a device is named.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from medssl.augmentation.resampling import blocks, positions
from medssl.augmentation.transform import Parameters, broadcast, to_device

# The two axes of the plane across each axis.
PLANES = ((1, 2), (0, 2), (0, 1))
# Voxels of a sample from which on it is handled alone on the CPU.
LARGE = 1 << 15


def rotation_matrices(angle_degrees: Tensor) -> Tensor:
    """Return R = Rz Ry Rx on vectors (z, y, x). Shape of the angles: (B, 3) about (z, y, x); of the result: (B, 3, 3).

    A positive angle about an axis turns the two others into each other in their order (z, y), (z, x), (y, x).
    """
    result = torch.eye(3, dtype=torch.float64).repeat(len(angle_degrees), 1, 1)
    if not bool(angle_degrees.any()):
        return result
    for axis, (a, b) in enumerate(PLANES):
        angle = torch.deg2rad(angle_degrees[:, axis].double())
        turn = torch.eye(3, dtype=torch.float64).repeat(len(angle_degrees), 1, 1)
        turn[:, a, a] = turn[:, b, b] = angle.cos()
        turn[:, a, b], turn[:, b, a] = -angle.sin(), angle.sin()
        result = result @ turn
    return result


def quarter_turn_matrices(turns: Tensor) -> Tensor:
    """Return the exact matrices of quarter turns: view voxel to crop voxel, both from their centres.

    Args:
        turns: How often the view is turned as by `torch.rot90` in the planes across (z, y, x), in this order.
            Shape: (B, 3), int64.

    Returns:
        Shape: (B, 3, 3), float64; every entry is -1, 0 or 1.
    """
    result = torch.eye(3, dtype=torch.float64).repeat(len(turns), 1, 1)
    for axis, (a, b) in enumerate(PLANES):
        once = torch.eye(3, dtype=torch.float64)
        once[a, a] = once[b, b] = 0
        once[a, b], once[b, a] = 1, -1
        powers = torch.stack([torch.linalg.matrix_power(once, count) for count in range(4)])
        result = result @ powers[turns[:, axis] % 4]
    return result


def view_to_crop(parameters: Parameters, spacing_mm: Tensor, offset: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Return the map from a voxel of the view to a voxel of the crop.

    With o a voxel of the view, c the view's centre, S the voxel sizes, R the rotation, s the scale, F the mirroring and
    Q the quarter turns: crop voxel = offset + shift + c + S^-1 R s S F Q (o - c). Without rotation and scale it is a
    whole-voxel crop.

    Args:
        parameters: `angle_degrees`, `scale`, `mirror`, `shift` and, where drawn, `quarter_turns` of `Spatial.draw`.
        spacing_mm: Shape: (B, 3).
        offset: First voxel of the unshifted patch in the crop.
        patch: Size of the view.

    Returns:
        Shape: (B, 3, 4), float64.
    """
    spacing = spacing_mm.double()
    centre = (torch.tensor(patch, dtype=torch.float64) - 1) / 2
    flip = 1 - 2 * parameters["mirror"].double()
    linear = rotation_matrices(parameters["angle_degrees"]) * parameters["scale"].double()[:, None]
    linear = linear * spacing[:, None] / spacing[:, :, None] * flip[:, None]
    if "quarter_turns" in parameters:
        linear = linear @ quarter_turn_matrices(parameters["quarter_turns"])
    position = torch.tensor(offset, dtype=torch.float64) + parameters["shift"].double() + centre
    return torch.cat([linear, (position - linear @ centre)[:, :, None]], dim=2)


def is_resampled(parameters: Parameters) -> Tensor:
    """Tell which samples need interpolation. Shape: (B,), bool."""
    turned = (parameters["angle_degrees"] != 0).any(dim=1)
    return turned | (parameters["scale"] != 1).any(dim=1) | (parameters["elastic_strength"] > 0)


def valid_box(valid: Tensor, parameters: Parameters, offset: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Return the part of each view without interpolation that lies inside the volume. Shape: (B, 3, 2), int64."""
    size = torch.tensor(patch)[:, None]
    start = torch.tensor(offset) + parameters["shift"]
    box = torch.minimum((valid - start[:, :, None]).clamp(min=0), size)
    mirrored = (size - box).flip(2)
    box = torch.where(parameters["mirror"][:, :, None], mirrored, box)
    if "quarter_turns" not in parameters:
        return box
    for axis, (a, b) in enumerate(PLANES):
        for count in range(3):
            turned = box.clone()
            turned[:, a], turned[:, b] = (patch[b] - box[:, b]).flip(1), box[:, a]
            box = torch.where((parameters["quarter_turns"][:, axis] > count)[:, None, None], turned, box)
    return box


def wholly_inside(matrix: Tensor, valid: Tensor, patch: Sequence[int]) -> Tensor:
    """Tell for which affine views every voxel lies inside: a box maps to a convex body, so its corners decide."""
    corners = torch.tensor(list(itertools.product(*((0, edge - 1) for edge in patch))), dtype=torch.float64)
    positions = corners @ matrix[:, :, :3].transpose(1, 2) + matrix[:, None, :, 3]
    low, high = _limits(valid)
    return ((positions >= low[:, None]) & (positions <= high[:, None])).flatten(1).all(dim=1)


def box_mask(box: Tensor, patch: Sequence[int], device: torch.device) -> Tensor:
    """Return True inside each box. Shape of the box: (B, 3, 2), on the CPU; of the result: (B, 1, Z, Y, X), bool."""
    if bool((box == torch.tensor([[0, edge] for edge in patch])).all()):
        return torch.ones((len(box), 1, *patch), dtype=torch.bool, device=device)
    box = to_device(box, device)
    along = []
    for axis, edge in enumerate(patch):
        index = torch.arange(edge, device=device)
        along.append((index >= box[:, axis, :1]) & (index < box[:, axis, 1:]))
    z, y, x = along
    return z[:, None, :, None, None] & y[:, None, None, :, None] & x[:, None, None, None, :]


def positions_inside(
    matrix: Tensor, valid: Tensor, patch: Sequence[int], offset: Tensor | None, device: torch.device
) -> Tensor:
    """Return where the nearest voxel of each mapped position lies inside the volume.

    Args:
        matrix: View to crop. Shape: (N, 3, 4).
        valid: Part of the crop inside the volume. Shape: (N, 3, 2).
        patch: Size of the view.
        offset: Elastic part in voxels of the crop. Shape: (N, 3, Z, Y, X), or None.
        device: Where the mask is returned.

    Returns:
        Shape: (N, 1, Z, Y, X), bool.
    """
    if offset is None:
        return _affine_inside(matrix, valid, patch, device)
    low, high = (to_device(limit, device, torch.float32).reshape(-1, 3, 1, 1, 1) for limit in _limits(valid))
    if device.type == "cpu":
        result = torch.empty((len(matrix), *patch), dtype=torch.bool)
        for rows, part in blocks(len(matrix), patch):
            within = torch.ones(result[rows, part].shape, dtype=torch.bool)
            for axis, position in enumerate(positions(matrix[rows].float(), patch, part)):
                position.add_(offset[rows, axis, part])
                within &= position >= low[rows, axis]
                within &= position <= high[rows, axis]
            result[rows, part] = within
        return result[:, None]
    m = to_device(matrix, device, torch.float32).reshape(-1, 3, 4, 1, 1, 1)
    z, y, x = (
        torch.arange(edge, device=device, dtype=torch.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        for axis, edge in enumerate(patch)
    )
    position = m[:, :, 0] * z + m[:, :, 1] * y + (m[:, :, 2] * x + m[:, :, 3]) + offset
    return ((position >= low) & (position <= high)).all(dim=1, keepdim=True)


def _affine_inside(matrix: Tensor, valid: Tensor, patch: Sequence[int], device: torch.device) -> Tensor:
    """Return where affine views lie inside, from where each line along X enters and leaves (Kay and Kajiya, 1986)."""
    z, y, x = (torch.arange(edge, device=device, dtype=torch.float32) for edge in patch)
    low, high = (to_device(limit, device, torch.float32)[:, :, None, None] for limit in _limits(valid))
    m = to_device(matrix, device, torch.float32)[:, :, :, None, None]
    start = m[:, :, 0] * z[:, None] + (m[:, :, 1] * y + m[:, :, 3])
    # A line along a face never meets it: far away on the right side.
    step = m[:, :, 2].masked_fill(m[:, :, 2] == 0, torch.finfo(torch.float32).tiny)
    first, second = (low - start) / step, (high - start) / step
    enters = torch.minimum(first, second).amax(dim=1)[:, None, :, :, None]
    leaves = torch.maximum(first, second).amin(dim=1)[:, None, :, :, None]
    return (x >= enters).logical_and_(x <= leaves)


def crop(
    image: Tensor,
    parameters: Parameters,
    offset: Sequence[int],
    chosen: Tensor,
    background: Tensor,
    patch: Sequence[int],
) -> Tensor:
    """Cut, mirror and quarter-turn whole-voxel views, bit for bit.

    Args:
        image: Crops as read. Shape: (B, C, Z, Y, X).
        parameters: `shift`, `mirror` and, where drawn, `quarter_turns` of `Spatial.draw`. A shifted view may leave the
            crop.
        offset: First voxel of the unshifted patch in the crop.
        chosen: Rows to fill; the others are left as they come from memory. Shape: (B,), bool, on the CPU.
        background: Value where a view leaves the crop. Shape: (B,), on the CPU.
        patch: Size of the views.

    Returns:
        Always new memory. Shape: (B, C, *patch).
    """
    result = image.new_empty((*image.shape[:2], *patch))
    start = torch.tensor(offset) + parameters["shift"]
    turns = parameters.get("quarter_turns", torch.zeros_like(start))
    keys = torch.cat([start, parameters["mirror"].long(), turns], dim=1).tolist()
    alone = one_by_one(image)
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, key in enumerate(keys):
        if chosen[row]:
            groups.setdefault((*key, row) if alone else tuple(key), []).append(row)
    for key, rows in groups.items():
        first, flips = key[:3], [axis for axis in range(3) if key[3 + axis]]
        low = [max(a, 0) for a in first]
        high = [min(a + edge, size) for a, edge, size in zip(first, patch, image.shape[2:], strict=True)]
        source = image[(slice(None), slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
        part = select(source, rows)
        if part.shape[2:] != result.shape[2:]:
            padded = broadcast(background[torch.tensor(rows)], image).expand(*part.shape[:2], *patch).clone()
            where = (slice(a - f, b - f) for a, b, f in zip(low, high, first, strict=True))
            padded[(slice(None), slice(None), *where)] = part
            part = padded
        part = part.flip([axis + 2 for axis in flips]) if flips else part
        for count, (a, b) in zip(key[6:9], PLANES, strict=True):
            part = part.rot90(count, (a + 2, b + 2)) if count else part
        place(result, rows, part)
    return result


def one_by_one(image: Tensor) -> bool:
    """Tell whether samples are better handled alone: large ones on the CPU, where picking them out costs a copy."""
    return image.device.type == "cpu" and image[0].numel() >= LARGE


def select(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return some rows of a batch; a view where it is all or one of them."""
    if len(rows) == len(values):
        return values
    if len(rows) == 1:
        return values[rows[0] : rows[0] + 1]
    return values.index_select(0, to_device(torch.tensor(rows), values.device))


def place(values: Tensor, rows: Sequence[int], content: Tensor) -> None:
    """Write some rows of a batch."""
    if len(rows) == len(values):
        values.copy_(content)
    elif len(rows) == 1:
        values[rows[0] : rows[0] + 1].copy_(content)
    else:
        values.index_copy_(0, to_device(torch.tensor(rows), values.device), content)


def _limits(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outer faces of the first and last voxel; a little inside, against rounding."""
    return valid[:, :, 0].double() - 0.5 + 1e-4, valid[:, :, 1].double() - 0.5 - 1e-4
