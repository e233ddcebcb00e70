"""Our augmentation in nnU-Net: image and label move together, targets are nnU-Net's, and a run repeats bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.errors import UsageError
from medssl.transfer.augmenting import (
    DeviceAugmentation,
    MedsslTransform,
    Targets,
    device_augmentation,
    modality_of,
)
from medssl.transfer.segmentation import finetune_segmentation
from medssl.transfer.settings import TrainingSettings
from medssl.transfer.trainers.medssl_trainer import medSSLTrainer

from .conftest import MakeDataset
from .test_segmentation import SMALL, Crash, _crash_at, _final, _same

CPU = torch.device("cpu")
SIDES = {"background": 0, "left": 1, "right": 2}
SCALES = [[1.0, 1.0, 1.0], [1.0, 0.5, 0.5], [0.5, 0.25, 0.25]]


def made(
    patch: tuple[int, ...] = (12, 16, 16),
    *,
    laterality: str = "forbid",
    channel: str = "MR",
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    seed: int = 0,
    transpose: tuple[int, ...] = (0, 1, 2),
    masked: bool = False,
    **labels: Any,
) -> DeviceAugmentation:
    """Return the augmentation of a data set that exists in facts only."""
    return device_augmentation(
        SimpleNamespace(
            transpose_forward=transpose,
            foreground_intensity_properties_per_channel={"0": {"mean": 40.0, "std": 200.0}},
        ),
        SimpleNamespace(
            patch_size=patch,
            spacing=spacing,
            use_mask_for_norm=[masked],
            normalization_schemes=["CTNormalization" if channel == "CT" else "ZScoreNormalization"],
        ),
        SimpleNamespace(**{"has_regions": False, "foreground_regions": None, "ignore_label": None} | labels),
        {"channel_names": {"0": channel}, "labels": SIDES},
        None,
        laterality=laterality,
        seed=seed,
    )


def crops(augmentation: DeviceAugmentation, count: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return crops whose image is their label, as a loader reads them, with a border of padding."""
    generator = torch.Generator().manual_seed(seed)
    size = augmentation.read_size
    coarse = torch.randn((count, 1, *(4,) * len(size)), generator=generator)
    mode = "trilinear" if len(size) == 3 else "bilinear"
    smooth = torch.nn.functional.interpolate(coarse, size, mode=mode)
    label = (smooth > 0).short() + (smooth > 0.6).short()
    label[..., :2] = -1
    return {"data": label.clamp(min=0).float(), "target": label}


def geometry_only(patch: tuple[int, ...], laterality: str = "allow", pairs: Any = ()) -> DeviceAugmentation:
    settings = AugmentationSettings(laterality=laterality, swap_labels=pairs)
    spacing = (1.0,) * len(patch)
    return DeviceAugmentation(
        policy_for("weak", ["MR"], patch, settings), "MR", Targets(None), spacing_mm=spacing, seed=0
    )


@pytest.mark.parametrize("patch", [(16, 16, 16), (6, 32, 32), (24, 20)])
def test_image_and_label_move_together(patch: tuple[int, ...]) -> None:
    augmentation = geometry_only(patch)
    batch = crops(augmentation, 12)
    result = augmentation(batch, 0, CPU)
    image, target = result["data"], result["target"]
    assert image.shape == (12, 1, *patch) and target.shape == (12, 1, *patch) and target.dtype == torch.int16
    whole = [row for row in range(12) if torch.equal(image[row], image[row].round())]
    assert 2 < len(whole) < 12
    assert torch.equal(image[whole], target[whole].float())
    # Between voxels the image is interpolated; where it is near a label's value the label must have it.
    sure = (image - image.round()).abs() < 0.02
    assert (image.round() == target)[sure].float().mean() > 0.99


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    augmentation, other = made(), made(seed=1)
    batch = crops(augmentation)
    first = augmentation(batch, 3, CPU)
    torch.rand(5), augmentation(batch, 4, CPU)
    again = made()(batch, 3, CPU)
    assert torch.equal(first["data"], again["data"]) and torch.equal(first["target"], again["target"])
    for changed in (augmentation(batch, 4, CPU), other(batch, 3, CPU)):
        assert not torch.equal(first["data"], changed["data"])
    other = made()
    other.stream = "1"
    assert not torch.equal(first["data"], other(batch, 3, CPU)["data"])


def test_what_was_read_is_left_as_it_was() -> None:
    augmentation = made(masked=True)
    batch = crops(augmentation, 8)
    before = {name: tensor.clone() for name, tensor in batch.items()}
    augmentation(batch, 0, CPU)
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def _lefts_and_rights(augmentation: DeviceAugmentation) -> tuple[int, int, torch.Tensor]:
    """Return how many of 40 crops show label 1 on the left (low x), how many on the right, and all targets."""
    label = torch.ones((40, 1, *augmentation.read_size), dtype=torch.int16)
    middle = label.shape[-1] // 2
    label[..., middle:] = 2
    target = augmentation({"data": label.float(), "target": label}, 0, CPU)["target"]
    share = (target[..., : target.shape[-1] // 2] == 1).float().flatten(1).mean(dim=1)
    return int((share > 0.5).sum()), int((share < 0.5).sum()), target


def test_left_stays_left_where_it_is_forbidden_to_mirror() -> None:
    left, right, _ = _lefts_and_rights(geometry_only((8, 8, 8), "forbid"))
    assert (left, right) == (40, 0)
    left, right, _ = _lefts_and_rights(geometry_only((8, 8, 8), "allow"))
    assert left > 8 and right > 8


def test_swapped_labels_stay_on_their_side() -> None:
    augmentation = made((8, 8, 8), laterality="swap-labels")
    assert augmentation.policy.settings.swap_labels == ((2, 3),)
    assert augmentation.mirrored_axes == (0, 1, 2)
    augmentation = geometry_only((8, 8, 8), "swap-labels", ((2, 3),))
    left, right, target = _lefts_and_rights(augmentation)
    assert (left, right) == (40, 0) and set(target.unique().tolist()) == {1, 2}


def test_what_lies_outside_becomes_background_and_zero_in_masked_channels() -> None:
    augmentation = made((8, 8, 8), masked=True)
    label = torch.full((6, 1, *augmentation.read_size), -1, dtype=torch.int16)
    result = augmentation({"data": torch.ones(label.shape), "target": label}, 0, CPU)
    assert (result["data"] == 0).all() and (result["target"] == 0).all()
    plain = made((8, 8, 8))({"data": torch.ones(label.shape), "target": label}, 0, CPU)
    assert (plain["data"] != 0).any()


@pytest.mark.parametrize("regions", [None, [(1, 2), 2], [(1, 2), (2,)]])
@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("scales", [None, SCALES])
@pytest.mark.parametrize("masked", [False, True])
def test_targets_are_those_of_nnunets_transforms(regions: Any, ignore: Any, scales: Any, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(-1, 4, (2, 1, 10, 12, 16), generator=generator, dtype=torch.int16)
    image = torch.randn((2, 2, 10, 12, 16), generator=generator)
    transforms = nnUNetTrainer.get_training_transforms(
        (10, 12, 16), 0.0, scales, (), False, [masked, False], regions=regions, ignore_label=ignore
    )
    # Behind the spatial and intensity transforms, which are eight.
    behind = transforms.transforms[8:]
    theirs = []
    for row in range(2):
        sample = {"image": image[row].clone(), "segmentation": label[row].clone()}
        for transform in behind:
            sample = transform(**sample)
        theirs.append(sample)
    ours = Targets(scales, masked_channels=[0] if masked else [], regions=regions, ignore_label=ignore)
    data, target = ours(image.clone(), label[:, 0].long())
    assert torch.equal(data, torch.stack([sample["image"] for sample in theirs]))
    if scales is None:
        target, theirs = [target], [sample | {"segmentation": [sample["segmentation"]]} for sample in theirs]
    assert len(target) == len(theirs[0]["segmentation"])
    for number, one in enumerate(target):
        expected = torch.stack([sample["segmentation"][number] for sample in theirs])
        assert one.dtype == expected.dtype and torch.equal(one, expected)


def test_targets_of_slices_are_scaled_in_two_axes() -> None:
    label = torch.randint(0, 3, (2, 12, 16))
    _, target = Targets([[1, 1], [0.5, 0.5], [0.25, 0.25]])(torch.zeros(2, 1, 12, 16), label)
    assert [tuple(one.shape) for one in target] == [(2, 1, 12, 16), (2, 1, 6, 8), (2, 1, 3, 4)]


def test_anisotropic_volumes_turn_in_their_slices_only() -> None:
    for patch, spacing in (((4, 16, 16), (1.0, 1.0, 1.0)), ((12, 16, 16), (5.0, 1.0, 1.0))):
        augmentation = made(patch, spacing=spacing)
        label = torch.arange(augmentation.read_size[0], dtype=torch.int16).reshape(1, 1, -1, 1, 1)
        label = label.expand(32, 1, *augmentation.read_size)
        target = augmentation({"data": label.float(), "target": label}, 0, CPU)["target"]
        inside = target.flatten(3).amax(dim=3)[:, 0]
        assert ((target.flatten(3) == inside[:, None, :, None]) | (target.flatten(3) == 0)).all()
    assert made((4, 16, 16)).read_size[0] == 4


@pytest.mark.parametrize(
    ("names", "modality"),
    [
        ({"0": "MR"}, "MR"), ({"0": "CT"}, "CT"), ({"0": "T1", "1": "FLAIR"}, "MR"), ({"0": "ct", "1": "PET"}, "CT"),
        ({"0": "T2", "1": "CT"}, "CT"), ({"0": "zscore"}, "MR"), ({"0": "R", "1": "G", "2": "B"}, "IMAGE"),
        ({"0": "ultrasound"}, "US"), ({}, "MR"),
    ],
)  # fmt: skip
def test_the_modality_comes_from_the_channels(names: dict[str, str], modality: str) -> None:
    assert modality_of(names) == modality


def test_ct_is_augmented_as_ct_and_its_hounsfield_units_are_known() -> None:
    augmentation = made(channel="CT")
    assert augmentation.rescale == (40.0, 200.0)
    names = [transform.name for transform in augmentation.policy.intensity]
    assert "gamma" not in names and "brightness" not in names
    assert made().rescale is None


def test_plans_that_turn_the_axes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"turn the axes \(\[2, 0, 1\]\).*augmentation nnunet"):
        made(transpose=(2, 0, 1))


def test_axes_that_the_policy_does_not_mirror_are_told() -> None:
    assert made().mirrored_axes == (0, 1) and made(laterality="allow").mirrored_axes == (0, 1, 2)
    assert made(channel="ultrasound").mirrored_axes == ()
    assert made((16, 16), spacing=(1.0, 1.0)).mirrored_axes == (0,)


def _in_nnunet(policy: Any, **more: Any) -> dict[str, Any]:
    label = torch.ones((2, *policy.read_size), dtype=torch.int16)
    label[..., label.shape[-1] // 2 :] = 2
    label[1] += 3
    label[..., 0] = -1
    sample = {"image": label[:1].float(), "segmentation": label, **more}
    return MedsslTransform(policy, "MR", spacing_mm=(1, 1, 1))(**sample)


def test_one_sample_goes_through_nnunets_own_pipeline() -> None:
    policy = policy_for("weak", ["MR"], (8, 10, 12), AugmentationSettings(laterality="allow"))
    results = []
    for seed in range(20):
        np.random.seed(seed)
        results.append(_in_nnunet(policy, keys="case"))
    for result in results:
        image, label = result["image"], result["segmentation"]
        assert image.shape == (1, 8, 10, 12) and label.shape == (2, 8, 10, 12) and label.dtype == torch.int16
        assert result["keys"] == "case" and set(label.unique().tolist()) <= {-1, 1, 2, 4, 5}
        assert torch.equal((label[1] - 3)[label[1] > 0], label[0][label[0] > 0])
    firsts = {int(result["segmentation"][0, 4, 5, 3]) for result in results}
    assert firsts == {1, 2}
    np.random.seed(0)
    assert torch.equal(_in_nnunet(policy)["image"], results[0]["image"])


def test_nnunets_other_transforms_follow_it() -> None:
    policy = policy_for("fine-tuning", ["MR"], (8, 16, 16))
    pipeline = ComposeTransforms(
        [
            MedsslTransform(policy, "MR", spacing_mm=(1, 1, 1)),
            RemoveLabelTansform(-1, 0),
            DownsampleSegForDSTransform(SCALES),
        ]
    )
    label = torch.full((1, *policy.read_size), -1, dtype=torch.int16)
    result = pipeline(image=torch.zeros(label.shape), segmentation=label)
    assert result["image"].shape == (1, 8, 16, 16) and result["image"].dtype == torch.float32
    assert [tuple(one.shape) for one in result["segmentation"]] == [(1, 8, 16, 16), (1, 8, 8, 8), (1, 4, 4, 4)]
    assert all((one == 0).all() and one.dtype == torch.int16 for one in result["segmentation"])
    assert (label == -1).all()


def test_one_sample_swaps_labels_by_nnunets_values() -> None:
    still = {"spatial": {name: {"probability": 0} for name in ("rotation", "scale")}}
    settings = AugmentationSettings(laterality="swap-labels", swap_labels=((1, 2), (4, 5)), overrides=still)
    policy = policy_for("weak", ["MR"], (8, 8, 8), settings)
    for seed in range(10):
        np.random.seed(seed)
        label = _in_nnunet(policy)["segmentation"]
        assert (label[0, ..., 1:4] == 1).all() and (label[0, ..., 4:7] == 2).all() and (label[1, ..., 1:4] == 4).all()


def test_labels_can_be_interpolated_class_by_class() -> None:
    turned = {"spatial": {"rotation": {"probability": 1}}}
    settings = AugmentationSettings(label_interpolation="linear", classes=6, overrides=turned)
    policy = policy_for("weak", ["MR"], (8, 8, 8), settings)
    for seed in range(6):
        np.random.seed(seed)
        first, second = _in_nnunet(policy)["segmentation"]
        assert {1, 2} <= set(first.unique().tolist()) <= {-1, 1, 2}
        assert {4, 5} <= set(second.unique().tolist()) <= {-1, 4, 5}


def test_what_cannot_be_moved_along_is_refused() -> None:
    policy = policy_for("weak", ["MR"], (8, 8, 8))
    with pytest.raises(UsageError, match="cannot move keypoints along"):
        _in_nnunet(policy, keypoints=torch.zeros(3))


def test_further_channels_that_cannot_follow_a_library_are_refused() -> None:
    def sample(name: str, channels: int) -> dict[str, Any]:
        overrides = {"library": [{"transform": name, "probability": 0}]}
        policy = policy_for("weak", ["MR"], (8, 8, 8), AugmentationSettings(overrides=overrides))
        label = torch.zeros((channels, *policy.read_size), dtype=torch.int16)
        return MedsslTransform(policy, "MR", spacing_mm=(1, 1, 1))(image=label[:1].float(), segmentation=label)

    with pytest.raises(UsageError, match=r"2 channels of the segmentation along with torchio\.RandomAffine, only the"):
        sample("torchio.RandomAffine", 2)
    assert sample("torchio.RandomAffine", 1)["segmentation"].shape == (1, 8, 8, 8)
    assert sample("torchio.RandomNoise", 2)["segmentation"].shape == (2, 8, 8, 8)


def _seen_batches(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[dict[str, Any]]]:
    trainers: list[Any] = []
    batches: list[dict[str, Any]] = []
    whole = medSSLTrainer._one_step

    def one_step(self: Any, batch: dict[str, Any]) -> tuple[float, float]:
        trainers.append(self)
        batches.append(batch)
        return whole(self, batch)

    monkeypatch.setattr(medSSLTrainer, "_one_step", one_step)
    return trainers, batches


def test_by_default_nnunet_augments_as_ever(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TrainingSettings().augmentation == "nnunet"
    trainers, batches = _seen_batches(monkeypatch)
    finetune_segmentation(make_dataset(), checkpoint, tmp_path / "run", validation_cases=[], **SMALL | {"steps": 1})
    trainer = trainers[0]
    assert trainer.augmentation is None
    loader = trainer.dataloader_train.loader
    stock = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(trainer)
    assert list(loader.patch_size) == list(stock[2])
    names = [type(getattr(t, "transform", t)).__name__ for t in loader.transforms.transforms]
    assert names[0] == "SpatialTransform" and "GammaTransform" in names and "MirrorAndSwap" in names
    # What the trainer was given is what the loader made, unchanged.
    expected = trainer.dataloader_train[0]
    assert torch.equal(batches[0]["data"], expected["data"])
    assert all(torch.equal(one, two) for one, two in zip(batches[0]["target"], expected["target"], strict=True))


def test_targets_of_a_run_have_the_shapes_that_nnunets_have(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers, batches = _seen_batches(monkeypatch)
    folder, shared = make_dataset(), {"cache": tmp_path / "cache", "validation_cases": [], **SMALL | {"steps": 1}}
    for augmentation in ("nnunet", "medssl"):
        run = finetune_segmentation(folder, checkpoint, tmp_path / augmentation, augmentation=augmentation, **shared)
        assert f"augmentation: {augmentation}" in (run / "recipe.yaml").read_text()
        assert (run / "views.png").stat().st_size > 0
    theirs, ours = batches
    assert ours["data"].shape == theirs["data"].shape and ours["data"].dtype == theirs["data"].dtype
    assert [(t.shape, t.dtype) for t in ours["target"]] == [(t.shape, t.dtype) for t in theirs["target"]]
    assert not torch.equal(ours["data"], theirs["data"])
    loader = trainers[1].dataloader_train.loader
    assert loader.transforms is None and list(loader.patch_size) == trainers[1].augmentation.read_size


def test_a_killed_run_with_our_augmentation_goes_on_bit_for_bit(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_dataset()
    options = {**SMALL, "cache": tmp_path / "cache", "augmentation": "medssl", "validation_cases": []}
    whole = finetune_segmentation(folder, checkpoint, tmp_path / "whole", **options)
    with monkeypatch.context() as patch, pytest.raises(Crash):
        _crash_at(patch, 3)
        finetune_segmentation(folder, checkpoint, tmp_path / "killed", **options)
    killed = finetune_segmentation(folder, checkpoint, tmp_path / "killed", resume=True, **options)
    assert _same(whole, killed)
    with pytest.raises(UsageError, match=r"--resume: augmentation is 'nnunet' now and was 'medssl'"):
        finetune_segmentation(
            folder, checkpoint, tmp_path / "killed", resume=True, **options | {"augmentation": "nnunet"}
        )


def test_an_unknown_augmentation_is_named(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no augmentation named 'medsl'\. Did you mean medssl"):
        finetune_segmentation(make_dataset(), checkpoint, tmp_path / "run", augmentation="medsl", **SMALL)  # type: ignore[arg-type]


def test_regions_ignored_voxels_and_swapped_sides_train(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_dataset()
    content = json.loads((folder / "dataset.json").read_text())
    regions = {"labels": {"background": 0, "both": [1, 2], "second": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    (folder / "dataset.json").write_text(json.dumps(content | regions))
    shared = {"augmentation": "medssl", "validation_cases": [], **SMALL | {"steps": 1}}
    run = finetune_segmentation(folder, checkpoint, tmp_path / "regions", **shared)
    assert _final(run)["network_weights"]["decoder.seg_layers.0.weight"].shape[0] == 2
    (folder / "dataset.json").write_text(json.dumps(content))
    run = finetune_segmentation(folder, checkpoint, tmp_path / "swap", laterality="swap-labels", **shared)
    assert tuple(_final(run)["inference_allowed_mirroring_axes"]) == (0, 1)


def test_prediction_flips_no_axis_that_training_did_not(
    make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path
) -> None:
    folder = make_dataset(channel_names=("ultrasound",))
    run = finetune_segmentation(
        folder, checkpoint, tmp_path / "run", augmentation="medssl", laterality="allow", validation_cases=[],
        **SMALL | {"steps": 1},
    )  # fmt: skip
    assert tuple(_final(run)["inference_allowed_mirroring_axes"]) == (2,)


@pytest.mark.slow
def test_a_short_run_learns(make_dataset: MakeDataset, checkpoint: Path, tmp_path: Path) -> None:
    run = finetune_segmentation(
        make_dataset(), checkpoint, tmp_path / "run", augmentation="medssl", learning_rate=3e-3, optimiser="adamw",
        **SMALL | {"steps": 40, "val_every": 40},
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


@pytest.mark.slow
def test_slices_train(make_dataset: MakeDataset, tmp_path: Path) -> None:
    from PIL import Image

    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(4):
        mask = np.zeros((40, 48), dtype=np.uint8)
        mask[10 + number : 30, 12:30] = 1
        picture = rng.integers(0, 90, (40, 48, 3), dtype=np.uint8) + 100 * mask[..., None]
        Image.fromarray(picture).save(folder / "imagesTr" / f"p{number}_0000.png")
        Image.fromarray(mask).save(folder / "labelsTr" / f"p{number}.png")
    content = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "lesion": 1}}
    (folder / "dataset.json").write_text(json.dumps(content | {"numTraining": 4, "file_ending": ".png"}))
    run = finetune_segmentation(folder, None, tmp_path / "run", network="resenc-xs", augmentation="medssl", **SMALL)
    assert (run / "validation" / "p3.png").is_file()
    # A picture is mirrored left-right only, and that is forbidden; nnU-Net's word for no axis is None.
    assert _final(run)["inference_allowed_mirroring_axes"] is None
