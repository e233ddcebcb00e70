"""Entropy minimisation: the value, the gradient, and what has no influence."""

from __future__ import annotations

import pytest
import torch

from medssl.losses.consistency import entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.entropy_minimisation import EntropyMinimisation, EntropyMinimisationSettings
from medssl.semisupervised.ramp import RampSettings
from tests.semisupervised.helpers import (
    LATE,
    answer,
    build,
    equals_supervised_at_weight_zero,
    paired,
    views_of,
    weights_out_of_reach,
)

TASKS = ["segmentation", "classification"]


def settings(weight: float = 0.5) -> EntropyMinimisationSettings:
    return EntropyMinimisationSettings(unlabelled=RampSettings(weight=weight, fraction=0))


@pytest.mark.parametrize("task", TASKS)
def test_undecided_predictions_cost_all_of_the_weight_and_decided_ones_nothing(task: str) -> None:
    method = build(EntropyMinimisation, settings(), task)
    answer(method.networks[0], 0.0, 0.0)
    views = views_of(method, paired(task))
    assert method.losses(views, LATE)["entropy"].item() == pytest.approx(0.5)
    answer(method.networks[0], 40.0, -40.0)
    assert method.losses(views, LATE)["entropy"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_gradients_reach_every_trained_weight(task: str) -> None:
    method = build(EntropyMinimisation, settings(), task)
    assert weights_out_of_reach(method, paired(task)) == []


@pytest.mark.parametrize("task", TASKS)
def test_weight_zero_leaves_the_supervised_gradients(task: str) -> None:
    assert equals_supervised_at_weight_zero(build(EntropyMinimisation, settings(0.0), task), paired(task))


def test_padding_does_not_count() -> None:
    method = build(EntropyMinimisation, settings())
    _, view = views_of(method, paired(margin=6))
    assert isinstance(view, SemiView) and not view.inside.all()
    term = method.unsupervised([view], LATE)["entropy"]
    logits = method.networks[0](view.image)
    assert term.item() == pytest.approx(entropy(torch.where(view.inside, logits, 99.0), view.inside).item())
    assert term.item() != pytest.approx(entropy(logits).item(), rel=1e-4)
