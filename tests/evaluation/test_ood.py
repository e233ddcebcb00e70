"""Scores of strangeness: hand values, invariances, degenerate inputs, and stores end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as peer
from pytest import approx

from medssl.errors import DataError, UsageError
from medssl.evaluation.ood import Detector, separation
from medssl.evaluation.ood_run import evaluate_ood
from tests.inference.tiny_encoders import write_encoder
from tests.preprocessing.stores import make_store


def known(n: int = 300, width: int = 5, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ np.random.default_rng(9).normal(size=(width, width)) + 3


def test_mahalanobis_is_the_squared_distance_by_the_covariance() -> None:
    train, other = known(20_000), known(5, seed=1) + 2
    centred = other - train.mean(axis=0)
    expected = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(np.cov(train.T, bias=True)), centred)
    # Shrinking fades with the number of volumes.
    np.testing.assert_allclose(Detector(train)(other)["mahalanobis"], expected, rtol=0.06)


def test_with_labels_the_nearest_class_mean_counts() -> None:
    train = np.concatenate([known(400), known(400, seed=1) + 40])
    targets = np.repeat([0, 1], 400)
    between = np.array([train[:400].mean(axis=0), train[400:].mean(axis=0), train.mean(axis=0)])
    with_labels, without = Detector(train, targets)(between), Detector(train)(between)
    assert with_labels["mahalanobis"][0] == approx(0, abs=1e-6) == with_labels["mahalanobis"][1]
    assert with_labels["mahalanobis"][2] > 100 * without["mahalanobis"][2]
    assert {"energy", "softmax"} <= set(with_labels) and "energy" not in without


def test_the_other_scores_by_hand() -> None:
    train = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    found = Detector(train)(np.array([[2.0, 2.0], [3.0, 0.0]]))
    # k is the root of 4, and the features are standardised already.
    assert found["knn"] == approx([math.sqrt(1 + 9), math.sqrt(4 + 1)])
    assert found["norm"] == approx([-math.sqrt(8), -3])


def test_energy_and_softmax_follow_their_formulas() -> None:
    train = np.concatenate([known(60), known(60, seed=1) + 4])
    detector = Detector(train, np.repeat([0, 1], 60))
    found = detector(train)
    logits = detector._classifier.logits(train)  # type: ignore[union-attr]
    assert found["energy"] == approx(-np.log(np.exp(logits).sum(axis=1)))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert found["softmax"] == approx(-p.max(axis=1))


def test_strangers_far_away_are_told_and_more_of_the_same_are_not() -> None:
    detector = Detector(known(500))
    inside, same, far = (detector(x) for x in (known(300, seed=1), known(300, seed=2), known(300, seed=3) + 15))
    for score in ("mahalanobis", "knn"):
        assert separation(inside[score], far[score])["auroc"].value > 0.95
        assert abs(separation(inside[score], same[score])["auroc"].value - 0.5) < 0.08


def test_strangers_far_away_where_the_known_vary_most_are_told() -> None:
    # Such are brightness and contrast, in which most of what scanners do lies.
    scale = np.array([10.0, 1, 1, 1, 1])
    train, inside, same = (np.random.default_rng(seed).normal(size=(300, 5)) * scale for seed in range(3))
    mixed = np.linalg.qr(np.random.default_rng(9).normal(size=(5, 5)))[0]
    detector = Detector(train @ mixed)
    known_ones, strangers = detector(inside @ mixed), detector((same + np.sign(same) * [80, 0, 0, 0, 0]) @ mixed)
    for score in ("mahalanobis", "knn"):
        assert separation(known_ones[score], strangers[score])["auroc"].value > 0.99


def test_measures_equal_scikit_learn_and_their_definition() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(0, 1, 80).round(1), rng.normal(1, 1, 50).round(1)
    found = separation(inside, outside)
    scores, strange = np.concatenate([inside, outside]), np.repeat([0, 1], [80, 50])
    assert found["auroc"].value == approx(peer.roc_auc_score(strange, scores))
    assert found["aupr_out"].value == approx(peer.average_precision_score(strange, scores))
    assert found["aupr_in"].value == approx(peer.average_precision_score(1 - strange, -scores))
    limit = np.sort(inside)[math.ceil(0.95 * 80) - 1]
    assert found["fpr95"].value == approx((outside <= limit).mean())
    assert all(each.low <= each.value <= each.high for each in found.values())


def test_scale_and_shift_of_the_features_do_not_matter() -> None:
    train, other = known(), known(20, seed=1)
    factor, shift = np.array([1, 10, 0.1, 1, 3]), np.array([0, 5, 0, 0, -9])
    before, after = Detector(train)(other), Detector(train * factor + shift)(other * factor + shift)
    for score in ("mahalanobis", "knn"):
        assert after[score] == approx(before[score], rel=1e-6)


def test_fewer_volumes_than_dimensions_and_constant_features_are_no_obstacle() -> None:
    wide = known(12, width=80)
    found = Detector(wide)(known(5, width=80, seed=1))
    assert all(np.isfinite(values).all() for values in found.values())
    flat = np.ones((30, 4))
    found = Detector(flat)(np.stack([np.ones(4), 2 * np.ones(4)]))
    assert found["mahalanobis"][1] > found["mahalanobis"][0] == 0
    partly = known()
    partly[:, 2] = 7
    stranger = known(3, seed=1)
    stranger[:, 2] = 9
    usual = known(3, seed=1)
    usual[:, 2] = 7
    assert (Detector(partly)(stranger)["mahalanobis"] > 100 * Detector(partly)(usual)["mahalanobis"]).all()


def test_one_case_of_each_class_falls_back_to_equal_directions() -> None:
    assert np.isfinite(Detector(known(2), np.array([0, 1]))(known(3))["mahalanobis"]).all()


def test_what_cannot_be_scored_is_said() -> None:
    broken = known(10)
    broken[3, 1] = math.inf
    with pytest.raises(DataError, match=r"1 of 10 training volumes are not numbers \(row 3\)"):
        Detector(broken)
    with pytest.raises(DataError, match="two or more"):
        Detector(known(1))
    with pytest.raises(DataError, match="no score of strangeness"):
        Detector(known(10))(broken)
    with pytest.raises(DataError, match="0 known and 3 strange"):
        separation(np.empty(0), np.ones(3))


def test_one_volume_has_no_interval() -> None:
    assert math.isnan(separation(np.ones(1), np.zeros(4))["auroc"].low)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("ood")
    make_store(folder / "body", n=10, shape=(16, 16, 16))
    make_store(folder / "other", n=4, shape=(16, 16, 16), seed=5)
    return write_encoder(folder / "step_00000001.pth"), folder / "body", folder / "other"


def test_stores_are_told_apart_and_artefacts_with_them(stores: tuple[Path, Path, Path], tmp_path: Path) -> None:
    encoder, body, other = stores
    result = evaluate_ood(encoder, body, [other], tmp_path, device="cpu", quiet=True)
    written = json.loads((tmp_path / "ood.json").read_text())
    assert result.counts["known (fitted)"] == 9 and result.counts["other"] == 4
    assert {"ghosting", "motion", "noise"} <= set(written["near"]) and "metal" not in written["near"]
    assert set(written["sets"]["other"]) == {"mahalanobis", "knn", "norm"}
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[0] == "set,volume_id,mahalanobis,knn,norm"
    assert len(lines) == 1 + 1 + 4 + len(written["near"])
    again = evaluate_ood(encoder, body, [other], device="cpu", quiet=True)
    assert again.scores == result.scores


def test_labels_bring_class_means_and_a_classifier(stores: tuple[Path, Path, Path], tmp_path: Path) -> None:
    encoder, body, other = stores
    rows = [f"volume_{number:02d},{'ab'[number % 2]}" for number in range(10)]
    (tmp_path / "labels.csv").write_text("volume_id,label\n" + "\n".join(rows) + "\n")
    result = evaluate_ood(encoder, body, [other], labels=tmp_path / "labels.csv", artefacts=False, quiet=True)
    assert set(result.sets["other"]) == {"mahalanobis", "knn", "norm", "energy", "softmax"}
    (tmp_path / "labels.csv").write_text("volume_id,label\n" + "\n".join(rows[:4]) + "\n")
    with pytest.raises(DataError, match="no label of 5 training volumes"):
        evaluate_ood(encoder, body, [other], labels=tmp_path / "labels.csv", artefacts=False, quiet=True)


def test_without_a_validation_split_whole_patients_judge(stores: tuple[Path, Path, Path], tmp_path: Path) -> None:
    from medssl.evaluation.ood_run import _divided
    from medssl.preprocessing.store import Store

    body = Store.open(stores[1])
    fitting, judging = _divided(body.with_splits(dict.fromkeys(body.ids, "train")), 99)
    assert len(fitting) + len(judging) == 10 and judging
    assert not {volume.patient_key for volume in fitting} & {volume.patient_key for volume in judging}


def test_questions_without_an_answer_are_refused(stores: tuple[Path, Path, Path], tmp_path: Path) -> None:
    encoder, body, other = stores
    with pytest.raises(UsageError, match="Name strangers"):
        evaluate_ood(encoder, body, artefacts=False)
    with pytest.raises(UsageError, match="Two stores of strangers are called other"):
        evaluate_ood(encoder, body, [other, other])
    odd = make_store(tmp_path / "odd", n=4, shape=(16, 16, 16), modality="XYZ")
    with pytest.raises(UsageError, match="--no-artefacts"):
        evaluate_ood(encoder, odd.folder)
