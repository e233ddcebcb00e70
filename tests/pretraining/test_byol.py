"""BYOL."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medssl.data.batch import View
from medssl.pretraining.byol import BYOL
from tests.pretraining.head_training import train_heads
from tests.pretraining.joint_cases import (
    STEP,
    chosen,
    freeze_features,
    health_of,
    method_of,
    total,
    train,
    views_of,
)


def byol_of(size: tuple[int, ...] = (16, 16), **settings: Any) -> BYOL:
    return method_of(BYOL, size, **{"predictor_hidden": 12, **settings})


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_gradients_reach_every_trained_weight_and_none_reaches_the_teacher(size: tuple[int, ...]) -> None:
    method = byol_of(size)
    views = views_of(method)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    train(method, views, 1)
    method.zero_grad()
    total(method.losses(views, STEP)).backward()
    for name, weight in method.named_parameters():
        if name.startswith(("network.decoder.", "teacher.")):
            assert not weight.requires_grad and weight.grad is None, name
        else:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_the_loss_compares_each_view_with_the_teachers_other_view() -> None:
    method = byol_of()
    views = views_of(method, 2)
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    guesses = {id(views[0]): rows.flip(0), id(views[1]): 3 * rows}
    targets = {id(views[0]): rows, id(views[1]): rows.flip(0)}

    def predict(view: View) -> torch.Tensor:
        return guesses[id(view)]

    def target(view: View) -> torch.Tensor:
        return targets[id(view)]

    method.predict, method.target = predict, target  # type: ignore[method-assign]
    # Each guess lies on the other view's target and at right angles to its own.
    assert method.losses(views, STEP)["distance"].item() == pytest.approx(0.0, abs=1e-6)
    targets = {key: rows - rows.flip(0) for key in targets}
    assert method.losses(views, STEP)["distance"].item() == pytest.approx(4.0)


def test_order_of_views_and_of_samples_does_not_matter() -> None:
    method = byol_of()
    views = views_of(method)
    loss = method.losses(views, STEP)["distance"].item()
    assert method.losses(views[::-1], STEP)["distance"].item() == pytest.approx(loss, rel=1e-5)
    assert method.losses(chosen(views, [2, 0, 3, 1]), STEP)["distance"].item() == pytest.approx(loss, rel=1e-4)


def test_the_teacher_stands_still_in_losses_and_follows_after_the_step() -> None:
    method = byol_of(teacher={"momentum": 0.75, "final": 0.75})
    views = views_of(method)
    before = [weight.clone() for weight in method.teacher.parameters()]
    total(method.losses(views, STEP)).backward()
    assert all(torch.equal(old, new) for old, new in zip(before, method.teacher.parameters(), strict=True))
    head = method.teacher["projector"][0].weight.clone()  # type: ignore[index]
    with torch.no_grad():
        method.projector[0].weight.add_(1)  # type: ignore[operator]
    method.after_step(STEP)
    torch.testing.assert_close(method.teacher["projector"][0].weight, head + 0.25)  # type: ignore[index]


def test_the_teacher_at_the_start_says_what_the_student_says() -> None:
    method = byol_of()
    (view, _) = views_of(method)
    torch.testing.assert_close(method.target(view), method.projector(method.features(view)))


def test_the_predictors_gradient_follows_the_control_of_the_length() -> None:
    gradients = []
    for power in (0.0, 1.0):
        method = byol_of(embedding_norm={"gradient_power": power})
        total(method.losses(views_of(method), STEP)).backward()
        gradients.append(method.predictor[-1].weight.grad)  # type: ignore[index]
    assert not torch.allclose(gradients[0], gradients[1])


def test_without_a_predictor_its_gain_is_nothing() -> None:
    method = byol_of()
    views = views_of(method)
    assert health_of(method, views)["predictor_gain"] != 0
    method.predictor = torch.nn.Identity()
    assert health_of(method, views)["predictor_gain"] == 0


@pytest.mark.parametrize(("momentum", "follows"), [(0.0, True), (0.9, False)])
def test_the_lag_tells_a_teacher_that_is_the_student(momentum: float, follows: bool) -> None:
    method = byol_of(teacher={"momentum": momentum, "final": momentum})
    views = views_of(method)
    train(method, views, 2)
    assert (health_of(method, views)["teacher_lag"] < 1e-6) == follows


def test_health_tells_collapse() -> None:
    method = byol_of()
    views = views_of(method)
    healthy = health_of(method, views)
    assert healthy["projection_std"] > 0.1 and healthy["feature_std"] > 1e-3 and healthy["effective_rank"] > 1.5
    freeze_features(method)
    collapsed = health_of(method, views)
    assert collapsed["feature_std"] == 0 and collapsed["projection_std"] < 1e-4
    assert collapsed["effective_rank"] == pytest.approx(1.0, abs=1e-3)


def test_losses_are_float32_under_bfloat16() -> None:
    method = byol_of()
    views = views_of(method)
    with torch.autocast("cpu", torch.bfloat16):
        loss = method.losses(views, STEP)["distance"]
    assert loss.dtype == torch.float32 and math.isfinite(loss.item())


def test_three_volumes_get_one_projection_without_a_predictor_and_not_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    for broken in (False, True):
        method = byol_of(projector={"hidden": 64, "width": 32}, predictor_hidden=64)
        if broken:
            method.predictor = torch.nn.Identity()
        figures.append(health_of(method, train_heads(method, monkeypatch)))
    healthy, collapsed = figures
    assert collapsed["negative_similarity"] > healthy["negative_similarity"] + 0.3
    assert collapsed["projection_std"] < 0.75 * healthy["projection_std"]
