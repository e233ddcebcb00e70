"""Left-right mirroring: forbidden, allowed, or done with the labels of paired organs swapped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from torch import Tensor

from medssl.errors import UsageError, unknown_name

NAMES = ("forbid", "swap-labels", "allow")
_LEFT = re.compile(r"(?<![a-z])(left|l|lt)(?![a-z])")
_RIGHT = re.compile(r"(?<![a-z])(right|r|rt)(?![a-z])")


class MirrorAndSwap(MirrorTransform):
    """nnU-Net's mirroring; where the left-right axis is flipped, labels of paired organs change places.

    Args:
        axes: Axes that may be flipped.
        left_right: The axis between left and right.
        pairs: Label values that change places.
    """

    def __init__(self, axes: Sequence[int], left_right: int, pairs: Sequence[tuple[int, int]]) -> None:
        super().__init__(tuple(axes))
        self.left_right = left_right
        self.pairs = list(pairs)

    def _apply_to_segmentation(self, segmentation: Tensor, **params: Any) -> Tensor:
        flipped = super()._apply_to_segmentation(segmentation, **params)
        if self.left_right not in params["axes"]:
            return flipped
        swapped = flipped.clone()
        for left, right in self.pairs:
            swapped[flipped == left] = right
            swapped[flipped == right] = left
        return swapped


def left_right_axis(dimensions: int) -> int:
    """Return the spatial axis that runs from left to right: the last, in arrays of RAS+ orientation."""
    return dimensions - 1


def training_axes(policy: str, dimensions: int) -> tuple[int, ...]:
    """Return the axes that training may flip."""
    check_policy(policy)
    axes = tuple(range(dimensions))
    return axes[:-1] if policy == "forbid" else axes


def inference_axes(policy: str, dimensions: int) -> tuple[int, ...]:
    """Return the axes that prediction may flip; nnU-Net's predictor cannot swap labels, so it goes without."""
    check_policy(policy)
    axes = tuple(range(dimensions))
    return axes if policy == "allow" else axes[:-1]


def check_policy(policy: str) -> None:
    """Refuse a policy that does not exist.

    Raises:
        UsageError: Naming those that do.
    """
    if policy not in NAMES:
        raise unknown_name("laterality policy", policy, NAMES)


def paired_labels(labels: dict[str, Any]) -> list[tuple[int, int]]:
    """Return the values of labels that differ by left and right in their names, such as left_kidney and right_kidney.

    Args:
        labels: `labels` of `dataset.json`.

    Raises:
        UsageError: If there is no pair, or if a side has no counterpart.
    """
    lefts: dict[str, tuple[str, Any]] = {}
    rights: dict[str, tuple[str, Any]] = {}
    for name, value in labels.items():
        text = name.lower()
        for pattern, sides in ((_LEFT, lefts), (_RIGHT, rights)):
            if pattern.search(text):
                sides[pattern.sub("*", text)] = (name, value)
    alone = [name for key, (name, _) in [*lefts.items(), *rights.items()] if key not in lefts or key not in rights]
    if alone:
        raise UsageError(
            f"laterality swap-labels: {', '.join(alone)} has no counterpart on the other side. Use forbid, or "
            "name the pair alike."
        )
    if not lefts:
        raise UsageError(
            f"laterality swap-labels finds no pair of left and right among the labels {', '.join(labels)}. Use "
            "allow if "
            "nothing in the labels depends on the side, forbid if something does."
        )
    pairs = [(lefts[key][1], rights[key][1]) for key in lefts]
    if any(isinstance(value, list) for pair in pairs for value in pair):
        raise UsageError("laterality swap-labels needs one value per label, not regions. Use forbid.")
    return [(int(left), int(right)) for left, right in pairs]


def set_mirroring(transforms: Any, policy: str, dimensions: int, labels: dict[str, Any]) -> None:
    """Put the policy's mirroring in place of nnU-Net's, in a composed list of transforms.

    Raises:
        RuntimeError: If nnU-Net's list holds no mirroring, so that the policy would silently not hold.
    """
    axes = training_axes(policy, dimensions)
    places = [index for index, transform in enumerate(transforms.transforms) if isinstance(transform, MirrorTransform)]
    if len(places) != 1:
        raise RuntimeError(f"Expected one mirroring among nnU-Net's transforms, found {len(places)}")
    pairs = paired_labels(labels) if policy == "swap-labels" else []
    transforms.transforms[places[0]] = MirrorAndSwap(axes, left_right_axis(dimensions), pairs)
