"""Barlow Twins and Mixed Barlow Twins."""

from __future__ import annotations

import pytest
import torch

from medssl.config import check_settings
from medssl.data.draw import Draw
from medssl.losses.decorrelation import barlow_twins, mixed_barlow
from medssl.pretraining.barlow_twins import BarlowTwins, BarlowTwinsSettings
from medssl.pretraining.decorrelation import correlation_figures
from medssl.training.method import Step
from tests.pretraining.joint_cases import STEP, freeze_features, health_of, method_of, total, train, views_of
from tests.pretraining.test_mae import batch_of


def test_the_loss_is_that_of_the_two_views_projections() -> None:
    method = method_of(BarlowTwins, off_diagonal_weight=0.1)
    views = views_of(method)
    expected = barlow_twins(method.project(views[0]), method.project(views[1]), off_diagonal_weight=0.1)
    terms = method.losses(views, STEP)
    assert set(terms) == {"correlation"} and terms["correlation"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_projector_is_the_papers_three_layers_and_ends_without_norm_and_bias() -> None:
    # What is said of its width leaves the number of layers as it is.
    assert check_settings(BarlowTwinsSettings, {"projector": {"width": 64}}, "test").projector.layers == 3
    *_, last = projector = list(method_of(BarlowTwins).projector)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in projector) == 3
    assert isinstance(last, torch.nn.Linear) and last.bias is None


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_mixed_images_lie_between_view_a_and_view_b_of_another_sample(size: tuple[int, ...]) -> None:
    method = method_of(BarlowTwins, size, mixing=5.0)
    first, second, mixed = views_of(method)
    drawn = mixed.parameters["mixing"]
    assert sorted(drawn["partner"].tolist()) == [0, 1, 2, 3]
    assert all(partner != own for own, partner in enumerate(drawn["partner"].tolist()))
    assert len(set(drawn["weight"].tolist())) == 4
    for i, (partner, share) in enumerate(zip(drawn["partner"].tolist(), drawn["weight"].tolist(), strict=True)):
        expected = share * first.image[i] + (1 - share) * second.image[partner]
        torch.testing.assert_close(mixed.image[i], expected)
        assert torch.equal(mixed.inside[i], first.inside[i] & second.inside[partner])


def test_without_mixing_there_are_two_views_and_the_same_ones() -> None:
    plain, mixed = views_of(method_of(BarlowTwins)), views_of(method_of(BarlowTwins, mixing=1.0))
    assert len(plain) == 2 and len(mixed) == 3
    assert all(torch.equal(a.image, b.image) for a, b in zip(plain, mixed, strict=False))


def test_what_is_mixed_depends_on_seed_and_sample_alone() -> None:
    method = method_of(BarlowTwins, mixing=1.0)
    batch = batch_of(method, 4)  # type: ignore[arg-type]
    drawn = [
        method.views(batch, Draw(seed, batch.sample_index))[2].parameters["mixing"]["weight"] for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_regulariser_is_weighed_by_mixing_and_lambda() -> None:
    method = method_of(BarlowTwins, mixing=5.0, off_diagonal_weight=0.02)
    views = views_of(method)
    first, second, mixed = (method.project(view) for view in views)
    drawn = views[2].parameters["mixing"]
    expected = mixed_barlow(mixed, first, second, second[drawn["partner"]], share=drawn["weight"])
    assert method.losses(views, STEP)["mixing"].item() == pytest.approx(5 * 0.02 * expected.item(), rel=1e-5)


def test_the_regulariser_is_nothing_for_features_that_are_linear_in_the_image() -> None:
    # Zero up to what the three batches' own standardisation makes of it: the features are standardised already.
    method = method_of(BarlowTwins, mixing=5.0)
    views = views_of(method)
    drawn = views[2].parameters["mixing"]
    first = torch.randn(4, 8)
    second = first + 0.1 * torch.randn(4, 8)
    share = drawn["weight"][:, None]
    linear = share * first + (1 - share) * second[drawn["partner"]]
    near = method.objective([first, second, linear], views, STEP)["mixing"].item()
    far = method.objective([first, second, linear.roll(1, 0)], views, STEP)["mixing"].item()
    assert near < 0.5 * far


def test_health_shows_constant_features_and_features_that_are_all_one() -> None:
    method = method_of(BarlowTwins)
    views = views_of(method)
    healthy = health_of(method, views)
    assert healthy["correlation_diagonal"] > 0.05 and healthy["correlation_off_diagonal"] < 0.95
    with torch.no_grad():
        weight = method.projector[-1].weight
        weight.copy_(weight[:1].expand_as(weight))  # type: ignore[union-attr, operator, arg-type]
    redundant = health_of(method, views)
    assert redundant["correlation_off_diagonal"] == pytest.approx(abs(redundant["correlation_diagonal"]), rel=1e-3)
    assert redundant["effective_rank"] == pytest.approx(1, abs=1e-3)
    freeze_features(method)
    constant = health_of(method, views)
    assert constant["correlation_diagonal"] == pytest.approx(0, abs=1e-4)
    assert constant["variance_std"] == pytest.approx(0, abs=1e-5)


def test_correlation_figures_have_their_values_at_the_ends() -> None:
    rows = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert correlation_figures(rows, rows) == pytest.approx(
        {"correlation_diagonal": 1, "correlation_off_diagonal": 0}, abs=1e-4
    )
    same = rows[:, :1].expand(4, 2)
    assert correlation_figures(same, same) == pytest.approx(
        {"correlation_diagonal": 1, "correlation_off_diagonal": 1}, abs=1e-4
    )


def test_the_correlation_comes_nearer_to_the_identity() -> None:
    method = method_of(BarlowTwins)
    views = views_of(method, 6)
    before = total(method.losses(views, Step(0, 20))).item()
    train(method, views, 10, rate=0.01, of=20)
    assert total(method.losses(views, Step(10, 20))).item() < 0.8 * before
