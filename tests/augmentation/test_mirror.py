"""Left and right change places only where the user allows it, and then with their labels."""

from __future__ import annotations

import pytest
import torch

from medssl.augmentation.mirror import allowed_axes, swap_classes, swap_table
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.draw import Draw
from medssl.errors import UsageError
from tests.augmentation.batches import make_batch


def drawn_mirrors(**settings):
    policy = policy_for("reconstruction", {"MR"}, (8, 8, 8), AugmentationSettings(**settings))
    batch = make_batch((8, 8, 8), samples=64)
    view = policy.view(batch, Draw(0, batch.sample_index))
    return view.parameters["spatial"]["mirror"], view, batch


def test_forbid_blocks_left_right_and_nothing_else():
    mirror, _, _ = drawn_mirrors()
    assert not mirror[:, 2].any() and mirror[:, 0].any() and mirror[:, 1].any()


def test_allow_mirrors_left_right_and_leaves_labels_as_they_are():
    mirror, view, batch = drawn_mirrors(laterality="allow")
    assert mirror[:, 2].any()
    assert set(view.label.unique().tolist()) == set(batch.label.unique().tolist())


def test_swapped_labels_follow_the_mirror():
    only_x = {"spatial": {"rotation": {"probability": 0}, "scale": {"probability": 0}, "mirror": {"axes": ["x"]}}}
    mirror, view, batch = drawn_mirrors(laterality="swap-labels", swap_labels=((1, 2),), overrides=only_x)
    expected = torch.tensor([0, 2, 1])[batch.label.flip(3)]
    flipped = mirror[:, 2]
    assert 0 < flipped.sum() < len(flipped)
    assert torch.equal(view.label[flipped], expected[flipped])
    assert torch.equal(view.label[~flipped], batch.label[~flipped])


def test_classes_that_are_not_named_stay():
    label = torch.tensor([[0, 1, 2, 3, 9]])
    assert swap_classes(label, torch.tensor([True]), [(1, 3)]).tolist() == [[0, 3, 2, 1, 9]]
    assert swap_classes(label, torch.tensor([False]), [(1, 3)]).tolist() == label.tolist()


def test_exchanging_twice_changes_nothing():
    table = swap_table([(1, 4), (2, 3)])
    assert torch.equal(table[table], torch.arange(5))


def test_pairs_that_make_no_sense_are_named():
    with pytest.raises(UsageError, match="one pair only"):
        swap_table([(1, 2), (2, 3)])
    with pytest.raises(UsageError, match="swap_labels: \\[\\[2, 3\\]\\]"):
        allowed_axes(("z", "x"), "swap-labels", ())
