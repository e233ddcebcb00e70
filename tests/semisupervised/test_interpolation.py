"""ICT: the prediction of a blend against the blend of the teacher's predictions."""

from __future__ import annotations

import pytest
import torch

from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.interpolation import Interpolation, InterpolationSettings
from medssl.semisupervised.ramp import RampSettings
from tests.semisupervised.helpers import (
    LATE,
    answer,
    build,
    equals_supervised_at_weight_zero,
    paired,
    same_views,
    unsupervised_terms,
    views_of,
    weights_out_of_reach,
)

TASKS = ["segmentation", "classification"]


def settings(weight: float = 1.0) -> InterpolationSettings:
    return InterpolationSettings(unlabelled=RampSettings(weight=weight, fraction=0), alpha=1.0)


def pair(views: list[object]) -> tuple[SemiView, SemiView]:
    _, mixed, plain = views
    assert isinstance(mixed, SemiView) and isinstance(plain, SemiView)
    return mixed, plain


@pytest.mark.parametrize("task", TASKS)
def test_two_answers_differ_by_their_squared_difference(task: str) -> None:
    method = build(Interpolation, settings(), task)
    answer(method.networks[0], 0.0, 0.0)
    answer(method.teacher["network"], 50.0, -50.0)
    terms = unsupervised_terms(method, views_of(method, paired(task)))
    assert terms["consistency"].item() == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_equals_its_definition_sample_by_sample(task: str) -> None:
    method = build(Interpolation, settings(), task, classes=3)
    # A teacher that is not the student.
    for weight in method.teacher.parameters():
        weight.mul_(1.1)
    views = views_of(method, paired(task, classes=3, unlabelled=4))
    mixed, plain = pair(views)  # type: ignore[arg-type]
    differences = []
    taught = method.teacher["network"](plain.image).softmax(dim=1)
    for row in range(4):
        other, part = int(mixed.drawn["partner"][row]), float(mixed.drawn["weight"][row])
        image = part * plain.image[row] + (1 - part) * plain.image[other]
        torch.testing.assert_close(mixed.image[row], image)
        target = part * taught[row] + (1 - part) * taught[other]
        differences.append((method.networks[0](image[None]).softmax(dim=1)[0] - target).square().mean())
    expected = torch.stack(differences).mean()
    assert unsupervised_terms(method, views)["consistency"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_each_sample_has_a_partner_and_a_part_of_its_own() -> None:
    views = views_of(build(Interpolation, settings()), paired(unlabelled=4))
    mixed, _ = pair(views)  # type: ignore[arg-type]
    assert sorted(mixed.drawn["partner"].tolist()) == [0, 1, 2, 3]
    assert all(row != other for row, other in enumerate(mixed.drawn["partner"].tolist()))
    assert len(set(mixed.drawn["weight"].tolist())) == 4


def test_a_voxel_counts_where_both_images_of_a_blend_count() -> None:
    method = build(Interpolation, settings())
    mixed, plain = pair(views_of(method, paired(margin=6)))  # type: ignore[arg-type]
    inside = plain.inside & plain.inside.flip(0)
    assert torch.equal(mixed.inside, inside) and not inside.all()
    p, taught = method.networks[0](mixed.image).softmax(dim=1), method.taught(plain.image)
    part = mixed.drawn["weight"][:, None, None, None]
    difference = (p - part * taught - (1 - part) * taught.flip(0)).square().mean(dim=1)[inside[:, 0]].mean()
    term = method.unsupervised([mixed, plain], LATE)["consistency"]
    assert term.item() == pytest.approx(difference.item(), rel=1e-4)


def test_views_are_a_function_of_the_seed() -> None:
    method, batch = build(Interpolation, settings()), paired()
    views = views_of(method, batch)
    assert same_views(views, views_of(method, batch)) and not same_views(views, views_of(method, batch, seed=1))


@pytest.mark.parametrize("task", TASKS)
def test_gradients_reach_the_student_and_not_the_teacher(task: str) -> None:
    method = build(Interpolation, settings(), task)
    assert weights_out_of_reach(method, paired(task)) == []
    assert all(weight.grad is None and not weight.requires_grad for weight in method.teacher.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_weight_zero_leaves_the_supervised_gradients(task: str) -> None:
    assert equals_supervised_at_weight_zero(build(Interpolation, settings(0.0), task), paired(task))


def test_one_unlabelled_image_has_nothing_to_blend_with() -> None:
    with pytest.raises(ValueError, match="raise the batch size"):
        views_of(build(Interpolation, settings()), paired(unlabelled=1))
