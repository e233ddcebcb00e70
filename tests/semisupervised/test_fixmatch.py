"""FixMatch: sure predictions of the weak view are labels of the strong one, and the rest is ignored."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.fixmatch import FixMatch, FixMatchSettings
from medssl.semisupervised.ramp import RampSettings
from tests.semisupervised.helpers import (
    LATE,
    answer,
    build,
    equals_supervised_at_weight_zero,
    few,
    gradients_of,
    paired,
    same_views,
    unsupervised_terms,
    views_of,
    weights_out_of_reach,
)

TASKS = ["segmentation", "classification"]


def settings(threshold: float = 0.95, weight: float = 1.0, labels_from: str = "student") -> FixMatchSettings:
    return FixMatchSettings(
        threshold=threshold,
        unlabelled=RampSettings(weight=weight, fraction=0),
        labels_from=labels_from,  # type: ignore[arg-type]
    )


def pair(views: list[object]) -> tuple[SemiView, SemiView]:
    _, weak, strong = views
    assert isinstance(weak, SemiView) and isinstance(strong, SemiView)
    return weak, strong


@pytest.mark.parametrize("task", TASKS)
def test_a_sure_label_costs_its_logarithm_and_an_unsure_one_nothing(task: str) -> None:
    for threshold, expected in ((0.89, -math.log(0.9)), (0.91, 0.0)):
        method = build(FixMatch, settings(threshold), task)
        answer(method.networks[0], math.log(0.1), math.log(0.9))
        terms = unsupervised_terms(method, views_of(method, paired(task)))
        assert terms["pseudo_label"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("labels_from", ["student", "teacher"])
def test_labels_come_from_whom_the_settings_name(labels_from: str) -> None:
    method = build(FixMatch, settings(0.9, labels_from=labels_from))
    answer(method.networks[0], 1.0, 4.0)
    answer(method.teacher["network"], 4.0, 1.0)
    terms = unsupervised_terms(method, views_of(method, paired()))
    own = math.log1p(math.exp(-3))
    assert terms["pseudo_label"].item() == pytest.approx(own if labels_from == "student" else own + 3, rel=1e-5)


def test_unsure_and_padded_voxels_are_ignored_and_do_not_become_background() -> None:
    method = build(FixMatch, settings(0.7), classes=3)
    weak, strong = pair(views_of(method, paired(classes=3, margin=6)))  # type: ignore[arg-type]
    mine = gradients_of(method, method.unsupervised([weak, strong], LATE))
    best, label = method.networks[0](weak.image).detach().softmax(dim=1).max(dim=1)
    taken = (best >= 0.7) & weak.inside[:, 0]
    assert 0 < taken.sum() < weak.inside.sum() < weak.inside.numel()
    error = torch.nn.functional.cross_entropy(method.networks[0](strong.image), label, reduction="none")
    expected = gradients_of(method, {"error": error[taken].sum() / weak.inside.sum()})
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=1e-6)


def test_both_views_of_a_segmentation_show_the_same_voxels_in_other_intensities() -> None:
    method = build(FixMatch, settings())
    weak, strong = pair(views_of(method, paired(unlabelled=8)))  # type: ignore[arg-type]
    assert torch.equal(weak.to_source_mm, strong.to_source_mm) and torch.equal(weak.inside, strong.inside)
    assert not torch.equal(weak.image, strong.image)


def test_the_views_of_a_classification_have_geometries_of_their_own() -> None:
    method = build(FixMatch, settings(), "classification")
    weak, strong = pair(views_of(method, paired("classification", unlabelled=8)))  # type: ignore[arg-type]
    assert not torch.equal(weak.to_source_mm, strong.to_source_mm)


@pytest.mark.parametrize("task", TASKS)
def test_views_are_a_function_of_seed_and_sample_alone(task: str) -> None:
    method, batch = build(FixMatch, settings(), task), paired(task)
    assert batch.unlabelled is not None
    views = views_of(method, batch)
    assert same_views(views, views_of(method, batch)) and not same_views(views, views_of(method, batch, seed=1))
    alone = views_of(method, dataclasses.replace(batch, unlabelled=few(batch.unlabelled, 1)))
    assert same_views(views[1:], alone[1:], slice(0, 1))


@pytest.mark.parametrize("task", TASKS)
def test_gradients_reach_the_student_and_not_the_teacher(task: str) -> None:
    method = build(FixMatch, settings(0.0), task)
    assert weights_out_of_reach(method, paired(task)) == []
    assert all(weight.grad is None and not weight.requires_grad for weight in method.teacher.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_weight_zero_leaves_the_supervised_gradients(task: str) -> None:
    assert equals_supervised_at_weight_zero(build(FixMatch, settings(0.5, 0.0), task), paired(task))
