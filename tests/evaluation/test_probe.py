"""`medssl evaluate probe`: heads on frozen features of labelled data sets and stores."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.data.probabilities import read_probabilities
from medssl.data.targets import Case, Targets
from medssl.errors import DataError, UsageError
from medssl.evaluation.probe import evaluate_probe, probe_features
from medssl.evaluation.segmentation_probe import dice_of, evaluate_segmentation_probe
from medssl.evaluation.stage_head import StageHead, segmentation_loss
from medssl.inference.embedding import Embeddings
from medssl.preprocessing.store import Store
from tests.inference.tiny_encoders import write_encoder
from tests.preprocessing.stores import make_store


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes that lie or stand, of both classes equally bright."""
    rng = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 24), ("val", 12), ("test", 12)):
        labels = np.arange(count) % 2
        wave = np.sin(np.arange(16) * math.pi / 2)
        stripes = np.where(labels[:, None, None] > 0, wave[None, None], wave[None, :, None])
        content[f"{part}_images"] = np.clip(128 + 50 * stripes + 25 * rng.normal(size=(count, 16, 16)), 0, 255).astype(
            np.uint8
        )
        content[f"{part}_labels"] = labels[:, None].astype(np.uint8)
    path = tmp_path_factory.mktemp("images") / "stripes.npz"
    np.savez(path, **content)
    return path


@pytest.fixture(scope="module")
def flat_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "step_00000001.pth", dimensions=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders3") / "step_00000001.pth")


def made(n: int = 60, apart: float = 3.0, splits: tuple[str, ...] = ("train", "train", "validation")) -> tuple:
    rng = np.random.default_rng(0)
    t = np.arange(n) % 2
    x = (apart * t[:, None] * np.ones(4) + rng.normal(size=(n, 4))).astype(np.float32)
    cases = tuple(Case(f"c{i}", int(t[i]), f"p{i}", splits[i // 2 % len(splits)]) for i in range(n))
    return Embeddings(tuple(case.name for case in cases), x), Targets("multiclass", ("a", "b"), cases)


def test_a_data_set_of_images_is_probed_and_written_down(images: Path, flat_encoder: Path, tmp_path: Path) -> None:
    result = evaluate_probe(flat_encoder, images, tmp_path / "out", shots=(1, 4), device="cpu", quiet=True)
    assert (result.reported, result.counts) == ("test", {"train": 24, "validation": 12, "test": 12})
    assert result.outcomes["linear"]["trained"].result.metrics["auroc"].value > 0.9
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert written["chosen_on"] == "validation"
    assert set(written["probes"]) == {"linear", "knn"} and [row["shots"] for row in written["few_shot"]] == [1, 4]
    table = read_probabilities(tmp_path / "out" / "linear_trained.csv")
    assert len(table.cases) == 12 and set(table.targets) == {"0", "1"}
    for path in (tmp_path / "out").iterdir():
        assert str(images.parent) not in path.read_text()


def test_the_reported_cases_choose_and_teach_nothing() -> None:
    embeddings, targets = made(splits=("train", "train", "validation", "test"))
    rng = np.random.default_rng(1)
    reported = np.array([case.split == "test" for case in targets.cases])
    other = replace(embeddings, features=np.where(reported[:, None], rng.normal(size=(60, 4)), embeddings.features))
    for name in ("linear", "knn"):
        first, second = (probe_features({"trained": each}, targets, probes=[name]) for each in (embeddings, other))
        assert first.outcomes[name]["trained"].setting == second.outcomes[name]["trained"].setting
    assert first.reported == "test" and second.outcomes["knn"]["trained"].result.metrics["auroc"].value < 0.9


def test_without_a_test_split_validation_is_reported_and_folds_choose() -> None:
    embeddings, targets = made()
    result = probe_features({"trained": embeddings}, targets)
    assert result.reported == "validation"
    assert result.to_json()["chosen_on"] == "folds of the training patients"
    assert result.outcomes["linear"]["trained"].result.metrics["auroc"].value > 0.95


def test_differences_are_trained_minus_untrained_on_the_same_cases() -> None:
    good, targets = made()
    noise = replace(good, features=np.random.default_rng(3).normal(size=(60, 4)).astype(np.float32))
    result = probe_features({"trained": good, "untrained": noise}, targets, shots=(2,))
    assert result.differences["linear"]["auroc"].low > 0
    assert result.few_shot[0]["difference/auroc"].low > 0
    back = probe_features({"trained": noise, "untrained": good}, targets, shots=(2,))
    assert back.differences["linear"]["auroc"].value == pytest.approx(-result.differences["linear"]["auroc"].value)


def test_more_shots_than_cases_are_left_out_and_several_labels_have_no_prototypes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    embeddings, targets = made()
    assert [row["shots"] for row in probe_features({"trained": embeddings}, targets, shots=(1, 99)).few_shot] == [1]
    several = replace(
        targets,
        kind="multilabel",
        cases=tuple(replace(case, target=(case.target, 1 - case.target)) for case in targets.cases),
    )
    with caplog.at_level(logging.WARNING):
        result = probe_features({"trained": embeddings}, several)
    assert result.few_shot == [] and "left out" in caplog.text
    assert result.outcomes["linear"]["trained"].result.metrics["auroc"].value > 0.95


def test_unusable_features_and_splits_are_refused() -> None:
    embeddings, targets = made()
    broken = replace(embeddings, features=embeddings.features.copy())
    broken.features[5] = math.nan
    with pytest.raises(DataError, match="not numbers: c5"):
        probe_features({"trained": broken}, targets)
    with pytest.raises(DataError, match="needs training cases and validation or test"):
        probe_features(
            {"trained": embeddings}, targets.with_cases(replace(case, split="train") for case in targets.cases)
        )


def test_a_probe_that_does_not_exist_is_named(images: Path, flat_encoder: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean linear"):
        evaluate_probe(flat_encoder, images, probes=["liner"])
    with pytest.raises(UsageError, match="shots of at least 1"):
        evaluate_probe(flat_encoder, images, shots=[0])


def test_the_stage_head_is_one_linear_map_of_all_stages_upsampled() -> None:
    torch.manual_seed(0)
    stages = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    head = StageHead([3, 5], 4)
    for layer in head.layers:
        torch.nn.init.normal_(layer.weight)
    head.fit_scale([stages])
    normal = [(s - s.mean((0, 2, 3), keepdim=True)) / s.std((0, 2, 3), correction=0, keepdim=True) for s in stages]
    up = torch.nn.functional.interpolate(normal[1], size=(8, 8), mode="bilinear", align_corners=False)
    weight = torch.cat([layer.weight for layer in head.layers], dim=1)
    expected = torch.einsum("kc,bcyx->bkyx", weight, torch.cat([normal[0], up], dim=1))
    torch.testing.assert_close(head(stages, (8, 8)), expected + head.layers[0].bias[:, None, None])


def test_the_loss_falls_to_nothing_for_a_perfect_answer_and_dice_is_by_hand() -> None:
    label = torch.tensor([[[0, 1], [2, 1]]])
    perfect = 50.0 * torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    assert segmentation_loss(perfect, label).item() == pytest.approx(0, abs=1e-6)
    assert segmentation_loss(-perfect, label).item() > 10
    a, b = np.array([1, 1, 0, 0], bool), np.array([1, 0, 0, 0], bool)
    assert dice_of(a, b) == pytest.approx(2 / 3)
    assert math.isnan(dice_of(~np.ones(3, bool), np.zeros(3, bool)))


def test_a_store_with_labels_is_probed_for_segmentation(encoder: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", n=6, shape=(18, 20, 17), labels=True)
    result = evaluate_segmentation_probe(
        encoder, store.folder, tmp_path / "out", steps=40, batch_size=2, device="cpu", quiet=True
    )
    written = json.loads((tmp_path / "out" / "segmentation_probe.json").read_text())
    assert set(written["dice"]["trained"]) == {"all labels", "label 1", "label 2"}
    assert set(written["cases"]["trained"]["label 1"]) == {"volume_05"}
    # All foreground would score 0.02.
    assert result.mean("trained").mean > 0.15
    again = evaluate_segmentation_probe(encoder, store.folder, steps=40, batch_size=2, device="cpu", quiet=True)
    assert again.dice == result.dice


def test_the_segmentation_probe_leaves_the_encoder_as_it_was(encoder: Path, tmp_path: Path) -> None:
    from medssl.evaluation.segmentation_probe import _train
    from medssl.inference.frozen import load_frozen

    store = make_store(tmp_path / "store", n=3, shape=(16, 16, 16), labels=True)
    frozen = load_frozen(encoder)
    before = {name: value.clone() for name, value in frozen.encoder.unet.state_dict().items()}
    head = _train(frozen, store, [1, 2], "all", 3, 2, 0.01, 0, "trained", True)
    assert any(float(layer.weight.detach().abs().max()) > 0 for layer in head.layers)
    for name, value in frozen.encoder.unet.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_store_without_a_validation_split_is_divided_by_patient(encoder: Path, tmp_path: Path) -> None:
    from medssl.data.label_split import with_validation

    store = make_store(tmp_path / "store", n=40, shape=(4, 4, 4), labels=True)
    divided = with_validation(store.with_splits(dict.fromkeys(store.ids, "train")))
    patients = [{str(divided.row(name)["patient_key"]) for name in divided.ids_of(s)} for s in ("train", "validation")]
    assert patients[0] and patients[1] and not patients[0] & patients[1]
    unlabelled = make_store(tmp_path / "bare", n=3, shape=(16, 16, 16))
    assert isinstance(unlabelled, Store)
    with pytest.raises(DataError, match="needs labelled volumes in both splits"):
        evaluate_segmentation_probe(encoder, unlabelled.folder)


def test_a_divided_store_keeps_its_test_volumes_and_both_other_splits_have_patients(tmp_path: Path) -> None:
    from medssl.data.label_split import with_validation

    store = make_store(tmp_path / "store", n=40, shape=(4, 4, 4), labels=True)
    for first in range(0, 40, 4):
        kept = set(store.ids[first : first + 4])  # two patients
        few = with_validation(store.with_splits({name: "train" if name in kept else "test" for name in store.ids}))
        assert set(few.ids_of("test")) == set(store.ids) - kept
        assert len(few.ids_of("train")) == len(few.ids_of("validation")) == 2
    one = set(store.ids[:2])
    alone = with_validation(store.with_splits({name: "train" if name in one else "test" for name in store.ids}))
    assert set(alone.ids_of("train")) == one
    none = with_validation(store.with_splits(dict.fromkeys(store.ids, "test")))
    assert none.ids_of("test") == store.ids
