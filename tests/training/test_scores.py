"""Metrics of classifiers against values made by hand, and against scikit-learn and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics as peer
import torch
from pytest import approx
from torchmetrics.functional import calibration_error

from medssl.training.ranking import Ranking
from medssl.training.scores import BINS, bin_of, classification_metrics, confusion, kappa


def made(n: int = 120, classes: int = 4, seed: int = 0, ties: bool = True) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[targets]
    if ties:
        logits = logits.round(0)
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True), targets


def test_four_cases_by_hand() -> None:
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.35, 0.65], [0.8, 0.2]])
    found = classification_metrics(p, np.array([0, 1, 1, 0]), "multiclass", ["well", "ill"])
    assert found["auroc"] == found["auroc/ill"] == 1.0
    assert found["accuracy"] == 0.75
    assert found["sensitivity/ill"] == 0.5 and found["specificity/ill"] == 1.0 and found["sensitivity/well"] == 1.0
    assert found["balanced_accuracy"] == 0.75
    assert found["f1"] == approx((2 * 2 / 5 + 2 * 1 / 3) / 2)
    assert found["kappa"] == approx((0.75 - 0.5) / (1 - 0.5))
    assert found["brier"] == approx((0.01 + 0.36 + 0.1225 + 0.04) / 4)
    assert found["nll"] == approx(-(math.log(0.9) + math.log(0.4) + math.log(0.65) + math.log(0.8)) / 4)
    # Each confidence lies in a bin of its own: 0.9 and 0.65 and 0.8 came true, 0.6 did not.
    assert found["ece"] == approx((0.1 + 0.6 + 0.35 + 0.2) / 4)


@pytest.mark.parametrize("classes", [2, 4])
def test_several_classes_equal_scikit_learn(classes: int) -> None:
    p, t = made(classes=classes)
    found = classification_metrics(p, t, "multiclass")
    said, truth = p.argmax(axis=1), np.eye(classes)[t]
    assert found["auroc"] == approx(peer.roc_auc_score(truth, p, average="macro"))
    assert found["aupr"] == approx(peer.average_precision_score(truth, p, average="macro"))
    assert found["balanced_accuracy"] == approx(peer.balanced_accuracy_score(t, said))
    assert found["f1"] == approx(peer.f1_score(t, said, average="macro"))
    assert found["kappa"] == approx(peer.cohen_kappa_score(t, said))
    assert found["brier"] == approx(
        peer.brier_score_loss(t, p, labels=list(range(classes)), scale_by_half=classes == 2)
    )
    assert found["nll"] == approx(peer.log_loss(t, p))
    for number in range(classes):
        assert found[f"auroc/{number}"] == approx(peer.roc_auc_score(t == number, p[:, number]))
        assert found[f"sensitivity/{number}"] == approx(peer.recall_score(t == number, said == number))
        assert found[f"specificity/{number}"] == approx(peer.recall_score(t != number, said != number))


def test_ordinal_metrics_equal_scikit_learn_and_the_definition() -> None:
    p, t = made()
    found = classification_metrics(p, t, "ordinal")
    said = p.argmax(axis=1)
    assert found["kappa_quadratic"] == approx(peer.cohen_kappa_score(t, said, weights="quadratic"))
    assert found["mean_absolute_error"] == approx(np.abs(said - t).mean())
    slow = [sum((p[i, : k + 1].sum() - (t[i] <= k)) ** 2 for k in range(4)) for i in range(len(t))]
    assert found["ranked_probability_score"] == approx(np.mean(slow))


def test_several_labels_equal_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    t = rng.integers(0, 2, (90, 3))
    p = np.clip(0.3 * t + rng.uniform(0, 0.7, t.shape), 0, 1).round(2)
    found, said = classification_metrics(p, t, "multilabel", ["a", "b", "c"]), (p >= 0.5).astype(int)
    assert found["auroc"] == approx(peer.roc_auc_score(t, p, average="macro"))
    assert found["aupr"] == approx(peer.average_precision_score(t, p, average="macro"))
    assert found["f1"] == approx(peer.f1_score(t, said, average="macro"))
    assert found["kappa"] == approx(np.mean([peer.cohen_kappa_score(t[:, k], said[:, k]) for k in range(3)]))
    each = [peer.balanced_accuracy_score(t[:, k], said[:, k]) for k in range(3)]
    assert found["balanced_accuracy"] == approx(np.mean(each))
    assert found["brier"] == approx(np.mean([peer.brier_score_loss(t[:, k], p[:, k]) for k in range(3)]))
    assert found["nll"] == approx(np.mean([peer.log_loss(t[:, k], p[:, k]) for k in range(3)]))


def test_calibration_error_equals_torchmetrics() -> None:
    p, t = made(ties=False)
    theirs = calibration_error(torch.tensor(p), torch.tensor(t), task="multiclass", num_classes=4, n_bins=BINS)
    assert classification_metrics(p, t, "multiclass")["ece"] == approx(theirs.item(), abs=1e-6)
    binary = calibration_error(torch.tensor(p[:, 1]), torch.tensor((t == 1).astype(int)), task="binary", n_bins=BINS)
    ours = classification_metrics(p[:, 1:2], (t == 1).astype(int)[:, None], "multilabel")
    assert ours["ece"] == approx(binary.item(), abs=1e-6)


def test_honest_probabilities_have_no_calibration_error_and_boasting_ones_have() -> None:
    t = np.array([1] * 8 + [0] * 2)
    honest, boasting = np.tile([0.2, 0.8], (10, 1)), np.tile([0.0, 1.0], (10, 1))
    assert classification_metrics(honest, t, "multiclass")["ece"] == approx(0, abs=1e-12)
    assert classification_metrics(boasting, t, "multiclass")["ece"] == approx(0.2)


def test_bins_hold_their_upper_end() -> None:
    assert bin_of(np.array([0.0, 1 / 15, 1 / 15 + 1e-9, 0.5, 1.0])).tolist() == [0, 0, 1, 7, 14]


def test_false_positive_rate_at_a_recall_by_hand() -> None:
    ranking = Ranking(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), np.array([1, 0, 1, 0, 1, 0], bool))
    assert ranking.false_positive_rate(0.95)[0] == approx(2 / 3)
    assert ranking.false_positive_rate(0.6)[0] == approx(1 / 3)
    assert ranking.false_positive_rate(1 / 3)[0] == 0


def test_roc_curve_equals_scikit_learn() -> None:
    p, t = made()
    ours = Ranking(p[:, 0], t == 0).curve()
    theirs = peer.roc_curve(t == 0, p[:, 0], drop_intermediate=False)
    np.testing.assert_allclose(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1])


def test_whole_weights_are_repeated_cases() -> None:
    p, t = made(60)
    counts = np.random.default_rng(3).integers(0, 4, 60)
    again = np.repeat(np.arange(60), counts)
    from medssl.training.scores import Scores

    weighted = Scores(p, t, "ordinal").weighted(counts[None].astype(float))
    repeated = classification_metrics(p[again], t[again], "ordinal")
    for name, value in repeated.items():
        assert weighted[name][0] == approx(value, nan_ok=True), name


def test_order_of_cases_does_not_matter() -> None:
    p, t = made()
    order = np.random.default_rng(0).permutation(len(t))
    before, after = classification_metrics(p, t, "ordinal"), classification_metrics(p[order], t[order], "ordinal")
    assert before == approx(after)


def test_equal_scores_rank_by_chance() -> None:
    assert Ranking(np.zeros(6), np.array([1, 0, 0, 1, 0, 1], bool)).auroc()[0] == 0.5


def test_cases_of_one_class_leave_undefined_what_needs_two() -> None:
    found = classification_metrics(np.tile([0.7, 0.2, 0.1], (5, 1)), np.zeros(5, int), "ordinal")
    undefined = {"auroc", "kappa", "kappa_quadratic", "auroc/0", "auroc/1", "aupr/1", "sensitivity/2", "specificity/0"}
    assert undefined <= {name for name, value in found.items() if math.isnan(value)}
    assert found["accuracy"] == found["balanced_accuracy"] == 1.0


def test_a_class_without_cases_is_left_out_of_the_mean() -> None:
    p, t = made(classes=4)
    p, t = p[t != 3], t[t != 3]
    found = classification_metrics(p, t, "multiclass")
    assert math.isnan(found["auroc/3"])
    assert found["auroc"] == approx(np.mean([found[f"auroc/{number}"] for number in range(3)]))
    assert found["f1"] == approx(peer.f1_score(t, p.argmax(axis=1), average="macro"))


def test_confusion_has_the_truth_in_rows() -> None:
    table = confusion(np.array([1, 1, 0]), np.array([0, 1, 0]), 2)
    assert table[0].tolist() == [[1, 1], [0, 1]]
    assert kappa(table)[0] == approx(peer.cohen_kappa_score([0, 1, 0], [1, 1, 0]))


@pytest.mark.parametrize(
    ("p", "t", "kind", "words"),
    [
        ([[0.5, 0.5], [math.nan, 1]], [0, 1], "multiclass", "Row 1 holds no probabilities"),
        ([[0.5, 0.5], [0.5, 0.4]], [0, 1], "multiclass", "row 1 sum to 0.9"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], "multiclass", "target of row 1 is 2"),
        ([[0.5, 1.5]], [[0, 1]], "multilabel", "Row 0 holds no probabilities"),
        ([[0.5, 0.5]], [0], "multilabel", "need shape"),
        ([[1.0]], [0], "multiclass", "column per class"),
        ([[0.5, 0.5]], [0], "nominal", "no kind of target"),
    ],
)
def test_unusable_rows_are_named(p: list, t: list, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classification_metrics(np.array(p), np.array(t), kind)  # type: ignore[arg-type]


def test_a_ranking_of_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="Score 1 is not finite"):
        Ranking(np.array([0.0, math.inf]), np.array([True, False]))
