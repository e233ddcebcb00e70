"""UniMatch: two mixed strong views and one of dropped features learn what the weak view is sure of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.ramp import RampSettings
from medssl.semisupervised.unimatch import UniMatch, UniMatchSettings
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


def settings(threshold: float = 0.95, weight: float = 1.0, **values: float) -> UniMatchSettings:
    return UniMatchSettings(
        threshold=threshold, unlabelled=RampSettings(weight=weight, fraction=0), **{"cutmix": 1.0, **values}
    )  # type: ignore[arg-type]


def of(views: list[object]) -> list[SemiView]:
    return [view for view in views[1:] if isinstance(view, SemiView)]


def error(logits: Tensor, guess: Tensor, threshold: float, where: Tensor) -> float:
    """Masked cross-entropy: its sum over sure voxels that count, by the number of all that count."""
    best, label = guess.max(dim=1)
    taken = (best >= threshold) & where[:, 0]
    assert 0 < taken.sum() < where.sum()
    return float(torch.nn.functional.cross_entropy(logits, label, reduction="none")[taken].sum() / where.sum())


def test_the_strong_views_have_a_quarter_each_and_the_features_a_half() -> None:
    method = build(UniMatch, settings(0.89))
    answer(method.networks[0], math.log(0.1), math.log(0.9))
    terms = unsupervised_terms(method, views_of(method, paired()))
    assert terms["strong_pseudo_label"].item() == pytest.approx(-math.log(0.9) / 2, rel=1e-5)
    assert terms["feature_pseudo_label"].item() == pytest.approx(-math.log(0.9) / 2, rel=1e-5)
    method.settings = settings(0.91)
    assert all(term.item() == 0 for term in unsupervised_terms(method, views_of(method, paired())).values())


def test_labels_and_certainty_of_a_strong_view_are_cut_and_pasted_as_its_image_is() -> None:
    method = build(UniMatch, settings(0.7), classes=3)
    weak, *strong = of(views_of(method, paired(classes=3, unlabelled=3, margin=6)))  # type: ignore[arg-type]
    assert len(strong) == 2
    guess = method.networks[0](weak.image).detach().softmax(dim=1)
    expected = []
    for view in strong:
        target, where = guess.clone(), weak.inside.clone()
        for row in range(3):
            other, box = int(view.drawn["partner"][row]), view.drawn["box"][row, 0]
            assert other != row
            target[row, :, box], where[row, :, box] = guess[other, :, box], weak.inside[other, :, box]
        assert torch.equal(view.inside, where)
        expected.append(error(method.networks[0](view.image).detach(), target, 0.7, where))
    terms = method.unsupervised([weak, *strong], LATE)
    assert terms["strong_pseudo_label"].item() == pytest.approx(sum(expected) / 4, rel=1e-4)


def test_features_of_every_stage_are_dropped_by_the_drawn_factors() -> None:
    method = build(UniMatch, settings(0.7))
    weak, *strong = of(views_of(method, paired()))  # type: ignore[arg-type]
    unet, factors = method.network, weak.drawn["kept"].split(list(method.encoder.widths), dim=1)
    features = [
        stage * factor[:, :, None, None]
        for stage, factor in zip(unet.encoder(weak.image), factors, strict=True)  # type: ignore[operator]
    ]
    assert set(weak.drawn["kept"].flatten().tolist()) == {0.0, 2.0}
    guess = unet(weak.image).detach().softmax(dim=1)
    expected = error(unet.decoder(features).detach(), guess, 0.7, weak.inside)  # type: ignore[operator]
    terms = method.unsupervised([weak, *strong], LATE)
    assert terms["feature_pseudo_label"].item() == pytest.approx(expected / 2, rel=1e-4)


def test_the_three_views_show_the_same_voxels_outside_boxes_of_their_own() -> None:
    method = build(UniMatch, settings())
    weak, first, second = of(views_of(method, paired(unlabelled=4)))  # type: ignore[arg-type]
    assert torch.equal(weak.to_source_mm, first.to_source_mm) and torch.equal(first.to_source_mm, second.to_source_mm)
    assert not torch.equal(first.drawn["box"], second.drawn["box"])
    assert not torch.equal(first.image, second.image)


def test_without_cutmix_the_strong_views_are_whole() -> None:
    method = build(UniMatch, settings(cutmix=0.0))
    batch = paired()
    for view in of(views_of(method, batch))[1:]:  # type: ignore[arg-type]
        assert view.drawn["partner"].tolist() == [0, 1]


def test_views_are_a_function_of_the_seed() -> None:
    method, batch = build(UniMatch, settings()), paired()
    views = views_of(method, batch)
    assert same_views(views, views_of(method, batch)) and not same_views(views, views_of(method, batch, seed=1))


@pytest.mark.parametrize("dimensions", [2, 3])
def test_gradients_reach_every_trained_weight(dimensions: int) -> None:
    method = build(UniMatch, settings(0.0), dimensions=dimensions)
    assert weights_out_of_reach(method, paired(dimensions=dimensions)) == []


def test_each_stream_teaches_and_the_label_does_not_learn() -> None:
    method = build(UniMatch, settings(0.0))
    views = of(views_of(method, paired()))  # type: ignore[arg-type]
    for name in ("strong_pseudo_label", "feature_pseudo_label"):
        method.zero_grad()
        method.unsupervised(views, LATE)[name].backward()
        assert all(weight.grad is not None for weight in method.parameters() if weight.requires_grad)


def test_weight_zero_leaves_the_supervised_gradients() -> None:
    assert equals_supervised_at_weight_zero(build(UniMatch, settings(0.5, 0.0)), paired())
