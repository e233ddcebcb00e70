"""UA-MT: learnt from where the teacher is certain, as a mean over such voxels."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.ramp import RampSettings
from medssl.semisupervised.uncertainty_teacher import UncertaintyTeacher, UncertaintyTeacherSettings
from medssl.training.method import Step
from tests.semisupervised.helpers import (
    LATE,
    answer,
    build,
    equals_supervised_at_weight_zero,
    few,
    paired,
    same_views,
    total,
    unsupervised_terms,
    views_of,
    weights_out_of_reach,
)


def settings(weight: float = 1.0, **values: float) -> UncertaintyTeacherSettings:
    return UncertaintyTeacherSettings(
        unlabelled=RampSettings(weight=weight, fraction=0), **{"passes": 2, "threshold_fraction": 0, **values}
    )  # type: ignore[arg-type]


def of(views: list[object]) -> list[SemiView]:
    return [view for view in views[1:] if isinstance(view, SemiView)]


@pytest.mark.parametrize("probability", [0.9, 0.7])
def test_a_certain_teacher_is_learnt_from_and_an_uncertain_one_is_not(probability: float) -> None:
    # The entropy of (0.9, 0.1) is 0.47 of log 2, that of (0.7, 0.3) is 0.88 of it.
    method = build(UncertaintyTeacher, settings(threshold=0.75, threshold_fraction=1))
    answer(method.networks[0], 0.0, 0.0)
    answer(method.teacher["network"], math.log(probability), math.log(1 - probability))
    terms = unsupervised_terms(method, views_of(method, paired()), Step(0, 100))
    expected = 0.4**2 if probability == 0.9 else 0.0
    assert terms["consistency"].item() == pytest.approx(expected, rel=1e-5)


def test_the_threshold_rises_from_three_quarters_of_the_largest_entropy_to_all_of_it() -> None:
    rising = UncertaintyTeacherSettings()
    found = [rising.largest_entropy(Step(index, 100), 3) / math.log(3) for index in (0, 50, 99)]
    assert found == pytest.approx([0.75 + 0.25 * math.exp(-5 * (1 - t) ** 2) for t in (0, 0.5, 0.99)])
    assert settings().largest_entropy(Step(0, 100), 3) == pytest.approx(math.log(3))


def test_the_loss_is_the_mean_over_voxels_that_are_inside_and_certain() -> None:
    method = build(UncertaintyTeacher, settings(threshold=0.9, threshold_fraction=1))
    views = of(views_of(method, paired(margin=6)))  # type: ignore[arg-type]
    student, teacher, *passes = views
    step = Step(0, 100)
    mean = torch.zeros(2, 2, 16, 16)
    for each in passes:
        *shallow, deepest = method.teacher["network"].encoder(each.image)  # type: ignore[operator]
        deepest = deepest * each.drawn["kept"][:, :, None, None]
        mean += method.teacher["network"].decoder([*shallow, deepest]).softmax(dim=1) / 2  # type: ignore[operator]
    entropy = -(mean * mean.log()).sum(dim=1)
    certain = student.inside[:, 0] & (entropy < method.settings.largest_entropy(step, 2))
    assert 0 < certain.sum() < student.inside.sum()
    p, q = method.networks[0](student.image).softmax(dim=1), method.teacher["network"](teacher.image).softmax(dim=1)
    expected = (p - q).square().mean(dim=1)[certain].mean()
    assert method.unsupervised(views, step)["consistency"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_where_no_voxel_is_certain_nothing_is_lost() -> None:
    method = build(UncertaintyTeacher, settings(threshold=0, threshold_fraction=1))
    views = of(views_of(method, paired()))  # type: ignore[arg-type]
    assert method.unsupervised(views, Step(0, 10**9))["consistency"].item() == 0


def test_each_pass_has_noise_and_channels_of_its_own_and_all_show_the_same_voxels() -> None:
    method = build(UncertaintyTeacher, settings(passes=3))
    student, teacher, *passes = of(views_of(method, paired()))  # type: ignore[arg-type]
    assert len(passes) == 3
    images = [student, teacher, *passes]
    for number, view in enumerate(images):
        assert torch.equal(view.to_source_mm, student.to_source_mm)
        assert all(not torch.equal(view.image, other.image) for other in images[:number])
    first, second, _ = (view.drawn["kept"] for view in passes)
    assert first.shape == (2, method.encoder.widths[-1]) and not torch.equal(first, second)
    assert set(first.flatten().tolist()) == {0.0, 2.0}


def test_views_and_loss_are_a_function_of_seed_and_sample_alone() -> None:
    method, batch = build(UncertaintyTeacher, settings()), paired()
    assert batch.unlabelled is not None
    views = views_of(method, batch)
    assert same_views(views, views_of(method, batch)) and not same_views(views, views_of(method, batch, seed=1))
    alone = views_of(method, dataclasses.replace(batch, unlabelled=few(batch.unlabelled, 1)))
    assert same_views(views[1:], alone[1:], slice(0, 1))
    assert torch.equal(total(method.losses(views, LATE)), total(method.losses(views, LATE)))


def test_gradients_reach_the_student_and_not_the_teacher() -> None:
    method = build(UncertaintyTeacher, settings(), dimensions=3)
    assert weights_out_of_reach(method, paired(dimensions=3)) == []
    assert all(weight.grad is None and not weight.requires_grad for weight in method.teacher.parameters())


def test_weight_zero_leaves_the_supervised_gradients() -> None:
    assert equals_supervised_at_weight_zero(build(UncertaintyTeacher, settings(0.0)), paired())
