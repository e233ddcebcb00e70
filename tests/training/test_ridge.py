"""The linear head in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from pytest import approx
from sklearn.linear_model import Ridge

from medssl.errors import DataError
from medssl.training.heads import Cases
from medssl.training.ridge import ridge_probe
from medssl.training.scores import classification_metrics


def blobs(n: int = 60, classes: int = 3, width: int = 5, apart: float = 2.0, seed: int = 0) -> Cases:
    rng = np.random.default_rng(seed)
    targets = np.arange(n) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width)) * apart
    return Cases(centres[targets] + rng.normal(size=(n, width)), targets)


@pytest.mark.parametrize("width", [5, 90], ids=["fewer features than cases", "more features than cases"])
def test_left_out_errors_equal_those_of_refits(width: int) -> None:
    train = blobs(n=30, width=width)
    chosen = ridge_probe(train, "multiclass", 3)
    x = (train.features - train.features.mean(axis=0)) / train.features.std(axis=0)
    truth = np.eye(3)[train.targets]
    unit = np.square(np.linalg.svd(x, compute_uv=False)).mean()
    for penalty in (0.01, 1.0):
        errors = []
        for row in range(len(x)):
            rest = np.delete(np.arange(len(x)), row)
            model = Ridge(alpha=penalty * unit).fit(x[rest], truth[rest])
            errors.append(np.square(truth[row] - model.predict(x[row : row + 1])[0]))
        # Refitted without a case the mean moves too; the shortcut is exact for features that stay centred.
        assert chosen.scores[penalty] == approx(np.mean(errors), rel=0.05)
    assert chosen.setting == min(chosen.scores, key=chosen.scores.__getitem__)


def test_classes_that_are_apart_are_told_apart_and_noise_is_not() -> None:
    head = ridge_probe(blobs(), "multiclass", 3).head
    judge = blobs(seed=1)
    assert classification_metrics(head(judge.features), judge.targets, "multiclass")["auroc"] > 0.95
    noise, other = (Cases(np.random.default_rng(s).normal(size=(200, 5)), np.arange(200) % 2) for s in (0, 1))
    answers = ridge_probe(noise, "multiclass", 2).head(other.features)
    assert 0.35 < classification_metrics(answers, other.targets, "multiclass")["auroc"] < 0.65


def test_each_of_several_labels_has_its_own_answer() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(80, 4))
    targets = (features[:, :2] > 0).astype(np.int64)
    answers = ridge_probe(Cases(features, targets), "multilabel", 2).head(features)
    assert answers.min() >= 0 and answers.max() <= 1
    assert ((answers > 0.5) == targets).mean() > 0.9


def test_cases_of_one_class_are_refused() -> None:
    with pytest.raises(DataError, match="one class"):
        ridge_probe(Cases(np.eye(4), np.zeros(4, np.int64)), "multiclass", 2)
