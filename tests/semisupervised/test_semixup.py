"""Semixup: three consistencies on all images, with gradients through both sides, and blended labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medssl.data.draw import Draw
from medssl.semisupervised.batch import PairedBatch, SemiView
from medssl.semisupervised.ramp import RampSettings
from medssl.semisupervised.semixup import Semixup, SemixupSettings, draw_blend
from medssl.training.method import Step
from tests.semisupervised.helpers import (
    LATE,
    build,
    gradients_of,
    paired,
    same_gradients,
    same_views,
    views_of,
    weights_out_of_reach,
    with_other_unlabelled,
)


def settings(weight: float = 1.0, **values: float) -> SemixupSettings:
    return SemixupSettings(unlabelled=RampSettings(weight=weight, fraction=0), **values)


def method_of(weight: float = 1.0, **values: float) -> Semixup:
    return build(Semixup, settings(weight, **values), "classification", classes=3)


def batch_of() -> PairedBatch:
    return paired("classification", classes=3, labelled=3, unlabelled=4)


def of(views: list[object]) -> list[SemiView]:
    return [view for view in views if isinstance(view, SemiView)]


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Squared difference, summed over classes, by the number of classes, mean over images."""
    return ((a - b) ** 2).sum(dim=1).div(a.shape[1]).mean()


def definition(network: nn.Module, views: list[SemiView]) -> dict[str, Tensor]:
    mixed, augmented, plain = views
    z, p = network(plain.image), network(plain.image).softmax(dim=1)
    p_augmented, p_mixed = network(augmented.image).softmax(dim=1), network(mixed.image).softmax(dim=1)
    part = mixed.drawn["weight"][:, None]
    between = (part * z + (1 - part) * z[mixed.drawn["partner"]]).softmax(dim=1)
    return {
        "in_manifold": 2 * mse(p_augmented, p),
        "interpolation": 4 * mse(p_mixed, between),
        "out_of_manifold": 2 * (mse(p, p_mixed) + mse(p_mixed, p_augmented)),
    }


def test_terms_and_gradients_equal_their_definition_with_nothing_detached() -> None:
    method = method_of()
    _, _, *pool = of(views_of(method, batch_of()))
    names = list(method.unsupervised(pool, LATE))
    assert names == ["in_manifold", "interpolation", "out_of_manifold"]
    for name in names:
        term, expected = method.unsupervised(pool, LATE)[name], definition(method.networks[0], pool)[name]
        assert term.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)
        mine, theirs = gradients_of(method, {name: term}), gradients_of(method, {name: expected})
        for weight, gradient in theirs.items():
            torch.testing.assert_close(mine[weight], gradient, rtol=1e-3, atol=1e-7)


def test_the_labels_of_a_blend_cost_what_each_of_them_costs_by_its_part() -> None:
    method = method_of()
    views = views_of(method, batch_of())
    mixed, labelled, *_ = of(views)
    assert labelled.shows is not None
    logits, part = method.networks[0](mixed.image), mixed.drawn["weight"]
    error = nn.CrossEntropyLoss(reduction="none")
    expected = part * error(logits, labelled.shows)
    expected = expected + (1 - part) * error(logits, labelled.shows[mixed.drawn["partner"]])
    assert part.min() >= 0.5
    assert method.losses(views, LATE)["cross_entropy"].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    other = labelled.image[mixed.drawn["partner"]]
    shape = part[:, None, None, None]
    torch.testing.assert_close(mixed.image, shape * labelled.image + (1 - shape) * other)


def test_labelled_images_are_in_the_pool_and_blended_with_unlabelled_ones() -> None:
    method, batch = method_of(), batch_of()
    _, _, mixed, augmented, plain = of(views_of(method, batch))
    assert len(mixed.image) == len(augmented.image) == len(plain.image) == 7
    part = mixed.drawn["weight"][:, None, None, None]
    torch.testing.assert_close(mixed.image, part * plain.image + (1 - part) * plain.image[mixed.drawn["partner"]])
    crossed = [(row < 3) != (other < 3) for row, other in enumerate(mixed.drawn["partner"].tolist())]
    assert any(crossed)
    assert not torch.equal(plain.to_source_mm, augmented.to_source_mm)


def test_all_terms_are_there_from_the_first_step() -> None:
    defaults = SemixupSettings()
    assert defaults.unlabelled.at(Step(0, 100)) == 1
    assert (defaults.in_manifold, defaults.interpolation, defaults.out_of_manifold) == (2, 4, 2)


def test_parts_of_a_blend_follow_the_beta_distribution_above_the_least_part() -> None:
    drawn = draw_blend(Draw(0, range(4000)), 0.75, 0.55, ["MR"] * 4000)["weight"]
    reference = torch.from_numpy(np.random.default_rng(0).beta(0.75, 0.75, 200_000)).float()
    reference = torch.maximum(reference, 1 - reference)
    reference = reference[reference >= 0.55]
    assert drawn.min() >= 0.55 and drawn.max() <= 1
    for quantile in (0.1, 0.5, 0.9):
        assert drawn.quantile(quantile).item() == pytest.approx(reference.quantile(quantile).item(), abs=0.015)


def test_views_are_a_function_of_the_seed() -> None:
    method, batch = method_of(), batch_of()
    views = views_of(method, batch)
    again, other = views_of(method, batch), views_of(method, batch, seed=1)
    assert same_views(views, again) and not same_views(views, other)


def test_gradients_reach_every_trained_weight() -> None:
    assert weights_out_of_reach(method_of(), batch_of()) == []


def test_with_weight_zero_unlabelled_images_have_no_influence() -> None:
    batch = paired("classification", classes=3, labelled=3)
    for weight, expected in ((0.0, True), (1.0, False)):
        method = method_of(weight)
        found = [
            gradients_of(method, method.losses(views_of(method, each), LATE))
            for each in (batch, with_other_unlabelled(batch))
        ]
        assert same_gradients(*found) == expected
