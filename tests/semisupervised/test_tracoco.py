"""TraCoCo: two crops of one window, divergence over classes with a fixed target, and confident co-training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl.augmentation.correspondence import overlap_fraction
from medssl.errors import UsageError
from medssl.losses.confident import confident_regional, confident_sums
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.ramp import RampSettings
from medssl.semisupervised.tracoco import TraCoCo, TraCoCoSettings
from tests.semisupervised.helpers import (
    LATE,
    answer,
    build,
    gradients_of,
    paired,
    same_gradients,
    same_views,
    unsupervised_terms,
    views_of,
    weights_out_of_reach,
    with_other_unlabelled,
)

#: Whole voxels: no view is turned or scaled.
STRAIGHT = {"spatial": {"rotation": {"probability": 0}, "scale": {"probability": 0}, "mirror": {"probability": 0}}}


def settings(weight: float = 1.0, **values: object) -> TraCoCoSettings:
    return TraCoCoSettings(unlabelled=RampSettings(weight=weight, fraction=0), **values)  # type: ignore[arg-type]


def of(views: list[object]) -> list[SemiView]:
    return [view for view in views[1:] if isinstance(view, SemiView)]


def shared_voxels(first: SemiView, second: SemiView, row: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where two crops that were moved by whole voxels show the same ones, in each of them."""
    apart = (second.to_source_mm[row, 1:, 3] - first.to_source_mm[row, 1:, 3]).round().int().tolist()
    size = first.image.shape[2:]
    a = tuple(slice(max(0, d), edge + min(0, d)) for d, edge in zip(apart, size, strict=True))
    b = tuple(slice(max(0, -d), edge + min(0, -d)) for d, edge in zip(apart, size, strict=True))
    return a, b


def test_the_crops_share_voxels_and_differ_in_what_surrounds_them() -> None:
    method = build(TraCoCo, settings(), overrides=STRAIGHT)
    _, _, first, second = of(views_of(method, paired(unlabelled=4, margin=3)))  # type: ignore[arg-type]
    assert not torch.equal(first.to_source_mm, second.to_source_mm)
    for row in range(4):
        a, b = shared_voxels(first, second, row)
        assert torch.equal(first.image[row, 0][a], second.image[row, 0][b])
        expected = torch.zeros(16, 16, dtype=torch.bool)
        expected[b] = first.inside[row, 0][a] & second.inside[row, 0][b]
        assert torch.equal(second.drawn["shared"][row, 0], expected)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_the_overlap_is_drawn_from_its_range(dimensions: int) -> None:
    method = build(TraCoCo, settings(overlap=(0.5, 0.7)), dimensions=dimensions, overrides=STRAIGHT)
    _, _, first, second = of(views_of(method, paired(dimensions=dimensions, unlabelled=8)))  # type: ignore[arg-type]
    overlap = overlap_fraction(second, first)
    assert 0.5 <= overlap.min() <= overlap.max() <= 0.7 and overlap.std() > 0.01


def test_both_crops_are_turned_scaled_and_mirrored_alike() -> None:
    always = {"probability": 1.0}
    method = build(TraCoCo, settings(), overrides={"spatial": {"rotation": always, "scale": always, "mirror": always}})
    _, _, first, second = of(views_of(method, paired(unlabelled=4)))  # type: ignore[arg-type]
    torch.testing.assert_close(first.to_source_mm[:, :, :3], second.to_source_mm[:, :, :3])
    assert not torch.equal(first.to_source_mm[:, :, 3], second.to_source_mm[:, :, 3])


def test_an_overlap_that_was_not_read_names_the_remedy() -> None:
    method = build(TraCoCo, settings(overlap=(0.0, 0.05)))
    with pytest.raises(UsageError, match=r"overlap by at least 0\.25 .*spatial\.shift"):
        views_of(method, paired())


def test_the_first_network_sees_noise_and_the_second_one_boxes_of_a_batch_mate() -> None:
    method = build(TraCoCo, settings())
    noise, mixed, first, _ = of(views_of(method, paired(dimensions=2, unlabelled=2)))  # type: ignore[arg-type]
    difference = (noise.image - first.image)[first.inside]
    assert 0 < difference.abs().max() <= 0.2 + 1e-6
    assert torch.equal(mixed.image, torch.where(mixed.drawn["box"], first.image.flip(0), first.image))


def test_boxes_are_cuboids_and_not_columns() -> None:
    method = build(TraCoCo, settings(), dimensions=3)
    box = of(views_of(method, paired(dimensions=3)))[1].drawn["box"]  # type: ignore[arg-type]
    for row in range(2):
        assert all(edge < 16 for edge in box[row, 0].nonzero().amax(dim=0) - box[row, 0].nonzero().amin(dim=0) + 1)


def test_the_translation_is_the_divergence_over_classes_at_shared_voxels() -> None:
    method = build(TraCoCo, settings(confident=0.0, spread=0.0), classes=3, overrides=STRAIGHT)
    views = of(views_of(method, paired(classes=3, margin=3)))  # type: ignore[arg-type]
    *_, first, second = views
    expected = 0.0
    for network in method.networks:
        q, p = (network(view.image).detach().softmax(dim=1) for view in (first, second))
        values = []
        for row in range(2):
            a, b = shared_voxels(first, second, row)
            divergence = (q[row][:, *a] * (q[row][:, *a] / p[row][:, *b]).log()).sum(dim=0)
            values.append(divergence[second.drawn["shared"][row, 0][b]])
        expected += 0.3 * float(torch.cat(values).mean())
    assert method.unsupervised(views, LATE)["translation"].item() == pytest.approx(expected, rel=1e-3)


def test_two_crops_with_one_answer_have_no_divergence_and_the_answers_entropy() -> None:
    method = build(TraCoCo, settings())
    for network in method.networks:
        answer(network, math.log(0.8), math.log(0.2))
    terms = unsupervised_terms(method, views_of(method, paired()))
    assert terms["translation"].item() == pytest.approx(0, abs=1e-6)
    entropy = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert terms["spread"].item() == pytest.approx(-0.1 * 2 * entropy, rel=1e-4)
    # Sure of class 0; class 1 is not below a tenth.
    assert terms["confident"].item() == pytest.approx(0.3 * 2 * 0.8 * -math.log(0.8), rel=1e-4)


def test_the_target_of_the_translation_does_not_learn() -> None:
    method = build(TraCoCo, settings(confident=0.0, spread=0.0), overrides=STRAIGHT)
    views = of(views_of(method, paired()))  # type: ignore[arg-type]
    *_, first, second = views
    mine = gradients_of(method, {"translation": method.unsupervised(views, LATE)["translation"]})
    fixed = [network(first.image).detach().softmax(dim=1) for network in method.networks]
    total = torch.zeros(())
    for network, q in zip(method.networks, fixed, strict=True):
        logs = network(second.image).log_softmax(dim=1)
        parts, count = [], 0
        for row in range(2):
            a, b = shared_voxels(first, second, row)
            parts.append((q[row][:, *a] * (q[row][:, *a].log() - logs[row][:, *b])).sum())
            count += q[row, 0][a].numel()
        total = total + 0.3 * torch.stack(parts).sum() / count
    expected = gradients_of(method, {"translation": total})
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-5)


def test_each_network_is_taught_by_the_other_one() -> None:
    method = build(TraCoCo, settings(translation=0.0, spread=0.0, sure=0.4, excluded=0.6))
    views = of(views_of(method, paired(margin=6)))  # type: ignore[arg-type]
    noise, mixed, first, _ = views

    def error(logits: Tensor, target: Tensor, where: Tensor) -> float:
        terms = confident_regional(confident_sums(logits, target, where, sure=0.4, excluded=0.6))
        return float((terms["positive"] + terms["negative"]).detach())

    one, two = (network(first.image).detach().softmax(dim=1) for network in method.networks)
    cut = torch.where(mixed.drawn["box"], one.flip(0), one)
    inside = torch.where(mixed.drawn["box"], first.inside.flip(0), first.inside)
    expected = error(method.networks[0](noise.image), two, first.inside)
    expected += error(method.networks[1](mixed.image), cut, inside)
    assert method.unsupervised(views, LATE)["confident"].item() == pytest.approx(0.3 * expected, rel=1e-4)


def test_voxels_that_one_crop_does_not_show_have_no_influence_on_the_agreement() -> None:
    method = build(TraCoCo, settings(confident=0.0), overrides=STRAIGHT)
    views = of(views_of(method, paired(margin=3)))  # type: ignore[arg-type]
    shared = views[3].drawn["shared"]
    outputs = [torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for network in method.networks:
        network.forward = lambda image: outputs[0] if image is not views[3].image else outputs[1]
    before = [term.item() for term in method.unsupervised(views, LATE).values()]
    outputs[1] = torch.where(shared, outputs[1], 50.0 * torch.randn(2, 2, 16, 16))
    assert [term.item() for term in method.unsupervised(views, LATE).values()] == before


@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_reach_every_trained_weight(dimensions: int) -> None:
    assert weights_out_of_reach(build(TraCoCo, settings(), dimensions=dimensions), paired(dimensions=dimensions)) == []


def test_weight_zero_leaves_no_influence_of_unlabelled_images() -> None:
    method, batch = build(TraCoCo, settings(0.0)), paired()
    first, second = (
        gradients_of(method, method.losses(views_of(method, each), LATE))
        for each in (batch, with_other_unlabelled(batch))
    )
    assert same_gradients(first, second)


def test_views_are_a_function_of_the_seed() -> None:
    method, batch = build(TraCoCo, settings()), paired()
    views = views_of(method, batch)
    assert same_views(views, views_of(method, batch)) and not same_views(views, views_of(method, batch, seed=1))
