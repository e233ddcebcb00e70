"""All folds of a classification in one command, and their ensemble."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from medssl.data.probabilities import read_probabilities
from medssl.errors import CheckpointError, DataError, UsageError
from medssl.evaluation.classification import evaluate_classification
from medssl.inference.predict import predict
from medssl.training.checkpoint import load_checkpoint, newest_intact
from medssl.training.scores import classification_metrics
from tests.transfer.toy_images import finetune, write_npz, write_pictures

OPTIONS: dict[str, Any] = {"folds": 3, "steps": 2, "mode": "linear"}


@pytest.fixture(scope="module", autouse=True)
def own_key(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSSL_KEY_FILE", str(tmp_path_factory.mktemp("key") / "key"))
        yield


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_npz(tmp_path_factory.mktemp("npz") / "toy.npz", train=14, validation=10)


@pytest.fixture(scope="module")
def trained(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RUN of three folds."""
    return finetune(npz, tmp_path_factory.mktemp("runs") / "folds", **OPTIONS)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(newest_intact(run / "checkpoints"))["medssl"]["head"]


def test_every_case_validates_once_with_the_probabilities_of_its_fold(trained: Path) -> None:
    whole = read_probabilities(trained / "validation" / "probabilities.csv")
    assert len(whole.cases) == 24 == len(set(whole.cases)), "training and validation; the split test stays out"
    rows = dict(zip(whole.cases, whole.values, strict=True))
    for number in range(3):
        part = read_probabilities(trained / f"fold_{number}" / "validation" / "probabilities.csv")
        assert all(np.array_equal(rows[case], values) for case, values in zip(part.cases, part.values, strict=True))


def test_a_fold_is_what_is_trained_alone(trained: Path, npz: Path, tmp_path: Path) -> None:
    alone = finetune(npz, tmp_path / "alone", cache=trained / "images", fold=1, **OPTIONS)
    first, second = weights(alone), weights(trained / "fold_1")
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_out_of_fold_metrics_have_intervals_and_each_fold_its_own(trained: Path) -> None:
    result = evaluate_classification(trained)
    assert len(result.cases) == 24 and result.metrics["auroc"].low <= result.metrics["auroc"].value
    summary = json.loads((trained / "folds.json").read_text())
    assert [row["cases"] for row in summary["folds"]] == [8, 8, 8]
    part = read_probabilities(trained / "fold_2" / "validation" / "probabilities.csv")
    truth = np.array([part.classes.index(name) for name in part.targets])
    expected = classification_metrics(part.values, truth, "multiclass")["accuracy"]
    assert summary["folds"][2]["metrics"]["accuracy"] == pytest.approx(expected)
    column = [row["metrics"]["accuracy"] for row in summary["folds"]]
    assert summary["over_folds"]["accuracy"]["mean"] == pytest.approx(np.mean(column))
    assert summary["over_folds"]["accuracy"]["deviation"] == pytest.approx(np.std(column, ddof=1))


def test_test_cases_and_new_images_get_the_mean_over_the_folds(trained: Path, tmp_path: Path) -> None:
    parts = [read_probabilities(trained / f"fold_{n}" / "test" / "probabilities.csv").values for n in range(3)]
    mean = read_probabilities(trained / "test" / "probabilities.csv").values
    assert np.allclose(mean, np.mean(parts, axis=0), atol=1e-8) and not np.allclose(parts[0], parts[1])
    folder = write_pictures(tmp_path / "pictures", count=2)
    run = finetune(folder, tmp_path / "run", grey=True, modality="US", **{**OPTIONS, "folds": 2})
    found = [
        predict(model, folder, tmp_path / f"out{number}", device="cpu", quiet=True).rows
        for number, model in enumerate((run, run / "fold_0", run / "fold_1"))
    ]
    for (_, both), (_, first), (_, second) in zip(*found, strict=True):
        assert both == pytest.approx((first + second) / 2)


def test_an_interrupted_run_goes_on_with_the_fold_it_was_in(
    npz: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medssl.training import loop

    original, steps = loop._Loop._step, []

    def killed(self: Any, batches: Any) -> None:
        steps.append(self.job.run.name)
        if len(steps) == 4:
            raise KeyboardInterrupt
        original(self, batches)

    given = {"cache": trained / "images", **OPTIONS}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Loop, "_step", killed)
        finetune(npz, tmp_path / "run", **given)
    assert steps == ["fold_0", "fold_0", "fold_1", "fold_1"]
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    with pytest.raises(CheckpointError, match="--resume"):
        predict(tmp_path / "run", npz, tmp_path / "out", device="cpu", quiet=True)
    monkeypatch.setattr(loop._Loop, "_step", lambda self, b: (steps.append(self.job.run.name), original(self, b))[1])
    del steps[:]
    run = finetune(npz, tmp_path / "run", resume=True, **given)
    assert "fold_0" not in steps and "fold_2" in steps
    for name in ("validation/probabilities.csv", "test/probabilities.csv", "folds.json"):
        assert (run / name).read_bytes() == (trained / name).read_bytes()


def test_a_run_of_folds_is_resumed_as_what_it_is(trained: Path, npz: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="with 3 folds, not with 4"):
        finetune(npz, trained, resume=True, **{**OPTIONS, "folds": 4})
    with pytest.raises(UsageError, match="leave --fold away"):
        finetune(npz, trained, resume=True, fold=0, **OPTIONS)
    shutil.copytree(trained / "fold_0", tmp_path / "single")
    with pytest.raises(UsageError, match="as a single run"):
        finetune(npz, tmp_path / "single", resume=True, **OPTIONS)
    assert yaml.safe_load((trained / "recipe.yaml").read_text())["fold"] is None


def test_a_finished_run_stays_finished_when_it_is_resumed_with_other_settings(trained: Path, npz: Path) -> None:
    with pytest.raises(UsageError, match="steps"):
        finetune(npz, trained, resume=True, cache=trained / "images", **{**OPTIONS, "steps": 3})
    assert json.loads((trained / "run.json").read_text())["finished"]


def test_what_cannot_be_used_leaves_nothing(npz: Path, tmp_path: Path) -> None:
    with np.load(npz) as content:
        broken = {name: content[name] for name in content}
    broken["train_images"] = broken["train_images"].astype(np.float32)
    broken["train_images"][1] = np.nan
    np.savez(tmp_path / "broken.npz", **broken)
    with pytest.raises(DataError, match=r"train_images\[1\]"):
        finetune(tmp_path / "broken.npz", tmp_path / "run", **OPTIONS)
    with pytest.raises(UsageError, match="at least 2 folds"):
        finetune(npz, tmp_path / "run", **{**OPTIONS, "folds": 1})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rare", "balance", "told"), [(3, "none", True), (8, "none", False), (3, "weights", False)])
def test_unequal_classes_are_told_of_while_nothing_is_done_about_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rare: int, balance: str, told: bool
) -> None:
    path = write_npz(tmp_path / "toy.npz", train=24, validation=6)
    with np.load(path) as content:
        changed = {name: content[name] for name in content}
    keep = np.sort(np.concatenate([np.flatnonzero(changed["train_labels"][:, 0] == 1),
                                   np.flatnonzero(changed["train_labels"][:, 0] == 0)[:rare]]))  # fmt: skip
    for name in ("train_images", "train_labels"):
        changed[name] = changed[name][keep]
    np.savez(path, **changed)
    with caplog.at_level(logging.WARNING):
        finetune(path, tmp_path / "run", steps=1, mode="linear", balance=balance, quiet=False)
    assert ("--balance weights" in caplog.text) == told
    if told:
        assert "0: 3, 1: 12" in caplog.text
