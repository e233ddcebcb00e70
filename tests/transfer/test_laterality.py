"""Left stays left: where the policy forbids it nothing is mirrored from left to right."""

from __future__ import annotations

import pytest
import torch

from medssl.errors import UsageError
from medssl.transfer.laterality import MirrorAndSwap, inference_axes, paired_labels, training_axes


def test_forbid_never_flips_the_last_axis() -> None:
    assert training_axes("forbid", 3) == inference_axes("forbid", 3) == (0, 1)
    assert training_axes("forbid", 2) == inference_axes("forbid", 2) == (0,)


def test_allow_flips_all_and_swap_flips_all_but_in_prediction() -> None:
    assert training_axes("allow", 3) == inference_axes("allow", 3) == (0, 1, 2)
    assert training_axes("swap-labels", 3) == (0, 1, 2) and inference_axes("swap-labels", 3) == (0, 1)
    with pytest.raises(UsageError, match="no laterality policy named 'swap'"):
        training_axes("swap", 3)


def test_a_swapped_mirror_keeps_the_meaning_of_left_and_right() -> None:
    label = torch.zeros(1, 2, 2, 6, dtype=torch.int16)
    label[..., :2], label[..., 4:] = 1, 2
    label[0, 0, 0, 0] = -1
    mirror = MirrorAndSwap((0, 1, 2), 2, [(1, 2)])
    flipped = mirror._apply_to_segmentation(label, axes=[2])
    # Label 1 marks low x before and after: what was on the right, called 2, lies there now and is called 1.
    assert torch.equal(flipped[..., :2].unique(), torch.tensor([1], dtype=torch.int16))
    assert flipped[0, 0, 0, 5] == -1
    assert torch.equal(mirror._apply_to_segmentation(label, axes=[0, 1]), label.flip(1, 2))


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "left_kidney": 1, "liver": 2, "right_kidney": 3},
        {"background": 0, "Kidney Left": 1, "Kidney Right": 3, "clavicle": 2},
        {"background": 0, "kidney_l": 1, "kidney_r": 3, "renal artery": 2},
    ],
)
def test_pairs_are_found_by_their_names(labels: dict[str, int]) -> None:
    assert paired_labels(labels) == [(1, 3)]


def test_labels_without_a_partner_are_refused() -> None:
    with pytest.raises(UsageError, match="left_lung has no counterpart"):
        paired_labels({"background": 0, "left_lung": 1, "liver": 2})
    with pytest.raises(UsageError, match="finds no pair"):
        paired_labels({"background": 0, "anterior": 1})
    with pytest.raises(UsageError, match="not regions"):
        paired_labels({"background": 0, "left": [1, 2], "right": [2, 3]})
