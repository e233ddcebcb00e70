"""What a policy makes of input that is odd: an answer where there is one, else an error with a remedy."""

from __future__ import annotations

import pytest
import torch

from medssl.augmentation.policy import PURPOSES, AugmentationSettings, policy_for
from medssl.data.draw import Draw
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.errors import DataError, UsageError
from tests.augmentation.batches import make_batch
from tests.preprocessing.stores import make_store


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("size", [(1, 12, 12), (1, 1, 1), (1, 1)])
def test_a_slice_and_a_voxel_have_views(purpose, size):
    policy = policy_for(purpose, {"MR"}, size)
    batch = make_batch(policy.read_size, samples=8)
    view = policy.view(batch, Draw(0, batch.sample_index))
    assert view.image.shape == (8, 1, *size) and torch.isfinite(view.image).all()


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("modality", ["MR", "CT", "US"])
def test_constant_volumes_stay_finite(purpose, modality):
    policy = policy_for(purpose, {modality}, (8, 8, 8), AugmentationSettings(check_ranges=True))
    batch = make_batch(policy.read_size, samples=16, modality=modality)
    batch.image.fill_(0.5)
    assert torch.isfinite(policy.view(batch, Draw(0, batch.sample_index)).image).all()


def test_voxels_of_one_to_twelve_are_turned_in_their_plane_only():
    policy = policy_for("strong", {"MR"}, (8, 16, 16))
    batch = make_batch(policy.read_size, samples=32, spacing=(12.0, 1.0, 1.0))
    drawn = policy.view(batch, Draw(0, batch.sample_index)).parameters["spatial"]
    assert drawn["angle_degrees"][:, 0].any() and not drawn["angle_degrees"][:, 1:].any()
    assert (drawn["scale"][:, 0] == 1).all() and (drawn["scale"][:, 1] != 1).any()


def test_a_patch_larger_than_the_volume_is_padded_and_marked(tmp_path):
    store = make_store(tmp_path / "store", shape=(8, 10, 12))
    policy = policy_for("reconstruction", {"MR"}, (16, 24, 24))
    crops = CropSettings(patch_size=(16, 24, 24), batch_size=4, read_size=policy.read_size)
    with CropLoader(store, crops, seed=0) as loader:
        batch = next(loader.batches())
    view = policy.view(batch, Draw(0, batch.sample_index))
    assert view.image.shape == (4, 1, 16, 24, 24)
    assert 0 < view.inside.float().mean() < 0.5
    outside = view.image[~view.inside]
    assert torch.isin(outside, batch.background).all()


def test_what_is_not_a_number_is_found_and_the_transform_named():
    policy = policy_for("none", {"MR"}, (8, 8, 8), AugmentationSettings(check_ranges=True))
    batch = make_batch((8, 8, 8))
    batch.image[1, 0, 2, 3, 4] = float("nan")
    with pytest.raises(DataError, match=r"After the transform 'spatial' a MR sample spans nan"):
        policy.view(batch, Draw(0, batch.sample_index))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spatial: {rotatoin: {probability: 1}}", "rotation"),
        ("intensity: {bias_feild: {probability: 1}}", "bias_field"),
        ("intensity: {noise: {sdt: [0, 1]}}", "std"),
        ("intensity: {noise: {std: [1, 0]}}", "larger number first"),
        ("modalities: {MRT: {}}", "MR"),
        ("- a list", "must hold"),
    ],
)
def test_a_typo_in_a_policy_is_answered_with_what_was_meant(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        policy_for("weak", {"MR"}, (8, 8, 8), AugmentationSettings(policy=path))


def test_an_unknown_modality_is_refused_with_the_setting_that_helps():
    with pytest.raises(UsageError, match=r"PETCT.*augmentation\.modality"):
        policy_for("weak", {"PETCT"}, (8, 8, 8))
