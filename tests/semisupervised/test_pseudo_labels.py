"""Pseudo-labels: only sure predictions are labels, and the rest is ignored."""

from __future__ import annotations

import math

import pytest
import torch

from medssl.semisupervised.pseudo_labels import PseudoLabels, PseudoLabelsSettings
from medssl.semisupervised.ramp import RampSettings
from tests.semisupervised.helpers import (
    LATE,
    answer,
    build,
    equals_supervised_at_weight_zero,
    gradients_of,
    paired,
    unsupervised_terms,
    views_of,
    weights_out_of_reach,
)

TASKS = ["segmentation", "classification"]


def settings(threshold: float = 0.95, weight: float = 1.0) -> PseudoLabelsSettings:
    return PseudoLabelsSettings(threshold=threshold, unlabelled=RampSettings(weight=weight, fraction=0))


@pytest.mark.parametrize("task", TASKS)
def test_a_prediction_as_sure_as_the_threshold_costs_its_own_logarithm_and_any_other_nothing(task: str) -> None:
    sure = [math.log(0.9), math.log(0.1)]
    for threshold, expected in ((0.89, -math.log(0.9)), (0.91, 0.0)):
        method = build(PseudoLabels, settings(threshold), task)
        answer(method.networks[0], *sure)
        terms = unsupervised_terms(method, views_of(method, paired(task)))
        assert terms["pseudo_label"].item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_that_of_fixed_labels_at_sure_voxels_alone() -> None:
    method = build(PseudoLabels, settings(0.7))
    _, view = views_of(method, paired(margin=6))
    mine = gradients_of(method, method.unsupervised([view], LATE))  # type: ignore[list-item]
    logits = method.networks[0](view.image)
    best, label = logits.detach().softmax(dim=1).max(dim=1)
    taken = (best >= 0.7) & view.inside[:, 0]
    assert 0 < taken.sum() < view.inside.sum() < view.inside.numel()
    error = torch.nn.functional.cross_entropy(logits, label, reduction="none")[taken].sum() / view.inside.sum()
    expected = gradients_of(method, {"error": error})
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_gradients_reach_every_trained_weight(task: str) -> None:
    assert weights_out_of_reach(build(PseudoLabels, settings(0.0), task), paired(task)) == []


@pytest.mark.parametrize("task", TASKS)
def test_weight_zero_leaves_the_supervised_gradients(task: str) -> None:
    assert equals_supervised_at_weight_zero(build(PseudoLabels, settings(0.5, 0.0), task), paired(task))
