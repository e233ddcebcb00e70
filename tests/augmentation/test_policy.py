"""Policies are data by purpose and modality, and what is anatomically or physically wrong is not in them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from medssl.augmentation.policy import PURPOSES, AugmentationSettings, known_modality, list_policies, policy_for
from medssl.config import check_settings
from medssl.data.draw import Draw
from medssl.errors import DataError, UsageError
from tests.augmentation.batches import make_batch, row_of

MODALITIES = ("MR", "CT", "PT", "NM", "US", "XR", "MG", "OPT", "IMAGE", "OT")


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("patch", [(16, 16, 16), (16, 20)])
def test_every_purpose_and_modality_gives_views(purpose, modality, patch):
    policy = policy_for(purpose, {modality}, patch, AugmentationSettings(check_ranges=True))
    batch = make_batch(policy.read_size, samples=6, modality=modality)
    view = policy.view(batch, Draw(0, batch.sample_index))
    assert view.image.shape == (6, 1, *patch) and view.inside.shape == (6, 1, *patch)
    assert view.label.shape == (6, *patch) and view.to_source_mm.shape == (6, 3, 4)
    assert torch.isfinite(view.image).all()
    assert (view.target is None) == (purpose not in ("reconstruction", "restoration"))


def test_reconstruction_moves_anatomy_and_leaves_intensities():
    policy = policy_for("reconstruction", {"MR", "CT"}, (32, 32, 32))
    spatial = policy.by_modality["MR"].spatial
    assert (spatial.rotation.probability, spatial.rotation.degrees) == (0.2, 30)
    assert (spatial.scale.probability, spatial.scale.range) == (0.2, (0.7, 1.4))
    assert spatial.mirror.axes == ("z", "y") and spatial.elastic.probability == 0
    assert policy.intensity == []


def test_the_target_is_the_image_before_it_was_corrupted():
    noisy = AugmentationSettings(overrides={"intensity": {"noise": {"probability": 1.0, "std": [0.5, 0.5]}}})
    policy = policy_for("reconstruction", {"MR"}, (16, 16, 16), noisy)
    plain = policy_for("reconstruction", {"MR"}, (16, 16, 16))
    batch = make_batch(policy.read_size)
    view, clean = (p.view(batch, Draw(0, batch.sample_index)) for p in (policy, plain))
    assert torch.equal(view.target, clean.image)
    assert (view.image - view.target).std().item() == pytest.approx(0.5, rel=0.1)


def test_a_power_law_is_never_put_on_negative_ct():
    for purpose in PURPOSES:
        names = [transform.name for transform in policy_for(purpose, {"CT"}, (8, 8, 8)).intensity]
        assert "gamma_inverted" not in names
    forced = AugmentationSettings(overrides={"intensity": {"gamma_inverted": {"probability": 0.1}}})
    with pytest.raises(UsageError, match="gamma_inverted is never applied to CT"):
        policy_for("fine-tuning", {"CT"}, (8, 8, 8), forced)


def test_in_a_mixed_batch_each_sample_gets_the_policy_of_its_modality():
    policy = policy_for("fine-tuning", {"MR", "CT"}, (8, 8, 8))
    batch = make_batch((8, 8, 8), samples=200, modality=("MR", "CT") * 100)
    drawn = policy.view(batch, Draw(0, batch.sample_index)).parameters
    assert drawn["gamma"]["active"][::2].any() and not drawn["gamma"]["active"][1::2].any()
    assert drawn["noise"]["active"][1::2].any()


def test_a_view_does_not_depend_on_the_batch_it_is_made_in():
    policy = policy_for("strong", {"MR"}, (12, 14, 16))
    batch = make_batch(policy.read_size, samples=5, channels=2)
    together = policy.view(batch, Draw(1, batch.sample_index))
    for row in range(5):
        one = row_of(batch, row)
        alone = policy.view(one, Draw(1, one.sample_index))
        assert torch.equal(alone.image[0], together.image[row]) and torch.equal(alone.label[0], together.label[row])


def test_views_repeat_with_the_draw_and_two_views_differ():
    policy = policy_for("contrastive", {"MR"}, (16, 16, 16))
    batch = make_batch(policy.read_size)
    first, second = policy.two(batch, Draw(0, batch.sample_index))
    again, _ = policy.two(batch, Draw(0, batch.sample_index))
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, second.image) and not torch.equal(first.to_source_mm, second.to_source_mm)


def test_weak_and_strong_views_of_one_draw_show_the_same_voxels():
    batch = make_batch((24, 24, 24), samples=8)
    weak, strong = (
        policy_for(purpose, {"MR"}, (16, 16, 16)).view(batch, Draw(0, batch.sample_index))
        for purpose in ("weak", "strong")
    )
    assert torch.equal(weak.to_source_mm, strong.to_source_mm) and torch.equal(weak.label, strong.label)
    assert not torch.equal(weak.image, strong.image)


def test_what_is_read_covers_nearly_all_that_is_shown():
    for purpose, patch in (("reconstruction", (24, 24, 24)), ("contrastive", (16, 32, 32)), ("fine-tuning", (48, 48))):
        policy = policy_for(purpose, {"MR"}, patch)
        assert all(read >= edge for read, edge in zip(policy.read_size, patch, strict=True))
        batch = make_batch(policy.read_size, samples=48, labels=False)
        view = policy.view(batch, Draw(5, batch.sample_index))
        assert view.inside.float().mean() > 0.97
    assert policy_for("none", {"MR"}, (24, 24, 24)).read_size == (24, 24, 24)


def test_the_batch_is_left_as_it_was():
    policy = policy_for("fine-tuning", {"MR"}, (16, 16, 16))
    batch = make_batch((16, 16, 16), samples=16)
    image, label = batch.image.clone(), batch.label.clone()
    policy.view(batch, Draw(0, batch.sample_index))
    assert torch.equal(batch.image, image) and torch.equal(batch.label, label)


@pytest.mark.parametrize(
    ("name", "known"), [("mri", "MR"), ("CR", "XR"), ("pet", "PT"), ("OT", "OT"), ("image", "IMAGE")]
)
def test_usual_spellings_of_a_modality_are_known(name, known):
    assert known_modality(name) == known


def test_an_unknown_modality_is_refused_with_near_names_and_the_remedy():
    with pytest.raises(UsageError, match=r"no modality named 'MRX'. Did you mean .*MR.*augmentation\.modality"):
        policy_for("reconstruction", {"MRX"}, (8, 8, 8))
    with pytest.raises(UsageError, match="names none"):
        policy_for("reconstruction", set(), (8, 8, 8))
    policy = policy_for("reconstruction", {"MRX"}, (8, 8, 8), AugmentationSettings(modality="MR"))
    batch = make_batch((8, 8, 8), modality="MRX")
    assert policy.view(batch, Draw(0, batch.sample_index)).image.shape == (3, 1, 8, 8, 8)


def test_a_modality_that_the_policy_was_not_made_for_is_named():
    policy = policy_for("reconstruction", {"MR"}, (8, 8, 8))
    with pytest.raises(UsageError, match="holds CT, the policy was made for MR"):
        policy.view(make_batch((8, 8, 8), modality="CT"), Draw(0, range(3)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"intensity": {"gama": {"probability": 1}}}, "Did you mean gamma"),
        ({"spatial": {"rotaton": {}}}, "Did you mean .*rotation"),
        ({"spatial": {"scale": {"range": [1.4, 0.7]}}}, "larger number first"),
        ({"intensity": {"noise": {"probability": 2}}}, "less than or equal to 1"),
    ],
)
def test_a_typo_in_a_policy_is_named(overrides, message):
    with pytest.raises(UsageError, match=message):
        policy_for("fine-tuning", {"MR"}, (8, 8, 8), AugmentationSettings(overrides=overrides))


def test_an_unknown_purpose_is_named():
    with pytest.raises(UsageError, match="Did you mean contrastive"):
        policy_for("contrastiv", {"MR"}, (8, 8, 8))


def test_ones_own_policy_file_is_read(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("spatial: {rotation: {probability: 1.0}}\nintensity: {noise: {probability: 1.0}}\nmodalities: {}\n")
    policy = policy_for("weak", {"MR"}, (8, 8, 8), AugmentationSettings(policy=path))
    assert policy.by_modality["MR"].spatial.rotation.probability == 1.0
    path.write_text("modalities: {MRR: {}}\n")
    with pytest.raises(UsageError, match=r"own\.yaml.*'MRR'"):
        policy_for("weak", {"MR"}, (8, 8, 8), AugmentationSettings(policy=path))


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_values_out_of_the_range_of_a_modality_name_the_transform(value):
    policy = policy_for("reconstruction", {"CT"}, (8, 8, 8), AugmentationSettings(check_ranges=True))
    batch = make_batch((8, 8, 8), modality="CT")
    batch.image[1, 0, 4, 4, 4] = value
    with pytest.raises(DataError, match="After the transform 'spatial' a CT sample"):
        policy.view(batch, Draw(0, batch.sample_index))


def test_settings_come_from_a_recipe():
    settings = check_settings(AugmentationSettings, {"laterality": "allow", "swap_labels": [[1, 2]]}, "recipe")
    assert settings.swap_labels == ((1, 2),)
    with pytest.raises(UsageError, match="Did you mean laterality"):
        check_settings(AugmentationSettings, {"lateralty": "allow"}, "recipe")


def test_all_policies_are_listed():
    rows = list_policies()
    assert {row["purpose"] for row in rows} == set(PURPOSES) and {row["modality"] for row in rows} == set(MODALITIES)


def test_heavy_libraries_are_not_imported():
    code = (
        "import medssl.augmentation.policy, medssl.data.loader, sys;"
        "heavy = ('monai', 'polars', 'torchio', 'nibabel', 'SimpleITK', 'pydicom');"
        "sys.exit(any(name in sys.modules for name in heavy))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device_views_are_those_of_the_cpu_and_the_host_never_waits():
    policy = policy_for(
        "fine-tuning", {"MR"}, (24, 24, 24), AugmentationSettings(overrides={"intensity": {"noise": None}})
    )
    batch = make_batch(policy.read_size, samples=8)
    expected = policy.view(batch, Draw(0, batch.sample_index))
    on_device = batch.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        view = policy.view(on_device, Draw(0, batch.sample_index))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (view.image.cpu() - expected.image).abs().max() < 1e-3
    assert (view.inside.cpu() != expected.inside).float().mean() < 1e-3


def test_positions_and_spectra_are_not_computed_in_tf32(monkeypatch):
    seen = []
    policy = policy_for("none", {"MR"}, (8, 8, 8))
    place = policy.spatial.apply

    def watched(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return place(*arguments)

    monkeypatch.setattr(policy.spatial, "apply", watched)
    torch.set_float32_matmul_precision("high")
    try:
        batch = make_batch((8, 8, 8))
        policy.view(batch, Draw(0, batch.sample_index))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
