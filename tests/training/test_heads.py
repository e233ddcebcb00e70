"""Heads on frozen features: against slow definitions, scikit-learn, and in degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pytest import approx
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from medssl.errors import DataError
from medssl.training.heads import (
    STRENGTHS,
    TEMPERATURE,
    Cases,
    Logistic,
    Standardiser,
    knn_probe,
    linear_probe,
    prototypes,
    unit,
)
from medssl.training.scores import classification_metrics


def blobs(n: int = 90, classes: int = 3, width: int = 6, apart: float = 2.0, seed: int = 0) -> Cases:
    rng = np.random.default_rng(seed)
    t = np.arange(n) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return Cases(apart * centres[t] + rng.normal(size=(n, width)), t, tuple(f"p{i // 2}" for i in range(n)))


def test_standardised_features_have_mean_0_and_deviation_1_and_constants_become_0() -> None:
    x = np.random.default_rng(0).normal(3, 5, (50, 4))
    x[:, 2] = 1e6
    found = Standardiser(x)(x)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(found.std(axis=0), [1, 1, 0, 1], atol=1e-12)


def test_the_linear_head_is_scikit_learns() -> None:
    cases = blobs()
    ours = Logistic(cases, "multiclass", 3, 0.1)
    scaler = StandardScaler().fit(cases.features)
    theirs = LogisticRegression(C=0.1, max_iter=1000, tol=1e-5).fit(scaler.transform(cases.features), cases.targets)
    other = blobs(seed=1).features
    np.testing.assert_allclose(ours(other), theirs.predict_proba(scaler.transform(other)), atol=1e-6)
    raised = np.exp(ours.logits(other))
    np.testing.assert_allclose(raised / raised.sum(axis=1, keepdims=True), ours(other), atol=1e-9)


def test_logits_of_two_classes_are_symmetrical() -> None:
    cases = blobs(classes=2)
    head = Logistic(cases, "multiclass", 2, 1.0)
    raised = np.exp(head.logits(cases.features))
    np.testing.assert_allclose(raised / raised.sum(axis=1, keepdims=True), head(cases.features), atol=1e-9)


def test_the_strength_with_the_least_loss_on_the_choosing_cases_is_taken() -> None:
    train, select = blobs(), blobs(seed=1)
    chosen = linear_probe(train, "multiclass", 3, select)
    slow = {
        strength: classification_metrics(
            Logistic(train, "multiclass", 3, strength)(select.features), select.targets, "multiclass"
        )["nll"]
        for strength in STRENGTHS
    }
    assert chosen.scores == approx(slow)
    assert chosen.setting == min(slow, key=slow.get)  # type: ignore[arg-type]


def test_neighbours_vote_as_they_are_defined() -> None:
    train, judge = blobs(40), blobs(20, seed=1)
    chosen = knn_probe(train, "multiclass", 3, blobs(30, seed=2))
    k, standardise = int(chosen.setting), Standardiser(train.features)
    rows = unit(standardise(train.features))
    for feature, answer in zip(judge.features, chosen.head(judge.features), strict=True):
        cosine = rows @ unit(standardise(feature[None]))[0]
        nearest = np.argsort(-cosine)[:k]
        votes = np.exp(cosine[nearest] / TEMPERATURE)
        expected = [votes[train.targets[nearest] == number].sum() / votes.sum() for number in range(3)]
        np.testing.assert_allclose(answer, expected, atol=1e-12)


def test_prototypes_are_the_means_of_the_drawn_cases() -> None:
    train, judge = blobs(30), blobs(12, seed=1)
    head = prototypes(train, "multiclass", 3, 10, draw=0)
    assert head is not None
    standardise = Standardiser(train.features)
    rows = unit(standardise(train.features))
    means = unit(np.stack([rows[train.targets == number].mean(axis=0) for number in range(3)]))
    said = (unit(standardise(judge.features)) @ means.T).argmax(axis=1)
    assert (head(judge.features).argmax(axis=1) == said).all()


def test_draws_differ_and_repeat_and_too_many_shots_are_none() -> None:
    train, judge = blobs(30), blobs(12, seed=1).features
    first, again, other = (prototypes(train, "multiclass", 3, 2, draw)(judge) for draw in (0, 0, 1))  # type: ignore[misc]
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert prototypes(train, "multiclass", 3, 11, 0) is None
    with pytest.raises(ValueError, match="one class per case"):
        prototypes(train, "multilabel", 3, 1, 0)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_sound_features_are_told_and_noise_is_not(probe) -> None:  # type: ignore[no-untyped-def]
    judge = blobs(200, seed=1)
    good = probe(blobs(120), "multiclass", 3).head(judge.features)
    assert classification_metrics(good, judge.targets, "multiclass")["auroc"] > 0.95
    noise = blobs(200, apart=0.0, seed=1)
    bad = probe(blobs(120, apart=0.0), "multiclass", 3).head(noise.features)
    assert abs(classification_metrics(bad, noise.targets, "multiclass")["auroc"] - 0.5) < 0.1


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_shift_and_scale_of_a_feature_do_not_matter(probe) -> None:  # type: ignore[no-untyped-def]
    train, judge = blobs(), blobs(seed=1).features
    factor, shift = np.array([1, 10, 0.1, 1, 5, 1]), np.array([0, 100, 0, -7, 0, 0])
    moved = Cases(train.features * factor + shift, train.targets, train.patients)
    before, after = (
        probe(train, "multiclass", 3).head(judge),
        probe(moved, "multiclass", 3).head(judge * factor + shift),
    )
    np.testing.assert_allclose(before, after, atol=1e-6)


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_degenerate_training_cases(probe) -> None:  # type: ignore[no-untyped-def]
    one_class = Cases(blobs().features, np.zeros(90, np.int64))
    with pytest.raises(DataError, match="of the probe are of"):
        probe(one_class, "multiclass", 3)
    broken = blobs()
    broken.features[4, 1] = math.nan
    with pytest.raises(DataError, match="not numbers"):
        probe(broken, "multiclass", 3)
    flat = Cases(np.ones((30, 6)), np.arange(30) % 3)
    answer = probe(flat, "multiclass", 3).head(np.ones((4, 6)))
    assert np.isfinite(answer).all() and np.ptp(answer, axis=0).max() < 1e-9
    wide = blobs(12, width=200)
    assert probe(wide, "multiclass", 3).head(wide.features).shape == (12, 3)
    single = probe(Cases(blobs(3).features, np.arange(3)), "multiclass", 3)
    assert single.scores == {} or np.isfinite(list(single.scores.values())).any()


def test_a_class_without_training_cases_gets_nothing() -> None:
    cases = blobs(classes=2)
    assert (linear_probe(cases, "multiclass", 3).head(cases.features)[:, 2] == 0).all()
    assert (knn_probe(cases, "multiclass", 3).head(cases.features)[:, 2] == 0).all()


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_several_labels_are_told_apart_and_one_that_never_occurs_does_not_hurt(probe) -> None:  # type: ignore[no-untyped-def]
    cases = blobs(120)
    labels = np.stack([cases.targets == 0, cases.targets != 1, np.zeros(120, bool)], axis=1).astype(np.int64)
    chosen = probe(Cases(cases.features, labels, cases.patients), "multilabel", 3)
    found = classification_metrics(chosen.head(cases.features), labels, "multilabel")
    assert found["auroc/0"] > 0.95 and found["auroc/1"] > 0.95
    assert (chosen.head(cases.features)[:, 2] == 0).all()


def test_no_patient_teaches_and_chooses_in_one_fold() -> None:
    from medssl.training.heads import _folds

    cases = blobs(60)
    pairs = _folds(cases, "multiclass", 0)
    assert len(pairs) == 5
    for learn, judge in pairs:
        assert not set(learn.patients) & set(judge.patients)
    assert sum(len(judge.targets) for _, judge in pairs) == 60
