"""Outputs to probabilities, and the temperature that makes them honest."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from pytest import approx

from medssl.training.scores import classification_metrics
from medssl.training.temperature import fit_temperature, probabilities_of


def honest(n: int = 4000, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose softmax is the true chance of each class."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, (n, classes))
    p = probabilities_of(z, "multiclass")
    return z, (p.cumsum(axis=1) > rng.uniform(size=(n, 1))).argmax(axis=1)


@pytest.mark.parametrize("boast", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_known_boast(boast: float) -> None:
    z, t = honest()
    assert fit_temperature(boast * z, t, "multiclass") == approx(boast, rel=0.06)


def test_labels_and_ordinal_classes_have_temperatures_too() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (4000, 2))
    t = (rng.uniform(size=z.shape) < probabilities_of(z, "multilabel")).astype(int)
    assert fit_temperature(2 * z, t, "multilabel") == approx(2, rel=0.08)
    above = rng.normal(0, 2, (4000, 1)) + np.array([1.5, 0.0, -1.5])
    p = probabilities_of(above, "ordinal")
    ranks = (p.cumsum(axis=1) > rng.uniform(size=(4000, 1))).argmax(axis=1)
    assert fit_temperature(2 * above, ranks, "ordinal") == approx(2, rel=0.08)


def test_no_temperature_near_it_has_a_smaller_likelihood_loss() -> None:
    z, t = honest(400)
    best = fit_temperature(3 * z, t, "multiclass")

    def loss(temperature: float) -> float:
        return classification_metrics(probabilities_of(3 * z, "multiclass", temperature), t, "multiclass")["nll"]

    assert loss(best) < min(loss(best * 1.02), loss(best / 1.02), loss(1.0))


def test_it_calibrates_and_changes_no_decision() -> None:
    z, t = honest()
    before = classification_metrics(probabilities_of(4 * z, "multiclass"), t, "multiclass")
    after = probabilities_of(4 * z, "multiclass", fit_temperature(4 * z, t, "multiclass"))
    found = classification_metrics(after, t, "multiclass")
    assert found["ece"] < 0.2 * before["ece"]
    assert found["accuracy"] == before["accuracy"]


def test_cases_that_are_all_right_tell_no_temperature(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert fit_temperature(np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([0, 1]), "multiclass") == 1.0
    assert "tell no temperature" in caplog.text


def test_probabilities_equal_torch_and_survive_large_outputs() -> None:
    z = np.array([[1000.0, 999.0, -1000.0], [0.1, 0.2, 0.3]])
    np.testing.assert_allclose(probabilities_of(z, "multiclass", 2), torch.softmax(torch.tensor(z) / 2, dim=1))
    np.testing.assert_allclose(probabilities_of(z, "multilabel"), torch.sigmoid(torch.tensor(z)))


def test_ordinal_outputs_are_differences_of_falling_chances() -> None:
    p = probabilities_of(np.log(np.array([[0.8 / 0.2, 0.3 / 0.7], [0.3 / 0.7, 0.8 / 0.2]])), "ordinal")
    np.testing.assert_allclose(p[0], [0.2, 0.5, 0.3])
    # Rising outputs would give a class a chance below 0.
    np.testing.assert_allclose(p[1], [0.7, 0.0, 0.3], atol=1e-12)


@pytest.mark.parametrize(
    ("logits", "kind", "words"),
    [
        ([[0.0, np.nan]], "multiclass", "row 0 are not finite"),
        ([0.0, 1.0], "multiclass", "need shape"),
        ([[0.0, 1.0]], "nominal", "no kind"),
    ],
)
def test_unusable_outputs_are_named(logits: list, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        probabilities_of(np.array(logits), kind)  # type: ignore[arg-type]


def test_a_temperature_needs_cases() -> None:
    with pytest.raises(ValueError, match="and a case"):
        fit_temperature(np.empty((0, 2)), np.empty(0, int), "multiclass")
