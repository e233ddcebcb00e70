"""SimSiam."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medssl.pretraining.simsiam import SimSiam, SimSiamSettings, direction_std
from tests.pretraining.head_training import train_heads
from tests.pretraining.joint_cases import STEP, chosen, freeze_features, health_of, method_of, total, train, views_of


def simsiam_of(size: tuple[int, ...] = (16, 16), **settings: Any) -> SimSiam:
    return method_of(SimSiam, size, **{"predictor_hidden": 4, **settings})


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_gradients_reach_every_trained_weight(size: tuple[int, ...]) -> None:
    method = simsiam_of(size)
    views = views_of(method)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    train(method, views, 1)
    method.zero_grad()
    total(method.losses(views, STEP)).backward()
    for name, weight in method.named_parameters():
        if name.startswith("network.decoder."):
            assert not weight.requires_grad, name
        else:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_no_gradient_flows_through_what_is_guessed() -> None:
    method = simsiam_of()
    views = views_of(method)
    assert method.losses(views, STEP)["similarity"].requires_grad
    # The targets alone are left.
    method.predict = lambda projection: torch.ones_like(projection)  # type: ignore[method-assign]
    assert not method.losses(views, STEP)["similarity"].requires_grad


def test_the_loss_is_minus_one_where_each_view_is_guessed_and_is_symmetric() -> None:
    method = simsiam_of()
    first, second = views_of(method)
    loss = method.losses([first, second], STEP)["similarity"].item()
    assert method.losses([second, first], STEP)["similarity"].item() == pytest.approx(loss, rel=1e-5)
    method.predict = lambda projection: 2 * projection  # type: ignore[method-assign]
    assert method.losses([first, first], STEP)["similarity"].item() == pytest.approx(-1.0)


def test_the_order_of_samples_does_not_matter() -> None:
    method = simsiam_of()
    views = views_of(method)
    loss = method.losses(views, STEP)["similarity"].item()
    assert method.losses(chosen(views, [3, 0, 2, 1]), STEP)["similarity"].item() == pytest.approx(loss, abs=1e-4)


def test_the_predictor_has_a_bottleneck() -> None:
    settings = SimSiamSettings()
    assert settings.predictor_hidden * 4 == settings.projector.width
    assert settings.projector.layers == 3 and settings.projector.last_norm


def test_the_deviation_of_even_directions_is_one_over_the_root_of_their_width() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 32, generator=generator)
    plain = torch.nn.functional.normalize(rows, dim=1).std(dim=0).mean().item()
    assert plain == pytest.approx(1 / math.sqrt(32), rel=0.02)
    assert direction_std(rows).item() == pytest.approx(1.0, rel=0.02)
    assert direction_std(7 * rows).item() == pytest.approx(direction_std(rows).item(), rel=1e-5)
    assert direction_std(rows[:1].expand(5, 32)).item() == pytest.approx(0.0, abs=1e-6)


def test_health_tells_collapse_and_a_missing_predictor() -> None:
    method = simsiam_of()
    views = views_of(method)
    healthy = health_of(method, views)
    assert 0.5 < healthy["direction_std"] < 1.1 and healthy["predictor_gain"] != 0
    method.predictor = torch.nn.Identity()
    assert health_of(method, views)["predictor_gain"] == 0
    freeze_features(method)
    collapsed = health_of(method, views)
    assert collapsed["direction_std"] < 1e-4 and collapsed["feature_std"] == 0


def test_three_volumes_get_one_direction_without_a_predictor_and_not_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    for broken in (False, True):
        # The norm behind the projection would keep directions apart whatever happens before it.
        projector = {"hidden": 64, "width": 64, "layers": 3, "last_norm": False}
        method = simsiam_of(projector=projector, predictor_hidden=16)
        if broken:
            method.predictor = torch.nn.Identity()
        figures.append(health_of(method, train_heads(method, monkeypatch)))
    healthy, collapsed = figures
    assert collapsed["direction_std"] < 0.65 * healthy["direction_std"]
    assert collapsed["negative_similarity"] > healthy["negative_similarity"] + 0.3
