"""MixMatch: labelled and guessed samples are blended, and so are their labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medssl.losses.segmentation import dice_cross_entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.mixmatch import MixMatch, MixMatchSettings
from medssl.semisupervised.ramp import RampSettings
from tests.semisupervised.helpers import (
    IGNORED,
    LATE,
    answer,
    build,
    gradients_of,
    paired,
    same_gradients,
    same_views,
    views_of,
    weights_out_of_reach,
    with_other_unlabelled,
)

TASKS = ["segmentation", "classification"]


def settings(weight: float = 10.0, **values: float) -> MixMatchSettings:
    return MixMatchSettings(unlabelled=RampSettings(weight=weight, fraction=0), **values)  # type: ignore[arg-type]


def of(views: list[object]) -> tuple[SemiView, SemiView, list[SemiView]]:
    labelled, mixed, *plain = (view for view in views if isinstance(view, SemiView))
    return labelled, mixed, plain


def slow_targets(method: MixMatch, views: list[object]) -> Tensor:
    """Labels of the blends: one-hot or the sharpened mean guess, blended sample by sample."""
    labelled, mixed, plain = of(views)
    known = labelled.label if labelled.shows is None else labelled.shows
    assert known is not None
    hard = torch.nn.functional.one_hot(known.where(known != IGNORED, 0), method.task.classes).movedim(-1, 1).float()
    mean = sum(method.networks[0](view.image).detach().softmax(dim=1) for view in plain) / len(plain)
    assert isinstance(mean, Tensor)
    guess = mean.square() / mean.square().sum(dim=1, keepdim=True)
    pool = [*hard, *guess, *guess]
    pairs = zip(pool, mixed.drawn["partner"].tolist(), mixed.drawn["weight"].tolist(), strict=True)
    return torch.stack([part * own + (1 - part) * pool[other] for own, other, part in pairs])


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_equals_its_definition(task: str) -> None:
    method, batch = build(MixMatch, settings(), task, classes=3), paired(task, classes=3)
    views = views_of(method, batch)
    _, mixed, _ = of(views)  # type: ignore[arg-type]
    target = slow_targets(method, views)  # type: ignore[arg-type]
    logits = method.networks[0](mixed.image)
    if task == "segmentation":
        expected = dice_cross_entropy(logits[:2], target[:2], background=False)
    else:
        expected = {"cross_entropy": -(target[:2] * logits[:2].log_softmax(dim=1)).sum(dim=1).mean()}
    expected["consistency"] = 10 * (logits[2:].softmax(dim=1) - target[2:]).square().mean()
    terms = method.losses(views, LATE)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-3)


def test_every_sample_keeps_at_least_half_of_itself_and_may_have_any_partner() -> None:
    method = build(MixMatch, settings())
    pairs = set()
    for seed in range(40):
        _, mixed, plain = of(views_of(method, paired(), seed))  # type: ignore[arg-type]
        assert mixed.drawn["weight"].min() >= 0.5
        assert len(mixed.image) == 2 + 2 * len(plain)
        pairs |= set(enumerate(mixed.drawn["partner"].tolist()))
    assert {(row, other) for row in range(6) for other in range(6) if row != other} == pairs


def test_a_blend_is_of_the_images_that_labels_are_guessed_from() -> None:
    labelled, mixed, plain = of(views_of(build(MixMatch, settings()), paired()))  # type: ignore[arg-type]
    pool = torch.cat([labelled.image, *(view.image for view in plain)])
    part = mixed.drawn["weight"][:, None, None, None]
    torch.testing.assert_close(mixed.image, part * pool + (1 - part) * pool[mixed.drawn["partner"]])


def test_guesses_of_a_segmentation_are_of_the_same_voxels_and_of_a_class_of_several_geometries() -> None:
    _, _, (first, second) = of(views_of(build(MixMatch, settings()), paired(unlabelled=8)))  # type: ignore[arg-type]
    assert torch.equal(first.to_source_mm, second.to_source_mm) and not torch.equal(first.image, second.image)
    method = build(MixMatch, settings(), "classification")
    _, _, (first, second) = of(views_of(method, paired("classification", unlabelled=8)))  # type: ignore[arg-type]
    assert not torch.equal(first.to_source_mm, second.to_source_mm)


def test_ignored_and_padded_voxels_count_on_neither_side_of_a_blend() -> None:
    method, batch = build(MixMatch, settings()), paired(margin=6)
    assert batch.labelled.label is not None
    batch.labelled.label[:, ::2] = IGNORED
    views = views_of(method, batch)
    labelled, mixed, plain = of(views)  # type: ignore[arg-type]
    assert labelled.label is not None
    own = torch.cat([labelled.inside & (labelled.label != IGNORED)[:, None], *(view.inside for view in plain)])
    where = own & own[mixed.drawn["partner"]]
    assert torch.equal(mixed.inside, where)
    target, logits = slow_targets(method, views), method.networks[0](mixed.image)  # type: ignore[arg-type]
    terms = method.losses(views, LATE)
    expected = dice_cross_entropy(logits[:2], target[:2], where[:2], background=False)
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4)
    squared = (logits.softmax(dim=1) - target).square().mean(dim=1)[2:][where[2:, 0]].mean()
    assert terms["consistency"].item() == pytest.approx(10 * squared.item(), rel=1e-3)


def test_guesses_are_not_learnt_through() -> None:
    method = build(MixMatch, settings())
    guess = method.guessed([torch.zeros(1, 1, 16, 16)])
    assert not guess.requires_grad
    answer(method.networks[0], 1.0, 0.0)
    p, q = torch.tensor([1.0, 0.0]).softmax(dim=0).tolist()
    assert method.guessed([torch.zeros(1, 1, 16, 16)])[0, 0, 0, 0].item() == pytest.approx(p**2 / (p**2 + q**2))


def test_views_are_a_function_of_the_seed() -> None:
    method, batch = build(MixMatch, settings()), paired()
    views = views_of(method, batch)
    assert same_views(views, views_of(method, batch)) and not same_views(views, views_of(method, batch, seed=1))


@pytest.mark.parametrize("task", TASKS)
def test_gradients_reach_the_student_and_not_the_teacher(task: str) -> None:
    method = build(MixMatch, settings(), task)
    assert weights_out_of_reach(method, paired(task)) == []
    assert all(weight.grad is None and not weight.requires_grad for weight in method.teacher.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_with_weight_zero_unlabelled_images_have_no_influence(task: str) -> None:
    batch = paired(task, labelled=3)
    for weight, expected in ((0.0, True), (10.0, False)):
        method = build(MixMatch, settings(weight), task)
        found = [
            gradients_of(method, method.losses(views_of(method, each), LATE))
            for each in (batch, with_other_unlabelled(batch))
        ]
        assert same_gradients(*found) == expected
