"""What classification refuses before it trains, and how images come to the patch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.data.targets import Case
from medssl.errors import CheckpointError, DataError, UsageError
from medssl.networks.architecture import architecture
from medssl.training.checkpoint import load_checkpoint, save_checkpoint
from medssl.transfer.classification import finetune_classification
from medssl.transfer.classification_settings import ClassificationSettings
from medssl.transfer.image_batches import ImageOrder
from medssl.transfer.image_fit import choose_patch, fit_image, place
from tests.transfer.toy_images import finetune, write_npz, write_pictures, write_volumes


@pytest.fixture(autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDSSL_KEY_FILE", str(tmp_path_factory.mktemp("key") / "key"))


def test_a_patient_in_two_splits_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    labels = write_volumes(tmp_path / "data")
    labels.write_text(labels.read_text().replace("patient5,val", "patient0,val"))
    with pytest.raises(
        DataError, match=r"labels.csv line 12: its patient is in the split validation here and in train"
    ):
        finetune(labels, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_image_that_does_not_open_is_named_before_training(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", count=4)
    file = folder / "small" / "2.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"1 images cannot be used: small/2.png: "):
        finetune(folder, tmp_path / "run", folds=2)
    assert not (tmp_path / "run").exists()


def test_voxels_that_are_no_numbers_are_named_before_training(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "toy.npz")
    arrays = {name: value.astype(np.float32) for name, value in np.load(path).items()}
    arrays["val_images"][3, 2, 2] = np.nan
    arrays = {name: value.astype(int) if "labels" in name else value for name, value in arrays.items()}
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=r"val_images\[3\]: not_finite"):
        finetune(path, tmp_path / "run")


def test_features_that_are_no_numbers_are_named_before_training(tmp_path: Path, checkpoint: Path) -> None:
    labels = write_volumes(tmp_path / "data")
    content = load_checkpoint(checkpoint)
    broken = {name: value.clone() for name, value in content["network_weights"].items()}
    broken["encoder.stages.0.blocks.0.conv1.conv.weight"].fill_(float("nan"))
    save_checkpoint(tmp_path / "nan.pth", {**content, "network_weights": broken})
    with pytest.raises(CheckpointError, match=r"encoder.stages.0.blocks.0.conv1.conv.weight holds NaN"):
        finetune(labels, tmp_path / "run", tmp_path / "nan.pth", patch_size=(16, 16, 16))
    for name, value in broken.items():
        broken[name] = torch.full_like(value, 1e30)
    save_checkpoint(tmp_path / "huge.pth", {**content, "network_weights": broken})
    with pytest.raises(CheckpointError, match=r"line \d+: the encoder's features are NaN or infinite before training"):
        finetune(labels, tmp_path / "run2", tmp_path / "huge.pth", patch_size=(16, 16, 16))


def test_pictures_of_different_channels_are_named_with_the_way_out(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "pictures", count=4)
    grey = Image.open(folder / "small" / "1.png").convert("L")
    grey.save(folder / "small" / "1.png")
    with pytest.raises(DataError, match="Use --grey"):
        finetune(folder, tmp_path / "run", folds=2)
    finetune(folder, tmp_path / "grey", folds=2, grey=True, steps=1)


def test_a_checkpoint_of_other_dimensions_is_named(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(DataError, match="single slices and the network is 3D"):
        finetune(write_npz(tmp_path / "toy.npz"), tmp_path / "run", checkpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "mode: "),
        ({"stepps": 3}, "Did you mean steps"),
        ({"schedule": "cosine"}, "no schedule named 'cosine'"),
        ({"fit": "pad"}, "no way to fit an image to the patch named 'pad'"),
        ({"laterality": "swap-labels"}, "takes forbid or allow"),
        ({"patch_size": (20, 20)}, "--patch-size: .* multiples of"),
        ({"network": None}, "either --network NAME or --plans-from"),
        ({"modality": "XRAYS"}, "Did you mean"),
        ({"spacing": (1.0, 1.0, 1.0)}, "have no voxel size"),
        ({"overrides": ["stages=[7]"]}, "stages 0 to 3"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(write_npz(tmp_path / "toy.npz"), tmp_path / "run", **options)


def test_a_folder_of_someone_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    for options, message in (({}, "is not empty"), ({"overwrite": True}, "was not written by this command")):
        with pytest.raises(UsageError, match=message):
            finetune(write_npz(tmp_path / "toy.npz"), tmp_path / "run", **options)
    assert (tmp_path / "run" / "thesis.txt").exists()


def test_a_run_that_another_process_trains_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"kind": "classification"}')
    code = "import sys\nfrom pathlib import Path\nfrom medssl.lock import run_lock\n"
    code += f"with run_lock(Path({str(tmp_path / 'run')!r})): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="Another process is writing"):
            finetune(write_npz(tmp_path / "toy.npz"), tmp_path / "run", overwrite=True)
        assert (tmp_path / "run" / "run.json").exists()
        other.communicate()


def test_a_whole_image_is_shrunk_and_never_enlarged() -> None:
    image = np.random.default_rng(0).normal(size=(2, 10, 60, 40)).astype(np.float32)
    small, spacing = fit_image(image, (2.0, 1.0, 1.0), (8, 30, 32), (8, 30, 32), "whole")
    # Y and X share one factor, so that shapes in a slice stay; Z has its own.
    assert small.shape == (2, 8, 30, 20) and spacing == pytest.approx((2.5, 2.0, 2.0))
    same, spacing = fit_image(image, (2.0, 1.0, 1.0), (16, 64, 64), (16, 64, 64), "whole")
    assert np.array_equal(same, image) and spacing == (2.0, 1.0, 1.0)


def test_stretching_meets_the_patch_and_cropping_keeps_voxels() -> None:
    image = np.random.default_rng(0).normal(size=(1, 1, 30, 20)).astype(np.float32)
    assert fit_image(image, (1, 1, 1), (1, 16, 32), (1, 16, 32), "stretch")[0].shape == (1, 1, 16, 32)
    cropped, spacing = fit_image(image, (1, 1, 1), (1, 16, 32), (1, 20, 36), "crop")
    assert np.array_equal(cropped, image[:, :, 5:25]) and spacing == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("size", [20, 21, 33, 34, 41, 42])
def test_cropping_to_the_window_and_then_to_the_patch_is_cropping_to_the_patch(size: int) -> None:
    image = np.arange(size, dtype=np.float32).reshape(1, 1, 1, size)
    once, _ = fit_image(image, (1, 1, 1), (1, 1, 24), (1, 1, 24), "crop")
    first, _ = fit_image(image, (1, 1, 1), (1, 1, 24), (1, 1, 34), "crop")
    assert np.array_equal(place(once, (1, 1, 24), -1)[0], place(first, (1, 1, 24), -1)[0])


def test_shrinking_keeps_the_mean_and_does_not_alias() -> None:
    image = np.zeros((1, 1, 64, 64), np.float32)
    image[..., ::2] = 1
    small, _ = fit_image(image, (1, 1, 1), (1, 16, 16), (1, 16, 16), "whole")
    # Fine stripes become grey; sampled without a filter they would be all black or all white.
    assert small.mean() == pytest.approx(0.5, abs=0.02) and small.std() < 0.05


@pytest.mark.parametrize("sizes", [((5, 6, 7), (8, 8, 8)), ((9, 12, 7), (8, 8, 8)), ((8, 8, 8), (8, 8, 8))])
def test_an_image_lies_in_the_middle_of_its_window(sizes) -> None:
    shape, window = sizes
    image = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    placed, valid, first = place(image, window, -1.0)
    box = tuple(slice(low, high) for low, high in valid)
    source = tuple(slice(low + f, high + f) for (low, high), f in zip(valid, first, strict=True))
    assert np.array_equal(placed[0][box], image[0][source])
    assert (placed == -1).sum() == np.prod(window) - np.prod([high - low for low, high in valid])
    for size, edge, start in zip(shape, window, first, strict=True):
        assert abs((size - 1) / 2 - (start + (edge - 1) / 2)) <= 0.5


def test_a_patch_covers_the_median_image_up_to_a_limit() -> None:
    flat, volume = architecture("resenc-xs", 2), architecture("resenc-xs", 3)
    assert choose_patch([(1, 28, 28)] * 3, flat, None) == (32, 32)
    assert choose_patch([(1, 1000, 20)] * 3, flat, None) == (256, 24)
    assert choose_patch([(35, 50, 36)], volume, None) == (40, 56, 40)
    assert choose_patch([(3, 5, 5)], volume, None) == (16, 16, 16)
    with pytest.raises(DataError, match="are volumes and the network is 2D"):
        choose_patch([(1, 28, 28), (5, 28, 28)], flat, None)


def cases(*labels: int) -> list[Case]:
    return [Case(f"c{row}", label, f"p{row}", "train") for row, label in enumerate(labels)]


def test_every_pass_shows_each_image_once() -> None:
    order = ImageOrder(cases(0, 1, 0, 1, 1), "natural", seed=0)
    passes = [[order[sample] for sample in range(5 * p, 5 * p + 5)] for p in range(4)]
    assert all(sorted(one) == [0, 1, 2, 3, 4] for one in passes) and len({tuple(one) for one in passes}) > 1


def test_balanced_sampling_shows_each_class_equally_often_and_each_of_its_images() -> None:
    labels = (0, 0, 0, 0, 0, 0, 1, 1, 2)
    order = ImageOrder(cases(*labels), "balanced", seed=0)
    shown = [order[sample] for sample in range(3 * 12)]
    per_class = [sum(labels[row] == label for row in shown) for label in range(3)]
    assert per_class == [12, 12, 12]
    assert [shown.count(row) for row in range(9)] == [2, 2, 2, 2, 2, 2, 6, 6, 12]


def test_the_image_of_a_sample_does_not_depend_on_what_was_asked_before() -> None:
    order = ImageOrder(cases(0, 1, 0, 1, 1), "balanced", seed=3)
    forward = [order[sample] for sample in range(40)]
    other = ImageOrder(cases(0, 1, 0, 1, 1), "balanced", seed=3)
    assert [other[sample] for sample in reversed(range(40))] == forward[::-1]
    assert [ImageOrder(cases(0, 1, 0, 1, 1), "balanced", seed=4)[sample] for sample in range(40)] != forward


def test_rates_fall_from_the_head_to_the_stem_and_rise_in_the_warm_up() -> None:
    from medssl.networks.build import build_network
    from medssl.networks.classifier import Classifier
    from medssl.transfer.classification_method import Rates

    settings = ClassificationSettings(steps=10, learning_rate=1.0, layer_decay=0.5, warmup_fraction=0.2)
    rates = Rates(Classifier(build_network("resenc-xs", dimensions=2), 2, "multiclass"), settings.make_schedule())
    by_group = dict(zip([group for group, _, _ in rates.groups], rates(1), strict=True))
    assert by_group["decoder"] == 1.0 and by_group["stage_3"] == 0.5 and by_group["stem"] == 0.5**5
    assert rates(0)[0] == 0.5 and rates(9)[0] < 0.3
    still = ClassificationSettings(steps=10, learning_rate=1.0, schedule="frozen", frozen_fraction=0.5).make_schedule()
    assert set(Rates(Classifier(build_network("resenc-xs", dimensions=2), 2, "multiclass"), still)(2)[2:]) == {0.0}


def test_python_and_the_command_line_share_names() -> None:
    import inspect

    from medssl.cli.training import finetune_classification as verb

    twin = set(inspect.signature(finetune_classification).parameters) | set(ClassificationSettings.model_fields)
    assert set(inspect.signature(verb).parameters) - {"as_json"} <= twin
