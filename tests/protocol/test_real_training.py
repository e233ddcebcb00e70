"""The protocol from end to end with real training: a tiny segmentation and a tiny classification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medssl.data.probabilities import read_probabilities
from medssl.data.target_files import read_targets
from medssl.data.targets import draw_labelled
from medssl.protocol.classification import Classification
from medssl.protocol.division import divide
from medssl.protocol.recipe import DatasetSettings
from medssl.protocol.run import protocol
from tests.transfer.conftest import MakeDataset, make_dataset

__all__ = ["make_dataset"]

MAE = {"method": "mae", "network": "resenc-xs", "batch_size": 2, "steps": 2, "mask": {"block": 4, "ratio": 0.5}}
CPU: dict[str, Any] = {"device": "cpu", "workers": 0, "quiet": True}


def written(folder: Path, values: dict[str, Any], patch: list[int]) -> Path:
    """Write a recipe and that of its pretraining."""
    folder.mkdir()
    (folder / "mae.yaml").write_text(yaml.safe_dump({**MAE, "patch_size": patch}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def images(tmp_path: Path) -> Path:
    """A .npz of noisy images with a bright or a dark spot, split by the set itself."""
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {}
    for part, count in (("train", 40), ("val", 12)):
        labels = np.arange(count) % 2
        pictures = rng.integers(80, 120, (count, 16, 16))
        pictures[:, 5:11, 5:11] += (np.where(labels, 80, -60))[:, None, None]
        content |= {f"{part}_images": pictures.astype(np.uint8), f"{part}_labels": labels[:, None].astype(np.uint8)}
    np.savez(tmp_path / "spots.npz", **content)
    return tmp_path / "spots.npz"


@pytest.mark.slow
def test_segmentation_from_pretraining_to_the_page(make_dataset: MakeDataset, tmp_path: Path) -> None:
    values = {
        "datasets": {"balls": {"task": "segmentation", "path": str(make_dataset(cases=7)), "validation": 2,
                               "selection": 1}},
        "arms": {"pretrained": {"pretrain": "mae.yaml"}, "encoder": {"same": "pretrained", "transfer_decoder": False}},
        "labels": [1, 2], "seeds": [0], "rates": [0.003, 0.01],
        "training": {"steps": 2, "patch_size": [24, 24, 24]},
    }  # fmt: skip
    recipe = written(tmp_path / "recipes", values, [24, 24, 24])
    results = protocol(recipe, tmp_path / "out", **CPU)
    assert len(results.rows) == 8 and len(results.differences) == 10 and not results.missing
    runs = tmp_path / "out" / "runs" / "balls"
    settings = {
        folder.name.split("_")[0]: yaml.safe_load((folder / "recipe.yaml").read_text()) for folder in runs.iterdir()
    }
    assert settings["strong"]["augmentation"] == "medssl-strong" and settings["scratch"]["augmentation"] == "nnunet"
    assert settings["scratch"]["checkpoint"] is None and settings["encoder"]["transfer_decoder"] is False
    parts = json.loads((tmp_path / "out" / "splits" / "balls.json").read_text())["parts"]
    store = tmp_path / "out" / "pretraining" / "balls" / "pool_median" / "store"
    seen = {path.name.removesuffix(".b2nd") for path in store.glob("*.b2nd")}
    assert seen == set(parts["pool"]), "pretraining saw the pool, without labels and without other cases"
    before = (tmp_path / "out" / "results.json").read_bytes()
    (tmp_path / "out" / "scores" / "balls" / "scratch_0001_seed0_rate0.01.json").unlink()
    protocol(None, tmp_path / "out", resume=True, **CPU)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_classification_by_the_same_command(tmp_path: Path) -> None:
    values = {
        "datasets": {"spots": {"task": "classification", "path": str(images(tmp_path)), "validation": "given",
                               "selection": 10}},
        "arms": {"pretrained": {"pretrain": {"recipe": "mae.yaml", "spacing": "native"}}},
        "labels": ["20%", "all"], "seeds": [0, 1], "rates": [0.001, 0.01],
        "training": {"steps": 3, "batch_size": 4, "patch_size": [16, 16]},
    }  # fmt: skip
    results = protocol(written(tmp_path / "recipes", values, [16, 16]), tmp_path / "out", **CPU)
    assert [row.labels for row in results.rows] == [6] * 3 + [30] * 3 and not results.missing
    assert all(row.paired.test == "bootstrap" for row in results.differences)
    parts = json.loads((tmp_path / "out" / "splits" / "spots.json").read_text())
    assert parts["parts"]["validation"] == [f"val-{number:06d}" for number in range(12)]
    run = next((tmp_path / "out" / "runs" / "spots").glob("scratch_0006_seed1_*"))
    assert json.loads((run / "data.json").read_text())["counts"]["train"] == 6
    strong = yaml.safe_load((next(run.parent.glob("strong_*")) / "recipe.yaml").read_text())
    assert strong["augmentation"]["policy"].endswith("strong.yaml")
    # One temperature for all cases: they are reported in the order in which the classifier put them.
    for folder in run.parent.iterdir():
        score = json.loads((tmp_path / "out" / "scores" / "spots" / f"{folder.name}.json").read_text())
        reported = np.concatenate([score[part]["probabilities"] for part in ("selection", "validation")])
        plain, odds = (
            np.sort(np.log(values[:, 1] / values[:, 0]))
            for values in (read_probabilities(folder / "validation" / "uncalibrated.csv").values, reported)
        )
        assert plain * (odds @ plain) / (plain @ plain) == pytest.approx(odds, rel=1e-3, abs=1e-5 * np.abs(odds).max())


@pytest.mark.slow
def test_semi_supervised_arms_and_their_controls_train_in_one_loop(make_dataset: MakeDataset, tmp_path: Path) -> None:
    arm = {"checkpoint": "none", "semisupervised": {"method": "mean-teacher", "settings": {"noise": 0.2}}}
    values = {
        "datasets": {
            "balls": {"task": "segmentation", "path": str(make_dataset(cases=7)), "validation": 2, "selection": 0,
                      "training": {"patch_size": [16, 16, 16]}},
            "spots": {"task": "classification", "path": str(images(tmp_path)), "validation": "given",
                      "selection": 10, "training": {"patch_size": [16, 16], "modality": "MR"}},
        },
        "arms": {"teacher": arm}, "labels": [2], "seeds": [0], "rates": [0.003],
        "training": {"steps": 2, "batch_size": 2, "trainer": "paired", "network": "resenc-xs"},
    }  # fmt: skip
    results = protocol(written(tmp_path / "recipes", values, [16, 16, 16]), tmp_path / "out", **CPU)
    assert len(results.rows) == 6 and not results.missing
    for dataset in ("balls", "spots"):
        found = {}
        for folder in (tmp_path / "out" / "runs" / dataset).iterdir():
            found[folder.name.split("_")[0]] = yaml.safe_load((folder / "recipe.yaml").read_text())["semisupervised"]
        assert {name: each["method"] for name, each in found.items()} == {
            "teacher": "mean-teacher", "scratch": "supervised", "strong": "supervised",
        }  # fmt: skip
        assert found["teacher"]["noise"] == 0.2
        policies = [found[name]["labelled_policy"] for name in ("teacher", "scratch", "strong")]
        assert policies == ["fine-tuning", "fine-tuning", "strong"]
    balls = [row for row in results.rows if row.dataset == "balls"]
    assert all({"dice", "dice_largest_part", "assd_mm"} <= set(row.values) for row in balls)
    links = (tmp_path / "out" / "runs" / "balls").glob("teacher_*/streams/unlabelled/*/u*.b2nd")
    assert len(list(links)) == 3, "the rest of the pool"


@pytest.mark.parametrize("source", ["npz", "csv"])
def test_the_run_learns_from_the_cases_that_the_protocol_drew(tmp_path: Path, source: str) -> None:
    path = images(tmp_path)
    if source == "csv":
        path = as_csv(path, tmp_path / "pictures")
    task = Classification(DatasetSettings(task="classification", path=path, validation=12, selection=10))
    division = divide(task.cases(), task.settings, "here")
    derived = task._derived(division)
    dataset, labels = task._write(derived, tmp_path / "cache")
    again = read_targets(dataset, labels=labels, **task._kind, ignore_unlabelled=True)
    names = {ours.name: theirs.name for ours, theirs in zip(again.cases, derived.cases, strict=True)}
    for seed in (0, 1):
        drawn = draw_labelled(again, 8, seed).of("train")
        assert sorted(names[case.name] for case in drawn) == task.labelled(division, 8, seed)
    assert [case.target for case in again.cases] == [case.target for case in derived.cases]
    assert {names[case.name] for case in again.of("validation")} == {*division.selection, *division.validation}


def as_csv(npz: Path, folder: Path) -> Path:
    """Write the images of a .npz as files, two of each patient, with a CSV."""
    from PIL import Image

    folder.mkdir()
    lines = ["path,label,patient"]
    with np.load(npz) as content:
        for number, (picture, label) in enumerate(
            zip(content["train_images"], content["train_labels"].ravel(), strict=True)
        ):
            Image.fromarray(picture).save(folder / f"{number}.png")
            lines.append(f"{number}.png,{'yes' if label else 'no'},patient{number // 2}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder / "labels.csv"
