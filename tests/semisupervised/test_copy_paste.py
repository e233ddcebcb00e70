"""BCP: labelled and guessed regions, the two stages, and what the teacher's guess keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medssl.losses.segmentation import dice_cross_entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.copy_paste import CopyPaste, CopyPasteSettings, partners_of
from medssl.semisupervised.ramp import RampSettings
from medssl.training.method import Step
from tests.semisupervised.helpers import (
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

EARLY = Step(1, 100)


def settings(weight: float = 0.5, **values: object) -> CopyPasteSettings:
    return CopyPasteSettings(unlabelled=RampSettings(weight=weight, fraction=0), **values)  # type: ignore[arg-type]


def of(views: list[object]) -> list[SemiView]:
    return [view for view in views if isinstance(view, SemiView)]


def pasted(host: Tensor, guest: Tensor, box: Tensor) -> Tensor:
    result = host.clone()
    result[..., box] = guest[..., box]
    return result


def test_images_are_pasted_both_ways_with_one_box() -> None:
    method = build(CopyPaste, settings())
    labelled, among, plain, inward, outward = of(views_of(method, paired(labelled=2, unlabelled=2)))  # type: ignore[arg-type]
    assert torch.equal(inward.drawn["box"], outward.drawn["box"])
    for row in range(2):
        box = inward.drawn["box"][row, 0]
        other = 1 - row
        assert torch.equal(inward.image[row], pasted(labelled.image[row], plain.image[row], box))
        assert torch.equal(outward.image[row], pasted(plain.image[row], labelled.image[other], box))
        own = among.drawn["box"][row, 0]
        assert torch.equal(among.image[row], pasted(labelled.image[row], labelled.image[other], own))


@pytest.mark.parametrize(("part", "side"), [(2 / 3, 10), (0.25, 4), (1.0, 16)])
def test_the_box_is_a_part_of_each_edge(part: float, side: int) -> None:
    method = build(CopyPaste, settings(box=part), dimensions=3)
    *_, outward = of(views_of(method, paired(dimensions=3)))  # type: ignore[arg-type]
    assert outward.drawn["box"].flatten(1).sum(dim=1).tolist() == [side**3] * 2


@pytest.mark.parametrize("labelled", [1, 2, 3, 4])
@pytest.mark.parametrize("unlabelled", [1, 2, 3, 4])
def test_partners_differ_and_all_are_used(labelled: int, unlabelled: int) -> None:
    receiving, giving = partners_of(labelled, unlabelled)
    assert len(receiving) == len(giving) == unlabelled
    if labelled > 1:
        assert (receiving != giving).all()
    assert len({*receiving.tolist(), *giving.tolist()}) == min(labelled, 2 * unlabelled)


def test_the_loss_is_that_of_the_labelled_parts_and_a_part_of_that_of_the_guessed_ones() -> None:
    method = build(CopyPaste, settings(0.5, largest_component=False), classes=3)
    views = views_of(method, paired(classes=3, margin=6))
    labelled, _, plain, inward, outward = of(views)  # type: ignore[arg-type]
    assert labelled.label is not None
    guess = method.taught(plain.image).argmax(dim=1) * plain.inside[:, 0]
    images, labels, counts, known = [], [], [], []
    for row in range(2):
        box = inward.drawn["box"][row, 0]
        images.append(pasted(labelled.image[row], plain.image[row], box))
        labels.append(pasted(labelled.label[row], guess[row], box))
        counts.append(pasted(labelled.inside[row, 0], plain.inside[row, 0], box))
        known.append(~box)
    for row in range(2):
        box = inward.drawn["box"][row, 0]
        images.append(pasted(plain.image[row], labelled.image[1 - row], box))
        labels.append(pasted(guess[row], labelled.label[1 - row], box))
        counts.append(pasted(plain.inside[row, 0], labelled.inside[1 - row, 0], box))
        known.append(box)
    logits, label = method.networks[0](torch.stack(images)), torch.stack(labels)
    where, region = torch.stack(counts)[:, None], torch.stack(known)[:, None]
    terms = method.losses(views, LATE)
    for prefix, factor, part in (("", 1.0, where & region), ("guessed_", 0.5, where & ~region)):
        for name, value in dice_cross_entropy(logits, label, part, background=False).items():
            assert terms[prefix + name].item() == pytest.approx(factor * value.item(), rel=1e-4)


def test_the_first_part_of_the_run_is_supervised_copy_paste() -> None:
    method = build(CopyPaste, settings(warm_up=0.5))
    batch = paired()
    views = views_of(method, batch)
    labelled, among, *_ = of(views)  # type: ignore[arg-type]
    assert labelled.label is not None
    box = among.drawn["box"][:, 0]
    label = torch.where(box, labelled.label.flip(0), labelled.label)
    where = torch.where(box[:, None], labelled.inside.flip(0), labelled.inside)
    expected = dice_cross_entropy(method.networks[0](among.image), label, where, background=False)
    for step, warm in ((Step(49, 100), True), (Step(50, 100), False)):
        terms = method.losses(views, step)
        assert (set(terms) == set(expected)) is warm
        if warm:
            for name, value in expected.items():
                assert terms[name].item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize(("weight", "step"), [(0.0, LATE), (0.5, EARLY)])
def test_unlabelled_images_have_no_influence_at_weight_zero_nor_in_the_first_part(weight: float, step: Step) -> None:
    method, batch = build(CopyPaste, settings(weight)), paired()
    first, second = (
        gradients_of(method, method.losses(views_of(method, each), step))
        for each in (batch, with_other_unlabelled(batch))
    )
    assert same_gradients(first, second)


def test_a_guess_is_one_piece_of_each_class_and_padding_is_in_none() -> None:
    for keeps in (True, False):
        method = build(CopyPaste, settings(largest_component=keeps))
        *_, plain = of(views_of(method, paired(margin=6)))[:3]  # type: ignore[arg-type]
        # Two blocks of unlike size, and one that lies outside of the volume.
        probabilities = torch.zeros(2, 2, 16, 16)
        probabilities[:, 0] = 1
        inside = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
        inside[..., :12] = True
        for rows, columns in ((slice(0, 3), slice(0, 3)), (slice(6, 8), slice(4, 6)), (slice(10, 16), slice(12, 16))):
            probabilities[:, 1, rows, columns] = 5
        plain.inside = inside
        method.taught = lambda image, found=probabilities: found  # type: ignore[method-assign, misc]
        assert method.guessed(plain).flatten(1).sum(dim=1).tolist() == [9 if keeps else 13] * 2


def test_the_teacher_and_not_the_student_guesses_and_gets_no_gradient() -> None:
    method = build(CopyPaste, settings(largest_component=False))
    answer(method.teacher["network"], 0.0, 9.0)
    *_, plain = of(views_of(method, paired()))[:3]  # type: ignore[arg-type]
    assert bool((method.guessed(plain) == 1).all())
    assert weights_out_of_reach(method, paired()) == []
    assert all(weight.grad is None for weight in method.teacher.parameters())


@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_reach_every_trained_weight(dimensions: int) -> None:
    assert (
        weights_out_of_reach(build(CopyPaste, settings(), dimensions=dimensions), paired(dimensions=dimensions)) == []
    )


def test_ignored_and_padding_voxels_have_no_influence() -> None:
    method = build(CopyPaste, settings(largest_component=False))
    views = views_of(method, paired(margin=6))
    labelled = of(views)[0]  # type: ignore[arg-type]
    assert labelled.label is not None
    labelled.label[:, 7:9] = 255
    before = {name: term.item() for name, term in method.losses(views, LATE).items()}
    labelled.label[~labelled.inside[:, 0]] = 1
    assert {name: term.item() for name, term in method.losses(views, LATE).items()} == before
    labelled.label[:, 7:9] = 1
    assert {name: term.item() for name, term in method.losses(views, LATE).items()} != before


def test_views_are_a_function_of_the_seed() -> None:
    method, batch = build(CopyPaste, settings()), paired()
    views = views_of(method, batch)
    assert same_views(views, views_of(method, batch)) and not same_views(views, views_of(method, batch, seed=1))
    one = paired(labelled=1, unlabelled=1)
    assert len(method.losses(views_of(method, one), LATE)) == 4
