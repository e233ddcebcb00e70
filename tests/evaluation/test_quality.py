"""`medssl evaluate quality`: figures of an encoder on a store, beside those of the untrained network."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from medssl.errors import UsageError
from medssl.evaluation.quality import evaluate_quality, figures_of_views, judge
from medssl.inference.frozen import load_frozen
from medssl.inference.views import view_features
from medssl.inference.volumes import volumes_of_store
from medssl.training.checkpoint import load_checkpoint, save_checkpoint
from tests.inference.tiny_encoders import write_encoder
from tests.preprocessing.stores import make_store


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoders") / "step_00000001.pth")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("stores") / "store", n=8, shape=(16, 17, 16)).folder


def test_a_sound_encoder_is_written_down_as_such(encoder: Path, store: Path, tmp_path: Path) -> None:
    result = evaluate_quality(encoder, store, tmp_path, views=2, device="cpu", quiet=True)
    assert result.verdict.state == "healthy", str(result.verdict)
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written["figures"]["samples"] == 8 and written["figures"]["dimensions"] == 8
    assert 1 <= written["figures"]["lidar"] <= 8 and 0 <= written["figures"]["alignment"] <= 4
    assert written["untrained"]["centred_rank"] != written["figures"]["centred_rank"]
    assert str(store) not in (tmp_path / "quality.json").read_text()


def test_an_encoder_of_zeros_is_a_collapse_and_not_the_datas_fault(encoder: Path, store: Path, tmp_path: Path) -> None:
    content = load_checkpoint(encoder)
    weights = content["network_weights"]
    content["network_weights"] = {name: 0 * value for name, value in weights.items()}
    save_checkpoint(tmp_path / "zero.pth", content)
    result = evaluate_quality(tmp_path / "zero.pth", store, views=0, device="cpu", quiet=True)
    assert result.verdict.state == "collapsed" and "every feature is zero" in result.verdict.sentences[0]
    assert "lidar" not in result.figures


def test_an_encoder_of_nans_is_broken(encoder: Path, store: Path, tmp_path: Path) -> None:
    content = load_checkpoint(encoder)
    content["network_weights"] = {name: value + math.nan for name, value in content["network_weights"].items()}
    save_checkpoint(tmp_path / "nan.pth", content)
    result = evaluate_quality(tmp_path / "nan.pth", store, control=False, device="cpu", quiet=True)
    assert result.verdict.state == "broken"
    assert json.dumps(result.to_json(), allow_nan=False)


def test_copies_of_a_volume_are_found_in_the_data(encoder: Path, tmp_path: Path) -> None:
    from medssl.preprocessing.store import Store, StoreWriter

    source = make_store(tmp_path / "a", n=6, shape=(16, 16, 16))
    writer = StoreWriter(tmp_path / "b", {"spacing": {"mode": "native", "mm": None}, "normalisation": "synthetic"})
    for number, name in enumerate([*source.ids, source.ids[0]]):
        entry = source.entry(name)
        facts = {"spacing_mm": [1, 1, 1], "modality": "MR", "patient_key": str(number), "split": "train",
                 "background": 0.0, "foreground": []}  # fmt: skip
        writer.add(f"copy_{number}", source.read(name, (0, 0, 0), entry.shape[1:]), facts)
    assert isinstance(writer.finish(), Store)
    result = evaluate_quality(encoder, tmp_path / "b", views=0, device="cpu", quiet=True)
    assert result.figures["duplicates"] == pytest.approx(2 / 7)
    assert result.verdict.state == "suspicious" and "duplicates in the data" in result.verdict.sentences[0]


def test_views_depend_on_the_seed_and_not_on_the_other_volumes(encoder: Path, store: Path) -> None:
    from medssl.preprocessing.store import Store

    frozen, volumes = load_frozen(encoder), volumes_of_store(Store.open(store))
    found = view_features(frozen, volumes[:3], views=2)
    assert found.shape == (3, 2, 8)
    np.testing.assert_array_equal(view_features(frozen, volumes[:2], views=2), found[:2])
    assert np.abs(view_features(frozen, volumes[:3], views=2, seed=1) - found).max() > 1e-4
    still = view_features(frozen, volumes[:3], views=2, purpose="none")
    np.testing.assert_array_equal(still[:, 0], still[:, 1])


def test_the_size_of_the_features_does_not_change_lidar() -> None:
    views = np.random.default_rng(0).normal(size=(20, 3, 5)) + np.random.default_rng(1).normal(size=(20, 1, 5))
    assert figures_of_views(1e-3 * views)["lidar"] == pytest.approx(figures_of_views(views)["lidar"])
    assert math.isnan(figures_of_views(views * math.nan)["lidar"])


def test_arrays_are_judged_without_a_checkpoint() -> None:
    rng = np.random.default_rng(0)
    assert judge(rng.normal(size=(50, 8))).state == "healthy"
    assert judge(np.ones((50, 8)), rng.normal(size=(50, 8))).state == "collapsed"


def test_what_cannot_be_measured_is_said(encoder: Path, store: Path) -> None:
    with pytest.raises(UsageError, match="--views takes 0 or at least 2"):
        evaluate_quality(encoder, store, views=1)
    with pytest.raises(UsageError, match="at least two volumes; the split 'validation' of the store has 1"):
        evaluate_quality(encoder, store, split="validation")
