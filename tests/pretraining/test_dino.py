"""DINO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medssl.augmentation.correspondence import to_source_mm
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.batch import View
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.networks.build import build_network
from medssl.networks.encoder import Encoder
from medssl.pretraining.dino import DINO, DINOSettings, local_size, sorting_health
from medssl.pretraining.distillation import Prototypes
from medssl.training.method import Step
from tests.pretraining.head_training import train_heads
from tests.pretraining.joint_cases import STEP, chosen, freeze_features, health_of, method_of, total, train, views_of
from tests.pretraining.test_mae import batch_of


def dino_of(size: tuple[int, ...] = (16, 16), **settings: Any) -> DINO:
    return method_of(DINO, size, **{"prototypes": 12, "local_crops": 1, **settings})


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_gradients_reach_every_trained_weight_and_none_reaches_the_teacher(size: tuple[int, ...]) -> None:
    method = dino_of(size)
    views = views_of(method)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    train(method, views, 1, start=8)
    method.zero_grad()
    total(method.losses(views, STEP)).backward()
    for name, weight in method.named_parameters():
        if name.startswith(("network.decoder.", "teacher.")):
            assert not weight.requires_grad and weight.grad is None, name
        else:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("size", "small"), [((32, 32, 16), (16, 16, 16)), ((48, 32), (24, 16))])
def test_small_views_have_half_the_patch(size: tuple[int, ...], small: tuple[int, ...]) -> None:
    method = dino_of(size, local_crops=2)
    views = views_of(method, 2)
    assert [tuple(view.image.shape[2:]) for view in views] == [size, size, small, small]
    assert method.needs_of(method.settings).views == 4
    assert not torch.equal(views[2].image, views[3].image)


def test_small_views_lie_within_the_patch_and_move_about_in_it() -> None:
    method = dino_of((48, 32))
    fixed = AugmentationSettings(overrides={"spatial": {"rotation": {"probability": 0}, "scale": {"probability": 0}}})
    method = DINO(method.network, policy_for("contrastive", {"MR"}, (48, 32), fixed), method.settings)
    batch = batch_of(method, 20)  # type: ignore[arg-type]
    view = method.views(batch, Draw(0, batch.sample_index))[2]
    read, patch, small = batch.image.shape[2:], (48, 32), view.image.shape[2:]
    corners = to_source_mm(view, torch.tensor([[[0, 0, 0], [0, small[0] - 1, small[1] - 1]]]).expand(20, 2, 3))
    for axis in (0, 1):
        first = (read[axis] - patch[axis]) / 2
        at = corners[:, :, axis + 1]
        assert at.min() >= first - 0.01 and at.max() <= first + patch[axis] - 1 + 0.01
        assert len(at[:, 0].round().unique()) > 4


def test_sizes_that_do_not_fit_are_named() -> None:
    encoder = Encoder(build_network("resenc-xs", dimensions=2))
    assert local_size(encoder, (40, 16), None) == (24, 16)
    assert local_size(encoder, (40, 16), (8, 16)) == (8, 16)
    for wrong in ((12, 16), (48, 16), (8, 8), (16,), (16, 16, 16), (0, 16)):
        with pytest.raises(UsageError, match="local_size"):
            local_size(encoder, (40, 16), wrong)


def test_the_teacher_sees_large_views_and_the_student_all() -> None:
    method = dino_of((32, 32), local_crops=2)
    views = views_of(method)
    seen: list[tuple[int, ...]] = []
    plain = method.target

    def target(view: View) -> torch.Tensor:
        seen.append(tuple(view.image.shape[2:]))
        return plain(view)

    method.target = target  # type: ignore[method-assign]
    loss = method.losses(views, STEP)["cross_entropy"].item()
    assert seen == [(32, 32), (32, 32)]
    for number in range(4):
        changed = list(views)
        changed[number] = views_of(method, 4)[number]
        changed[number].image = changed[number].image.flip(0)
        assert method.losses(changed, STEP)["cross_entropy"].item() != loss, number


def test_the_order_of_samples_does_not_matter() -> None:
    method = dino_of()
    views = views_of(method)
    loss = method.losses(views, STEP)["cross_entropy"].item()
    assert method.losses(chosen(views, [3, 0, 2, 1]), STEP)["cross_entropy"].item() == pytest.approx(loss, rel=1e-4)


def test_equal_scores_cost_the_logarithm_of_the_number_of_prototypes() -> None:
    method = dino_of()
    views = views_of(method)
    with torch.no_grad():
        for layer in (method.prototypes, method.teacher["prototypes"]):
            layer.weight.copy_(torch.ones_like(layer.weight))  # type: ignore[operator, union-attr, arg-type]
    assert method.losses(views, STEP)["cross_entropy"].item() == pytest.approx(math.log(12), rel=1e-5)


def test_the_centre_moves_after_a_step_of_training_and_not_with_a_validation() -> None:
    method = dino_of(centre_momentum=0.75)
    views = views_of(method)
    mean = torch.cat([method.target(view) for view in views[:2]]).mean(dim=0)
    method.eval()
    method.losses(views, STEP)
    method.train()
    method.after_step(STEP)
    assert method.centre.abs().max() == 0
    # Two batches of one step count as one.
    method.losses(views, STEP)
    method.losses(views, STEP)
    assert method.centre.abs().max() == 0
    method.after_step(STEP)
    torch.testing.assert_close(method.centre, mean / 4)
    method.after_step(STEP)
    torch.testing.assert_close(method.centre, mean / 4)
    assert "centre" in method.state_dict()


def test_the_centre_starts_as_the_mean_of_the_first_step() -> None:
    method = dino_of(centre_momentum=0.9)
    views = views_of(method)
    mean = torch.cat([method.target(view) for view in views[:2]]).mean(dim=0)
    method.losses(views, Step(0, 10))
    method.after_step(Step(0, 10))
    torch.testing.assert_close(method.centre, mean)


def test_prototypes_are_held_at_first_and_the_rest_learns() -> None:
    method = dino_of(hold=0.25)
    views = views_of(method)
    for index, held in ((0, True), (2, True), (3, False)):
        method.zero_grad()
        total(method.losses(views, Step(index, 10))).backward()
        gradient = method.prototypes.weight.grad
        assert gradient is not None and (gradient.abs().max().item() == 0) == held
        assert method.projector[0].weight.grad.abs().max() > 0  # type: ignore[union-attr]


def test_the_teachers_temperature_rises_along_a_line() -> None:
    settings = DINOSettings(teacher_temperature=0.04, final_temperature=0.08, warmup=0.5)
    assert [settings.temperature_at(Step(index, 100)) for index in (0, 25, 50, 99)] == pytest.approx(
        [0.04, 0.06, 0.08, 0.08]
    )
    assert DINOSettings(final_temperature=0.05, warmup=0).temperature_at(Step(0, 10)) == 0.05


def test_prototypes_give_cosines_whatever_the_lengths() -> None:
    layer, rows = Prototypes(5, 7), torch.randn(3, 5)
    scores = layer(rows)
    expected = torch.nn.functional.cosine_similarity(rows[:, None], layer.weight[None], dim=2)
    torch.testing.assert_close(scores, expected)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(7, 1) + 0.5)
    torch.testing.assert_close(layer(3 * rows), scores)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(rows), scores)


def test_figures_of_sorting_have_their_values() -> None:
    even, one = torch.full((4, 8), 1 / 8), torch.eye(8)[[3, 3, 3, 3]]
    apart = torch.eye(8)
    found = {name: sorting_health(shares) for name, shares in (("even", even), ("one", one), ("apart", apart))}
    assert found["even"] == pytest.approx(
        {"teacher_entropy": 1.0, "kl_to_uniform": 0.0, "prototypes_used": 8.0, "sorting_std": 0.0}, abs=1e-5
    )
    assert found["one"] == pytest.approx(
        {"teacher_entropy": 0.0, "kl_to_uniform": 1.0, "prototypes_used": 1.0, "sorting_std": 0.0}, abs=1e-5
    )
    assert found["apart"]["teacher_entropy"] == pytest.approx(0.0, abs=1e-6)
    assert found["apart"]["prototypes_used"] == pytest.approx(8.0, rel=1e-4)
    assert found["apart"]["sorting_std"] > 0.5


def test_health_tells_collapse_and_a_teacher_that_is_the_student() -> None:
    method = dino_of(teacher={"momentum": 0.0, "final": 0.0})
    views = views_of(method)
    assert health_of(method, views)["sorting_std"] > 0.01
    train(method, views, 1)
    assert health_of(method, views)["teacher_lag"] < 1e-6
    freeze_features(method)
    assert health_of(method, views)["feature_std"] == 0


def test_without_centring_samples_share_prototypes(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    for broken in (False, True):
        method = dino_of(projector={"hidden": 64, "width": 32, "layers": 3}, prototypes=64, local_crops=0)
        if broken:
            monkeypatch.setattr("medssl.pretraining.dino.updated_centre", lambda centre, teacher, momentum: centre)
        figures.append(health_of(method, train_heads(method, monkeypatch)))
    healthy, collapsed = figures
    assert collapsed["kl_to_uniform"] > healthy["kl_to_uniform"] + 0.1
    assert collapsed["prototypes_used"] < 0.6 * healthy["prototypes_used"]
    assert collapsed["sorting_std"] < 0.8 * healthy["sorting_std"]
