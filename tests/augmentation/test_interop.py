"""TorchIO's and MONAI's transforms run in a policy as the libraries define them, and nothing else can be run by one."""

from __future__ import annotations

import dataclasses
import logging
import random
import subprocess
import sys

import monai.transforms
import numpy as np
import pytest
import torch
import torchio
import yaml

from medssl.augmentation.interop import Library, LibraryTransform
from medssl.augmentation.libraries import LibrarySettings
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.augmentation.spatial import Placed
from medssl.augmentation.transform import Facts
from medssl.data.draw import Draw
from medssl.errors import DataError, UsageError
from tests.augmentation.batches import make_batch, row_of

SIZE = (10, 12, 14)
GHOSTS = {"transform": "torchio.RandomGhosting", "probability": 1, "arguments": {"num_ghosts": [4, 10]}}
GIBBS = {"transform": "monai.transforms.RandGibbsNoised", "probability": 1, "arguments": {"alpha": [0.5, 0.9]}}
BENDS = {
    "transform": "torchio.RandomElasticDeformation",
    "probability": 1,
    "arguments": {"max_displacement": 1.5, "num_control_points": 5},
}
TURNS = {"transform": "monai.transforms.RandAffined", "probability": 1, "arguments": {"rotate_range": [0.5, 0.5, 0.5]}}
NEVER = {"transform": "torchio.RandomNoise", "probability": 0}
HALF = {"transform": "torchio.RandomNoise", "probability": 0.5}


def policy_with(*entries, purpose="none", size=SIZE, modalities=("MR",), **settings):
    settings = AugmentationSettings(overrides={"library": list(entries)}, **settings)
    return policy_for(purpose, modalities, size, settings)


def entry(name, probability=1, **arguments):
    return {"transform": name, "probability": probability, "arguments": arguments}


@pytest.mark.parametrize("chosen", [GHOSTS, GIBBS, BENDS, TURNS])
def test_a_sample_is_changed_as_a_function_of_its_seed_and_of_nothing_else(chosen):
    policy = policy_with(chosen, HALF)
    batch = make_batch(SIZE, samples=4, channels=2)
    together = policy.view(batch, Draw(1, batch.sample_index))
    assert not torch.equal(together.image, batch.image)
    torch.rand(3), np.random.rand(3)
    for row in range(4):
        one = row_of(batch, row)
        alone = policy.view(one, Draw(1, one.sample_index))
        assert torch.equal(alone.image[0], together.image[row]) and torch.equal(alone.label[0], together.label[row])
    assert not torch.equal(policy.view(batch, Draw(2, batch.sample_index)).image, together.image)


def test_the_global_generators_and_the_batch_are_left_as_they_were():
    policy = policy_with(GHOSTS, GIBBS, BENDS)
    batch = make_batch(SIZE)
    image, label = batch.image.clone(), batch.label.clone()
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    policy.view(batch, Draw(0, batch.sample_index))
    assert random.getstate() == states[0] and np.array_equal(np.random.get_state()[1], states[1])
    assert torch.equal(torch.get_rng_state(), states[2])
    assert torch.equal(batch.image, image) and torch.equal(batch.label, label)


def test_torchio_meets_the_image_as_its_reader_gives_it():
    image = make_batch(SIZE, samples=1, channels=2).image[0]
    ours, _ = LibraryTransform(LibrarySettings(**entry("torchio.RandomGhosting", axes=[0])))(image, None, (3, 2, 1), 7)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=image.permute(0, 3, 2, 1), affine=affine))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = torchio.RandomGhosting(axes=(0,))(subject).image.data.permute(0, 3, 2, 1)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, image)


def test_torchio_is_told_the_size_of_voxels():
    image = make_batch((8, 8, 8), samples=1).image[0]
    chosen = entry("torchio.Blur", std=[3, 3, 3])
    wide, narrow = (
        LibraryTransform(LibrarySettings(**chosen))(image, None, spacing, 0)[0] for spacing in ((9, 1, 1), (1, 1, 9))
    )
    # The blur is in mm: along the axis of long voxels there is less of it.
    assert wide.diff(dim=1).abs().mean() > wide.diff(dim=3).abs().mean()
    assert narrow.diff(dim=1).abs().mean() < narrow.diff(dim=3).abs().mean()


def test_monai_meets_the_image_as_its_reader_gives_it():
    image = make_batch(SIZE, samples=1).image[0]
    chosen = LibraryTransform(LibrarySettings(**entry("monai.transforms.RandAxisFlipd")))
    theirs = monai.transforms.RandAxisFlipd(["image"], prob=1.0).set_random_state(7)
    expected = theirs({"image": image.permute(0, 3, 2, 1)})["image"].as_tensor().permute(0, 3, 2, 1)
    ours, _ = chosen(image, None, (1, 1, 1), 7)
    assert torch.equal(ours, expected) and not torch.equal(ours, image)
    gibbs = LibraryTransform(LibrarySettings(**GIBBS))
    theirs = monai.transforms.RandGibbsNoised(["image"], prob=1.0, alpha=(0.5, 0.9)).set_random_state(7)
    expected = theirs({"image": image.permute(0, 3, 2, 1)})["image"].as_tensor().permute(0, 3, 2, 1)
    torch.testing.assert_close(gibbs(image, None, (1, 1, 1), 7)[0], expected)


@pytest.mark.parametrize("chosen", [BENDS, TURNS, entry("torchio.RandomAffine", degrees=20)])
def test_what_moves_anatomy_moves_image_label_and_the_mask_of_the_inside_alike(chosen):
    policy = policy_with(chosen)
    batch = make_batch((16, 16, 16), samples=2, valid=[[0, 16], [0, 16], [3, 16]])
    batch.label = (batch.image[:, 0] > 0).long()
    batch.image = batch.label[:, None].float()
    batch.image[..., :3], batch.label[..., :3] = 0, 0
    policy = policy_with(chosen, size=(16, 16, 16))
    view = policy.view(batch, Draw(0, batch.sample_index))
    assert not torch.equal(view.label, batch.label) and view.label.dtype == torch.int64
    # The image is interpolated linearly, the label is not: they agree where the image is far from a border.
    sure = (view.image[:, 0] - 0.5).abs() > 0.45
    agree = (view.image[:, 0] > 0.5) == (view.label > 0)
    assert agree[sure & view.inside[:, 0]].float().mean() > 0.995 and sure.float().mean() > 0.3
    assert view.inside.dtype == torch.bool and not torch.equal(view.inside[..., 2:5], view.inside[:1, ..., :3])
    assert (view.label[~view.inside[:, 0]] == 0).all()


def test_where_anatomy_went_is_marked_as_unknown_for_the_samples_that_moved():
    policy = policy_with(BENDS | {"probability": 0.5})
    batch = make_batch(SIZE, samples=16)
    view = policy.view(batch, Draw(0, batch.sample_index))
    moved = view.parameters["library"]["active"][:, 0]
    assert 2 < moved.sum() < 14
    assert torch.equal(view.to_source_mm.isnan().flatten(1).all(dim=1), moved)
    assert torch.equal(view.to_source_mm.isnan().flatten(1).any(dim=1), moved)
    assert torch.equal(view.image[~moved], batch.image[~moved])
    still = policy_with(GHOSTS).view(batch, Draw(0, batch.sample_index))
    assert torch.isfinite(still.to_source_mm).all() and torch.equal(still.label, batch.label)


def test_a_batch_in_which_nothing_moves_anatomy_is_passed_on_as_it_is():
    library = Library(
        {"MR": [LibrarySettings(**GHOSTS), LibrarySettings(**BENDS | {"probability": 0})]}, "weak", "forbid"
    )
    batch = make_batch(SIZE)
    facts = Facts(("MR",) * len(batch), batch.spacing_mm, SIZE, 1)
    # Without tensors: nothing of it is looked at.
    placed = Placed(image=None, inside=None, to_source_mm=None, displacement_mm=None, label=None)
    assert library.move(placed, facts, library.draw(facts, Draw(0, batch.sample_index))) is placed


def test_where_positions_are_needed_anatomy_may_not_be_moved():
    for chosen in (BENDS, TURNS, entry("monai.transforms.CenterSpatialCropd", roi_size=8)):
        with pytest.raises(UsageError, match=r"moves anatomy.*contrastive needs positions"):
            policy_with(chosen, purpose="contrastive")
    assert len(policy_with(GHOSTS, entry("monai.transforms.RandSimulateLowResolutiond"), purpose="contrastive").library)


def test_the_target_of_a_reconstruction_moves_along_and_is_not_corrupted():
    batch = make_batch(SIZE)
    still = {"spatial": {name: {"probability": 0} for name in ("rotation", "scale", "mirror")}}

    def view(*entries):
        settings = AugmentationSettings(overrides=still | {"library": list(entries)})
        return policy_for("reconstruction", {"MR"}, SIZE, settings).view(batch, Draw(3, batch.sample_index))

    both, moved = view(BENDS, GHOSTS), view(BENDS)
    assert torch.equal(both.target, moved.image) and not torch.equal(both.image, both.target)
    assert torch.equal(moved.image, moved.target)


def test_left_and_right_are_not_exchanged_by_a_library():
    for name in ("torchio.RandomFlip", "monai.transforms.RandFlipd", "torchio.Transpose"):
        with pytest.raises(UsageError, match=r"mirrors or swaps axes.*laterality forbid.*spatial\.mirror"):
            policy_with(entry(name))
    batch = make_batch((12, 12, 12))
    policy = policy_with(
        entry("torchio.RandomFlip", axes=["LR"], flip_probability=1), laterality="allow", size=(12,) * 3
    )
    view = policy.view(batch, Draw(0, batch.sample_index))
    assert torch.equal(view.image, batch.image.flip(-1)) and torch.equal(view.label, batch.label.flip(-1))


@pytest.mark.parametrize("chosen", [GHOSTS, GIBBS, entry("torchio.RandomAffine"), entry("monai.transforms.RandZoomd")])
def test_slices_keep_two_axes(chosen):
    policy = policy_with(chosen, size=(16, 18))
    batch = make_batch((16, 18), samples=2)
    view = policy.view(batch, Draw(0, batch.sample_index))
    assert (
        view.image.shape == (2, 1, 16, 18) and view.label.shape == (2, 16, 18) and view.inside.shape[1:] == (1, 16, 18)
    )
    assert not torch.equal(view.image, batch.image)


def test_volumes_without_labels_are_changed_too():
    for chosen in (GHOSTS, GIBBS, BENDS, TURNS):
        batch = make_batch(SIZE, labels=False)
        assert policy_with(chosen).view(batch, Draw(0, batch.sample_index)).label is None


def test_the_dtype_stays():
    for dtype in (torch.float16, torch.float64):
        batch = make_batch(SIZE)
        batch = dataclasses.replace(batch, image=batch.image.to(dtype))
        assert policy_with(GHOSTS, GIBBS).view(batch, Draw(0, batch.sample_index)).image.dtype == dtype


def test_each_modality_has_its_own_list(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"modalities": {"MR": {"library": [GHOSTS]}, "CT": {"library": [NEVER]}}}))
    batch = make_batch(SIZE, samples=4, modality=("MR", "CT", "MR", "US"))
    policy = policy_for("weak", {"MR", "CT", "US"}, SIZE, AugmentationSettings(policy=path))
    view = policy.view(batch, Draw(0, batch.sample_index))
    assert (view.image != batch.image).flatten(1).any(dim=1).tolist() == [True, False, True, False]


def test_the_cost_is_measured_and_told_once(caplog):
    policy = policy_with(GHOSTS, NEVER)
    batch = make_batch(SIZE)
    with caplog.at_level(logging.WARNING, logger="medssl.augmentation.interop"):
        for _ in range(2):
            policy.view(batch, Draw(0, batch.sample_index))
        assert not caplog.records
        for _ in range(3):
            policy.view(batch, Draw(0, batch.sample_index))
    assert len(caplog.records) == 1
    assert "off the fast path" in caplog.text and "torchio.RandomGhosting" in caplog.text
    costs = policy.library.costs()
    assert costs["torchio.RandomGhosting"] > 0 and np.isnan(costs["torchio.RandomNoise"])
    ghosts = policy.library.transforms[0]
    assert ghosts.changed == 15 and costs["torchio.RandomGhosting"] == pytest.approx(1000 * ghosts.seconds / 15)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os.system", r"'os\.system' is not below torchio or monai\.transforms"),
        ("torchioevil.X", "is not below"),
        ("monai.bundle.ConfigParser", "is not below"),
        ("torchio.RandomGhostin", r"Did you mean torchio\.RandomGhosting"),
        ("monai.transforms.RandGibsNoised", r"Did you mean .*monai\.transforms\.RandGibbsNoised"),
        ("torchio.datasets.os.system", "no module 'os'"),
        ("torchio.Subject", "no transform named"),
        ("torchio.datasets", "no transform named"),
        ("monai.transforms.utils.optional_import", "no transform named"),
        ("monai.transforms.RandGibbsNoise", r"no dictionary transform.*Use monai\.transforms\.RandGibbsNoised\."),
        ("monai.transforms.Compose", "It has no dictionary form"),
        ("torchio.OneOf", "holds other transforms"),
        ("monai.transforms.Lambdad", "holds other transforms or functions"),
        ("monai.transforms.SaveImaged", "reads or writes files"),
        ("monai.transforms.MixUpd", "mixes the samples"),
        ("torchio.SpatialTransform", "cannot be made with no arguments"),
    ],
)
def test_only_transforms_of_the_two_libraries_can_be_named(name, message):
    with pytest.raises(UsageError, match=message):
        policy_with(entry(name))


def test_a_module_below_a_library_can_be_named():
    assert len(policy_with(entry("torchio.transforms.RandomNoise")).library) == 1
    assert len(policy_with(entry("monai.transforms.intensity.dictionary.RandGibbsNoised")).library) == 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (entry("torchio.RandomGhosting", num_ghost=3), "Ghosting: There is no argument named 'num_ghost'.*num_ghosts"),
        (entry("torchio.RandomGhosting", num_ghosts=-3, intensity=0.5), r"Ghosting cannot be made with num_ghosts=-3:"),
        (entry("monai.transforms.RandGibbsNoised", alpha=[2, 3]), r"GibbsNoised cannot be made with alpha=\(2, 3\)"),
        (entry("monai.transforms.RandSmoothDeformd"), "cannot be made with no arguments.*spatial_size"),
        (entry("torchio.RandomNoise", p=0.5), "say `probability`.*instead of the argument p"),
        (entry("monai.transforms.RandAffined", prob=0.5), "instead of the argument prob"),
        (entry("monai.transforms.RandAffined", keys=["image"]), "what is left out would stay behind"),
        (entry("torchio.RandomNoise", probability=2), "less than or equal to 1"),
        ({"transform": "torchio.RandomNoise"}, "probability: Field required"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named_with_the_transform(chosen, message):
    with pytest.raises(UsageError, match=message):
        policy_with(chosen)


def test_a_change_of_shape_names_the_transform():
    batch = make_batch(SIZE)
    for chosen in (
        entry("torchio.Pad", padding=2),
        entry("monai.transforms.SpatialPadd", spatial_size=20),
        entry("monai.transforms.DeleteItemsd", keys=["image"]),
    ):
        with pytest.raises(
            UsageError, match=rf"{chosen['transform']}: the shape \(1, 10, 12, 14\) was .* keeps its size"
        ):
            policy_with(chosen).view(batch, Draw(0, batch.sample_index))


def test_a_failure_inside_a_library_names_the_transform():
    batch = make_batch(SIZE)
    policy = policy_with(entry("torchio.Mask", masking_method="brain"))
    with pytest.raises(DataError, match=r"torchio\.Mask failed on an image of shape \(1, 10, 12, 14\)"):
        policy.view(batch, Draw(0, batch.sample_index))


def test_monais_own_probability_is_not_left_at_its_default():
    library = Library({"MR": [LibrarySettings(**GIBBS | {"arguments": {"alpha": [0.9, 0.9]}})]}, "weak", "forbid")
    batch = make_batch(SIZE, samples=12)
    policy = policy_with(GIBBS)
    assert library.transforms[0].transform.prob == 1.0
    view = policy.view(batch, Draw(0, batch.sample_index))
    assert (view.image != batch.image).flatten(1).any(dim=1).all()


def test_the_libraries_are_imported_only_where_a_policy_names_them():
    code = (
        "import sys\n"
        "from medssl.augmentation.policy import AugmentationSettings, policy_for\n"
        "policy_for('strong', {'MR'}, (8, 8, 8))\n"
        "assert not {'monai', 'torchio'} & set(sys.modules)\n"
        "chosen = {'library': [{'transform': 'torchio.RandomNoise', 'probability': 1}]}\n"
        "policy_for('strong', {'MR'}, (8, 8, 8), AugmentationSettings(overrides=chosen))\n"
        "assert 'torchio' in sys.modules and 'monai' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
