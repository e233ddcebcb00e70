"""What holds for every transform that a policy can name."""

from __future__ import annotations

import pytest
import torch

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw
from medssl.errors import UsageError
from tests.augmentation.batches import make_batch, row_of

MODALITIES = ("MR", "CT", "US", "XR")


def modality_of(name: str) -> str:
    return next(modality for modality in MODALITIES if CATALOGUE[name].fits(modality))


def build(name: str, **settings):
    kind = CATALOGUE[name]
    return kind({modality_of(name): kind.settings_class(**{"probability": 1.0, **settings})})


def facts_of(batch, size):
    return Facts.of(batch, batch.modality, size)


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("size", [(8, 10, 12), (10, 12), (1, 6, 7), (1, 1, 1)])
def test_every_transform_takes_volumes_pictures_slices_and_single_voxels(name, size):
    batch = make_batch(size, samples=4, channels=2, modality=modality_of(name))
    before = batch.image.clone()
    transform = build(name)
    drawn = transform.draw(facts_of(batch, size), Draw(0, batch.sample_index))
    result = transform.apply(batch.image, drawn)
    assert torch.isfinite(result).all() and result.shape == before.shape and result.dtype == before.dtype
    assert torch.equal(batch.image, before) and result.data_ptr() != batch.image.data_ptr()


@pytest.mark.parametrize("name", CATALOGUE)
def test_probability_zero_changes_no_bit(name):
    batch = make_batch((6, 8, 8), modality=modality_of(name))
    transform = build(name, probability=0.0)
    drawn = transform.draw(facts_of(batch, (6, 8, 8)), Draw(0, batch.sample_index))
    assert torch.equal(transform.apply(batch.image, drawn), batch.image)


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_kept(name, dtype):
    batch = make_batch((6, 8, 8), modality=modality_of(name))
    transform = build(name)
    drawn = transform.draw(facts_of(batch, (6, 8, 8)), Draw(0, batch.sample_index))
    image = batch.image.to(dtype)
    result = transform.apply(image, drawn)
    assert result.dtype == dtype and torch.isfinite(result).all()


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_policy_refuses_a_transform_in_a_modality_that_it_does_not_fit(name):
    wrong = [modality for modality in MODALITIES if not CATALOGUE[name].fits(modality)]
    for modality in wrong:
        forced = AugmentationSettings(overrides={"intensity": {name: {"probability": 0.5}}})
        with pytest.raises(UsageError, match=f"{name} is never applied to {modality}"):
            policy_for("none", {modality}, (8, 8, 8), forced)


def test_names_families_and_order_are_as_documented():
    names = list(CATALOGUE)
    assert names.index("bias_field") < names.index("gibbs") < names.index("rician") < names.index("noise")
    assert names.index("dose_noise") < names.index("kernel") < names.index("hu_window")
    assert all(CATALOGUE[name].name == name for name in names)
    assert {kind.family for kind in CATALOGUE.values()} >= {"mri", "ct", "ultrasound", "intensity", "acquisition"}


@pytest.mark.parametrize("name", [name for name, kind in CATALOGUE.items() if not kind.mixes_samples])
def test_with_several_threads_too_a_result_does_not_depend_on_batch_mates(name):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        # More voxels than torch reduces on one thread.
        size = (8, 72, 72)
        batch = make_batch(size, samples=2, modality=modality_of(name))
        transform = build(name)
        together = transform.apply(batch.image, transform.draw(facts_of(batch, size), Draw(0, batch.sample_index)))
        one = row_of(batch, 1)
        alone = transform.apply(one.image, transform.draw(facts_of(one, size), Draw(0, one.sample_index)))
        assert torch.equal(alone[0], together[1])
    finally:
        torch.set_num_threads(threads)
