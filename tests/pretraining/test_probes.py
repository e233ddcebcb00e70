"""What a pretraining looks at beside its loss, without leaving a trace in it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from medssl.errors import DataError, UsageError
from medssl.preprocessing.store import StoreWriter
from medssl.pretraining.looks import drawn_points
from medssl.pretraining.probe_settings import ProbeSettings
from medssl.pretraining.run import pretrain
from medssl.training.checkpoint import load_checkpoint
from medssl.training.metrics import read_metrics
from medssl.transfer.probe_images import read_labelled
from tests.transfer.toy_images import write_npz

SMALL = ("network=resenc-xs", "patch_size=[16,16,16]", "batch_size=2", "mask.block=4", "log_every=1", "workers=0",
         "validate_every=2", "save_every=2")  # fmt: skip
LABELLED = ("probes.kinds=[linear,knn,prototypes,segmentation]", "probes.crops=6", "probes.masks=2",
            "probes.every=2")  # fmt: skip


def write_store(folder: Path, *, masks: bool = True, count: int = 12) -> Path:
    """Write volumes with a small or a large ball of label 3, and a CSV of which it is; the last third validate."""
    writer = StoreWriter(folder / "store", {"spacing": {"mode": "median", "mm": [1, 1, 1]}, "normalisation": "none"})
    grid = np.stack(np.meshgrid(*(np.arange(20),) * 3, indexing="ij"), -1)
    lines = ["volume_id,label"]
    for number in range(count):
        large = number % 2
        ball = np.linalg.norm(grid - 9.5, axis=-1) < (4 + 4 * large)
        image = np.random.default_rng(number).normal(0, 0.3, ball.shape) + 2 * ball
        facts = {
            "spacing_mm": [1.0, 1.0, 1.0], "modality": "MR", "patient_key": f"patient{number}", "background": -1.0,
            "split": "validation" if number >= 2 * count // 3 else "train",
            "foreground": np.argwhere(ball)[:99].tolist(),
        }  # fmt: skip
        writer.add(f"volume{number:02d}", image[None].astype(np.float32), facts, 3 * ball if masks else None)
        lines.append(f"volume{number:02d},{('small', 'large')[large]}")
    writer.finish()
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "store"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("probes"))


def run(store: Path, out: Path, *overrides: str, steps: int = 4, **options: Any) -> Path:
    return pretrain("mae", store, out, overrides=[*SMALL, *overrides], steps=steps, device="cpu", quiet=True, **options)


def with_labels(store: Path) -> tuple[str, ...]:
    return (*LABELLED, f"probes.labels={store.parent / 'labels.csv'}")


@pytest.fixture(scope="module")
def looked(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN with all probes."""
    out = tmp_path_factory.mktemp("runs") / "looked"
    run(store, out, *with_labels(store))
    return out


def figures(out: Path, prefix: tuple[str, ...] = ("probe/", "quality/")) -> list[dict[str, Any]]:
    rows = [{name: value for name, value in row.items() if name.startswith(prefix)} for row in read_metrics(out)]
    return [row for row in rows if row]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["network_weights"]


def test_probes_and_quality_are_written_at_every_look(looked: Path) -> None:
    rows = [row for row in read_metrics(looked) if "probe/linear" in row]
    assert [row["step"] for row in rows] == [2, 4]
    for name in ("linear", "knn", "prototypes"):
        assert 0 <= rows[0][f"probe/{name}"] <= 1 and 0 <= rows[0][f"probe/{name}_balanced_accuracy"] <= 1
    assert 0 <= rows[0]["probe/segmentation"] <= 1
    assert {"quality/rankme", "quality/alpha", "quality/alignment", "quality/uniformity", "quality/norm",
            "quality/deviation"} <= rows[0].keys()  # fmt: skip
    assert 1 <= rows[0]["quality/rankme"] <= 6


def test_an_encoder_that_sees_the_ball_tells_its_size_and_its_voxels(looked: Path) -> None:
    last = figures(looked)[-1]
    assert last["probe/linear"] > 0.9 and last["probe/knn"] > 0.9 and last["probe/segmentation"] > 0.7


def test_weights_and_rows_are_the_same_with_and_without_probes(store: Path, looked: Path, tmp_path: Path) -> None:
    final = run(store, tmp_path / "plain", "probes.every=0")
    first, second = weights(final), weights(looked / "checkpoints" / final.name)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not figures(tmp_path / "plain")
    losses = [[row["loss"] for row in read_metrics(out)] for out in (tmp_path / "plain", looked)]
    assert losses[0] == losses[1]


def test_a_look_draws_no_random_number(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medssl.pretraining.probes import OnlineProbes

    original, states = OnlineProbes.__call__, []

    def watched(self: OnlineProbes, engine: Any, step: int) -> dict[str, float]:
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        found = original(self, engine, step)
        states.append(torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all())
        return found

    monkeypatch.setattr(OnlineProbes, "__call__", watched)
    run(store, tmp_path / "run", *with_labels(store), steps=2)
    assert states == [True]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    store: Path, looked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medssl.training import loop

    original = loop._Loop._step

    def killed(self: Any, batches: Any) -> None:
        if self.state.step == 3:
            raise KeyboardInterrupt
        original(self, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Loop, "_step", killed)
        run(store, tmp_path / "run", *with_labels(store))
    final = run(store, tmp_path / "run", *with_labels(store), resume=True)
    first, second = weights(final), weights(looked / "checkpoints" / final.name)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert figures(tmp_path / "run") == figures(looked)


def test_no_path_of_labels_stands_in_a_run_and_they_are_asked_for_on_resume(
    store: Path, looked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert str(store.parent) not in (looked / "recipe.yaml").read_text()
    kept = yaml.safe_load((looked / "recipe.yaml").read_text())["probes"]
    assert kept["cases"] == 64 and kept["every"] == 2
    pretrain(None, store, looked, resume=True, device="cpu", quiet=True)
    assert "give probes.labels" in caplog.text


def test_looks_have_their_own_interval(store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "run", "probes.every=3", "probes.crops=4")
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "quality/rankme" in row] == [3, 4]


def test_the_interval_grows_with_what_is_looked_at() -> None:
    # 32 crops and two views of 16 of them are 64 passes: at seven samples each, 112 steps of batch 4 pay for them.
    assert ProbeSettings().interval(120, 4) == 120
    assert ProbeSettings().interval(50, 4) == 150
    assert ProbeSettings(labels=Path("x.csv")).interval(120, 4) == 360
    assert ProbeSettings(labels=Path("x.csv")).interval(120, 64) == 120
    assert ProbeSettings(crops=0, kinds=("segmentation",)).interval(10, 4) == 60


def test_a_medmnist_file_is_a_probe_of_a_pretraining_on_pictures(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "toy.npz", train=30, validation=20)
    writer = StoreWriter(
        tmp_path / "store", {"spacing": {"mode": "native", "mm": None}, "normalisation": "by-modality"}
    )
    for number in range(4):
        image = np.random.default_rng(number).normal(size=(1, 1, 16, 16)).astype(np.float32)
        facts = {"spacing_mm": [1.0] * 3, "modality": "XR", "patient_key": str(number), "split": "train",
                 "background": -1.0, "foreground": []}  # fmt: skip
        writer.add(f"image{number}", image, facts)
    writer.finish()
    given = ("patch_size=[16,16]", "validate_every=0", "probes.every=2", f"probes.labels={path}", "probes.cases=16",
             "probes.crops=0")  # fmt: skip
    run(tmp_path / "store", tmp_path / "run", *given, steps=2, read_labelled=read_labelled)
    (found,) = figures(tmp_path / "run")
    assert found["probe/linear"] > 0.6 and not [name for name in found if name.startswith("quality/")]
    with pytest.raises(UsageError, match="read_labelled"):
        run(tmp_path / "store", tmp_path / "other", *given, steps=2)


def test_a_probe_of_masks_needs_masks(tmp_path: Path) -> None:
    bare = write_store(tmp_path, masks=False, count=3)
    with pytest.raises(DataError, match="no mask"):
        run(bare, tmp_path / "run", "validate_every=0", "probes.kinds=[segmentation]", steps=2)


def test_drawn_voxels_hold_every_class_of_their_mask_and_are_the_same_each_time() -> None:
    masks = torch.zeros(2, 6, 6, 6, dtype=torch.int64)
    masks[0, 0, 0, 0], masks[1, 2:4] = 1, 2
    first, second = drawn_points(masks, 3, 40), drawn_points(masks, 3, 40)
    for number, points in enumerate(first):
        assert torch.equal(points, second[number])
        assert set(masks[number][tuple(points.T)].tolist()) == set(masks[number].unique().tolist())


def test_features_that_are_no_numbers_are_null_and_not_an_error(store: Path) -> None:
    from medssl.data.target_files import read_targets
    from medssl.networks.build import build_network
    from medssl.networks.encoder import Encoder
    from medssl.pretraining.looks import LabelledCrops, LabelledImages, LabelledLook, VoxelLook

    network = build_network("resenc-xs", dimensions=3, seed=0)
    with torch.no_grad():
        next(iter(network.parameters())).fill_(math.nan)
    targets = read_targets(store, labels=store.parent / "labels.csv")
    images = torch.zeros(len(targets.cases), 1, 16, 16, 16)
    encoder, cpu = Encoder(network.eval()), torch.device("cpu")
    masks = torch.zeros(1, 16, 16, 16, dtype=torch.int64)
    crops = LabelledCrops(images[:1], masks)
    with torch.no_grad():
        found = LabelledLook(LabelledImages(images, targets), ("linear",)).figures(encoder, cpu)
        found |= VoxelLook(crops, crops, drawn_points(masks, 2, 10), 2).figures(encoder, cpu)
    assert all(math.isnan(value) for value in found.values()) and len(found) == 3
