"""Semi-supervised classification from labelled and other images to a classifier that the other verbs take."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.data.probabilities import read_probabilities
from medssl.errors import UsageError
from medssl.inference.predict import predict
from medssl.semisupervised.classification import semisupervise_classification
from medssl.training.checkpoint import load_checkpoint, newest_intact
from medssl.training.engine import Engine
from tests.transfer.toy_images import toy_image, write_npz, write_pictures

FAST: dict[str, Any] = {
    "network": "resenc-xs", "patch_size": (16, 16), "steps": 4, "val_every": 2, "batch_size": 4, "modality": "MR",
    "device": "cpu", "workers": 0, "quiet": True, "labelled": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like MedMNIST's."""
    return write_npz(tmp_path_factory.mktemp("npz") / "toy.npz")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared images that runs share."""
    return tmp_path_factory.mktemp("cache")


def train(method: str, dataset: Path, out: Path, cache: Path, *overrides: str, **changes: Any) -> Path:
    """Train a few steps with eight labelled images."""
    return semisupervise_classification(method, dataset, None, out, overrides=overrides, cache=cache, **FAST | changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return encoder and head of a finished run."""
    content = load_checkpoint(newest_intact(run / "checkpoints"))
    return {**content["network_weights"], **{f"head.{name}": v for name, v in content["medssl"]["head"].items()}}


def same(first: Path, second: Path) -> bool:
    """Tell whether two runs ended with the same weights, bit for bit."""
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_toy_problem_is_learned_and_new_images_are_predicted(npz: Path, cache: Path, tmp_path: Path) -> None:
    run = train("mean-teacher", npz, tmp_path / "run", cache, steps=40, val_every=20, learning_rate=3e-3)
    table = read_probabilities(run / "validation" / "probabilities.csv")
    truth = np.array([int(target) for target in table.targets or ()])
    assert (table.values.argmax(axis=1) == truth).mean() > 0.8
    recipe = (run / "recipe.yaml").read_text()
    assert "method: mean-teacher" in recipe
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(toy_image(1, 5, (16, 16))).save(images / "new.png")
    predict(run, images, tmp_path / "out", device="cpu", quiet=True)
    assert (tmp_path / "out" / "probabilities.csv").is_file()


def test_with_weight_zero_a_run_equals_the_supervised_one_bit_for_bit(npz: Path, cache: Path, tmp_path: Path) -> None:
    control = train("supervised", npz, tmp_path / "control", cache)
    zero = train("mean-teacher", npz, tmp_path / "zero", cache, "unlabelled.weight=0", "predict_with=student")
    assert same(control, zero)
    one = train("mean-teacher", npz, tmp_path / "one", cache, "unlabelled.fraction=0", "predict_with=student")
    assert not same(control, one)


@pytest.mark.parametrize("method", ["mean-teacher", "semixup", "cps"])
def test_a_killed_run_goes_on_bit_for_bit(
    method: str, npz: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(method, npz, tmp_path / "whole", cache)
    original = Engine.step

    def failing(self: Engine, now: Any, parts: Any) -> Any:
        if now.index == 3:
            raise OSError("the machine failed")
        return original(self, now, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", failing)
        with pytest.raises(OSError, match="the machine failed"):
            train(method, npz, tmp_path / "killed", cache)
    assert same(whole, train(method, npz, tmp_path / "killed", cache, resume=True))


def test_images_of_another_data_set_are_learnt_from_without_a_class(
    npz: Path, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = tmp_path / "others.npz"
    with np.load(npz) as content:
        labelled, validation = content["train_images"], content["val_images"]
    made = np.stack([toy_image(number % 2, 5000 + number, (16, 16)) for number in range(6)])
    np.savez(others, train_images=made)
    run = train("fixmatch", npz, tmp_path / "run", cache, unlabelled=others, labelled=None)
    assert json.loads((run / "run.json").read_text())["finished"]
    np.savez(others, train_images=np.concatenate([made, labelled[:1]]))
    with caplog.at_level(logging.WARNING):
        train("fixmatch", npz, tmp_path / "twice", cache, unlabelled=others, labelled=None)
    assert "left out of the unlabelled images" in caplog.text
    np.savez(others, train_images=np.concatenate([made, validation[:1]]))
    with pytest.raises(UsageError, match="must not be learnt from"):
        train("fixmatch", npz, tmp_path / "leak", cache, unlabelled=others, labelled=None)


def test_what_does_not_fit_is_refused_before_training(npz: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no unlabelled images"):
        train("mean-teacher", npz, tmp_path / "run", cache, labelled=None)
    with pytest.raises(UsageError, match="Every training image is labelled"):
        train("mean-teacher", npz, tmp_path / "run", cache, labelled=24)
    with pytest.raises(UsageError, match="bcp is for segmentation"):
        train("bcp", npz, tmp_path / "run", cache)
    with pytest.raises(UsageError, match="one class an image"):
        train("mean-teacher", npz, tmp_path / "run", cache, kind="ordinal")
    with pytest.raises(UsageError, match="balance sampling"):
        train("mean-teacher", npz, tmp_path / "run", cache, balance="weights")
    pictures = write_pictures(tmp_path / "pictures")
    with pytest.raises(UsageError, match="of 3 channels"):
        train("mean-teacher", npz, tmp_path / "run", cache, unlabelled=pictures)
    assert not (tmp_path / "run").exists()
