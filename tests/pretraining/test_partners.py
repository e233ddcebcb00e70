"""Another sample of the batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.pretraining.partners import of_partners, partner_rows
from tests.augmentation.batches import make_batch, row_of

SIZE = (4, 4)
POLICY = policy_for("weak", {"MR", "CT"}, SIZE)


def batch_of(volumes: list[int], modality: str | tuple[str, ...] = "MR") -> Batch:
    batch = make_batch(SIZE, samples=len(volumes), modality=modality)
    return dataclasses.replace(batch, sample_id=torch.tensor(volumes))


def drawn(batch: Batch, times: int = 200) -> torch.Tensor:
    """Return the partners of each sample in many batches. Shape: (times, B)."""
    indices = torch.arange(len(batch))
    return torch.stack([partner_rows(batch, Draw(seed, indices), POLICY) for seed in range(times)])


def test_a_partner_is_another_volume_and_each_is_as_likely() -> None:
    volumes = [5, 5, 9, 9, 2]
    found = drawn(batch_of(volumes), 600)
    for row, volume in enumerate(volumes):
        others = [other for other, of in enumerate(volumes) if of != volume]
        counts = torch.bincount(found[:, row], minlength=5)
        assert counts[others].sum() == 600
        assert (counts[others] > 0.7 * 600 / len(others)).all()


def test_crops_of_one_volume_are_partners_where_there_is_no_other() -> None:
    found = drawn(batch_of([3, 3, 3]))
    assert not (found == torch.arange(3)).any()
    assert all(len(found[:, row].unique()) == 2 for row in range(3))


def test_a_partner_has_the_same_modality_where_another_volume_has_it() -> None:
    found = drawn(batch_of([0, 1, 2, 3, 3], ("MR", "mri", "CT", "CT", "CT")))
    assert (found[:, 0] == 1).all() and (found[:, 1] == 0).all()
    # Another volume counts more than the same modality.
    assert set(found[:, 2].tolist()) == {3, 4} and (found[:, 3:] == 2).all()
    lonely = drawn(batch_of([0, 1, 1], ("MR", "CT", "CT")))
    assert set(lonely[:, 0].tolist()) == {1, 2} and (lonely[:, 1:] == 0).all()


def test_all_are_of_one_modality_where_the_user_says_so() -> None:
    policy = policy_for("weak", {"MR"}, SIZE, AugmentationSettings(modality="MR"))
    batch = batch_of([0, 1, 2], ("unheard of", "CT", "CT"))
    rows = torch.stack([partner_rows(batch, Draw(seed, [0, 1, 2]), policy) for seed in range(100)])
    assert set(rows[:, 1].tolist()) == {0, 2}


def test_the_choice_repeats_and_depends_on_seed_and_index() -> None:
    batch = batch_of([0, 1, 2, 3, 4, 5])
    first, again, other = (partner_rows(batch, Draw(seed, range(6)), POLICY) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 2 samples.*raise batch_size"):
        partner_rows(row_of(batch_of([0, 1]), 0), Draw(0, [0]), POLICY)


def test_values_of_partners_are_those_of_their_rows() -> None:
    rows = torch.tensor([2, 0, 1])
    values = torch.randn(3, 1, 4)
    assert torch.equal(of_partners(values, rows), values[rows])
    assert torch.equal(of_partners(values > 0, rows), (values > 0)[rows])
