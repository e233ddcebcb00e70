"""Mirroring under a laterality policy: a mirrored body has its liver on the left, and no scanner ever showed that.

`forbid` never mirrors the left-right axis (X). `swap-labels` mirrors it and exchanges the classes of paired structures
(left kidney and right kidney). `allow` mirrors it as any other axis. The other axes are the policy's choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from medssl.augmentation.transform import to_device
from medssl.errors import UsageError

Laterality = Literal["forbid", "swap-labels", "allow"]
Axis = Literal["z", "y", "x"]
AXES: tuple[Axis, ...] = ("z", "y", "x")


def allowed_axes(axes: Iterable[Axis], laterality: Laterality, swap_labels: Sequence[tuple[int, int]]) -> set[Axis]:
    """Return the axes that may be mirrored.

    Raises:
        UsageError: If `swap-labels` names no pairs although the left-right axis would be mirrored.
    """
    chosen = set(axes)
    if laterality == "forbid":
        chosen.discard("x")
    elif laterality == "swap-labels" and "x" in chosen and not swap_labels:
        raise UsageError(
            "laterality swap-labels needs the pairs of classes to exchange, for example swap_labels: [[2, 3]]; without "
            "paired structures use forbid or allow."
        )
    return chosen


def swap_table(pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Return the class that each class becomes in a mirrored image, for the classes up to the largest that is named.

    Raises:
        UsageError: If a class is in two pairs or is negative.
    """
    named = [int(value) for pair in pairs for value in pair]
    if len(set(named)) != len(named) or min(named, default=0) < 0:
        raise UsageError(f"swap_labels {list(pairs)}: every class may stand in one pair only, and none is negative.")
    table = torch.arange(max(named, default=0) + 1)
    for left, right in pairs:
        table[left], table[right] = right, left
    return table


def swap_classes(label: Tensor, mirrored: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Exchange paired classes in the samples that were mirrored left-right.

    Args:
        label: Classes. Shape: (B, ...), int64.
        mirrored: Which samples were mirrored. Shape: (B,), bool, on the CPU.
        pairs: Classes that change places.

    Returns:
        The label; the same tensor where nothing was mirrored.
    """
    if not pairs or not bool(mirrored.any()):
        return label
    table = to_device(swap_table(pairs), label.device)
    inside = label.clamp(0, len(table) - 1)
    swapped = torch.where(inside == label, table[inside], label)
    which = to_device(mirrored, label.device).reshape(-1, *([1] * (label.ndim - 1)))
    return torch.where(which, swapped, label)
