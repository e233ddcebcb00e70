"""MAE with self-distillation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.config import check_settings
from medssl.data.batch import View, Views
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.pretraining.mae import MaskedAutoencoder
from medssl.pretraining.masked_distillation import (
    MaskedDistillation,
    MaskedDistillationSettings,
    dense_error,
    mostly,
)
from tests.pretraining.joint_cases import STEP, total, train
from tests.pretraining.test_mae import batch_of

SMALL = {"mask": {"block": 4}, "projector": {"hidden": 12, "width": 8}, "predictor_hidden": 12}


def method_of(size: tuple[int, ...] = (16, 16), **settings: Any) -> MaskedDistillation:
    network = build_network("resenc-xs", dimensions=len(size), seed=0)
    freeze_unused_outputs(network)
    policy = policy_for("contrastive", {"MR"}, size, AugmentationSettings())
    torch.manual_seed(0)
    return MaskedDistillation(
        network, policy, check_settings(MaskedDistillationSettings, {**SMALL, **settings}, "test")
    )


def views_of(method: MaskedDistillation, count: int = 4, seed: int = 0) -> Views:
    batch = batch_of(method, count)
    with torch.no_grad():
        return method.views(batch, Draw(seed, batch.sample_index))


def health_of(method: MaskedDistillation, views: Views) -> dict[str, float]:
    with torch.no_grad():
        return method.health(views)


def unseen(view: View, value: float) -> View:
    """Return the view with other hidden voxels and the same target."""
    assert view.mask is not None
    target = view.image.clone() if view.target is None else view.target
    return dataclasses.replace(view, image=torch.where(view.mask, value, view.image), target=target)


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 24)])
def test_gradients_reach_every_trained_weight_and_none_reaches_the_teacher(size: tuple[int, ...]) -> None:
    method = method_of(size)
    views = views_of(method)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    train(method, views, 1)  # type: ignore[arg-type]
    method.zero_grad()
    total(method.losses(views, STEP)).backward()
    for name, weight in method.named_parameters():
        if name.startswith("teacher."):
            assert not weight.requires_grad and weight.grad is None, name
        elif weight.requires_grad:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name


def test_views_are_a_masked_crop_with_its_clean_target_and_another_crop() -> None:
    method = method_of()
    masked, second = views_of(method, 12)
    assert masked.mask is not None and second.mask is None and second.target is None
    assert masked.target is not None
    same = [torch.equal(image, target) for image, target in zip(masked.image, masked.target, strict=True)]
    assert any(same) and not all(same), "some inputs are changed in intensity, and their targets are not"
    assert not torch.equal(masked.to_source_mm, second.to_source_mm)
    assert torch.equal(masked.sample_id, second.sample_id)  # type: ignore[arg-type]


def test_reconstruction_is_that_of_the_masked_autoencoder() -> None:
    method = method_of()
    views = views_of(method)
    plain = MaskedAutoencoder.losses(method, views[:1], STEP)["reconstruction"].item()
    assert method.losses(views, STEP)["reconstruction"].item() == pytest.approx(plain, rel=1e-5)


def test_terms_are_about_one_for_a_student_that_guesses_means() -> None:
    method = method_of()
    method.dense_heads[0][-1].weight.data.zero_()  # type: ignore[index, union-attr]
    method.dense_heads[0][-1].bias.data.zero_()  # type: ignore[index, union-attr]
    terms = method.losses(views_of(method, 8), STEP)
    assert 0.5 < terms["dense"].item() < 1.2
    assert 0.5 < terms["pooled"].item() < 1.5


@pytest.mark.parametrize("fill", ["token", "zero", "mean"])
def test_hidden_voxels_of_the_input_change_no_term(fill: str) -> None:
    method = method_of(mask={"block": 4, "fill": fill})
    masked, second = views_of(method)
    first = method.losses([unseen(masked, 5.0), second], STEP)
    for name, value in method.losses([unseen(masked, -70.0), second], STEP).items():
        assert torch.equal(value, first[name]), name


def test_health_tells_a_mask_that_leaks() -> None:
    method = method_of()
    views = views_of(method)
    assert health_of(method, views)["mask_leak"] == 0
    method.blank = lambda view: view.image  # type: ignore[method-assign]
    assert health_of(method, views)["mask_leak"] > 0.01


def test_the_teacher_sees_the_whole_target_and_the_whole_second_crop() -> None:
    method = method_of()
    masked, second = views_of(method)
    seen: list[torch.Tensor] = []
    plain = method._teachers_stages

    def stages(image: torch.Tensor) -> list[torch.Tensor]:
        seen.append(image)
        return plain(image)

    method._teachers_stages = stages  # type: ignore[method-assign]
    method.losses([masked, second], STEP)
    assert [id(image) for image in seen] == [id(masked.target), id(second.image)]


def test_the_pooled_term_compares_each_crop_with_the_teachers_other_one() -> None:
    method = method_of()
    method.predictor = torch.nn.Identity()
    masked, second = views_of(method, 2)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    plain, asked = method._teachers_stages, {id(masked.target): rows, id(second.image): rows.flip(0)}
    answers: list[tuple[list[torch.Tensor], torch.Tensor]] = []

    def stages(image: torch.Tensor) -> list[torch.Tensor]:
        answers.append((plain(image), asked[id(image)]))
        return answers[-1][0]

    def projection(given: list[torch.Tensor]) -> torch.Tensor:
        return next(answer for known, answer in answers if known is given)

    # The masked crop's guess lies on the teacher's second crop, and the second's on its first.
    guesses = iter([rows.flip(0), rows])
    method._projection = lambda stages: next(guesses)  # type: ignore[method-assign]
    method._teachers_stages, method._teachers_projection = stages, projection  # type: ignore[method-assign]
    assert method.losses([masked, second], STEP)["pooled"].item() == pytest.approx(0.0, abs=1e-6)


def test_the_dense_term_asks_for_the_teachers_features_at_hidden_positions_inside_the_volume() -> None:
    method = method_of()
    masked, second = views_of(method)
    assert masked.mask is not None and masked.target is not None
    masked.inside[:, :, :4] = False
    with torch.no_grad():
        for weight in method.teacher.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    (stage,) = method.dense_stages
    guess = method.dense_heads[0](method.encoder.stages(method.blank(masked))[stage])
    features = method.teacher.encoder.stages(masked.target)[stage]
    # The masks are made of blocks of the stage's stride, and so is what lies outside.
    cells = (slice(None), slice(None), slice(None, None, 4), slice(None, None, 4))
    hidden, inside = masked.mask[cells], masked.inside[cells]
    assert torch.equal(mostly(masked.mask, (4, 4)), hidden)
    expected = dense_error(guess, features, hidden & mostly(masked.inside, (4, 4)), mostly(masked.inside, (4, 4)))
    assert not inside[:, :, 0].any()
    assert method.losses([masked, second], STEP)["dense"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 3, 4)])
def test_the_dense_error_equals_its_definition(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    guess, features = (torch.randn(shape, generator=generator) * scale for scale in (1, 4))
    inside = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.8
    where = inside & (torch.rand(inside.shape, generator=generator) < 0.6)
    errors = []
    for sample in range(shape[0]):
        for channel in range(shape[1]):
            chosen = features[sample, channel][inside[sample, 0]]
            target = (features[sample, channel] - chosen.mean()) / chosen.std(correction=0)
            for off in (guess[sample, channel] - target)[where[sample, 0]].tolist():
                errors.append(off * off if abs(off) < 1 else 2 * abs(off) - 1)
    assert dense_error(guess, features, where, inside).item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    shifted = 3 * features + 7
    assert dense_error(guess, shifted, where, inside).item() == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_a_position_is_hidden_where_most_of_its_voxels_are() -> None:
    voxels = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    voxels[..., :2, :2] = True
    voxels[..., :2, 2] = True
    voxels[..., 2:4, 4:6] = torch.tensor([[True, True], [True, False]])
    assert mostly(voxels, (2, 2))[0, 0].tolist() == [[True, False, False], [False, False, True]]
    assert mostly(torch.ones(1, 1, 4, 4, 4, dtype=torch.bool), (2, 4, 1)).shape == (1, 1, 2, 1, 4)


@pytest.mark.parametrize(("block", "stages"), [(4, (2,)), (8, (3,)), (2, (1,)), ((4, 2), (1,)), (16, (3,))])
def test_the_dense_stage_is_the_coarsest_that_a_block_covers(block: Any, stages: tuple[int, ...]) -> None:
    assert method_of((32, 32), mask={"block": block}).dense_stages == stages


def test_two_dense_stages_are_averaged() -> None:
    method = method_of(dense_stages=[-2, -1])
    assert method.dense_stages == (2, 3) and len(method.dense_heads) == 2
    assert math.isfinite(method.losses(views_of(method), STEP)["dense"].item())


def test_the_teacher_follows_after_the_step() -> None:
    method = method_of(teacher={"momentum": 0.75, "final": 0.75})
    views = views_of(method)
    before = method.teacher["projector"][0].weight.clone()  # type: ignore[index]
    with torch.no_grad():
        method.projector[0].weight.add_(1)  # type: ignore[operator]
    method.losses(views, STEP)
    assert torch.equal(method.teacher["projector"][0].weight, before)  # type: ignore[index]
    method.after_step(STEP)
    torch.testing.assert_close(method.teacher["projector"][0].weight, before + 0.25)  # type: ignore[index]


def test_health_tells_collapse_of_dense_and_of_pooled_targets() -> None:
    method = method_of()
    views = views_of(method)
    healthy = health_of(method, views)
    assert healthy["dense_std"] > 0.1 and healthy["dense_rank"] > 2 and healthy["pooled_projection_std"] > 0.1
    assert healthy["dense_error"] > 0.5 and healthy["predictor_gain"] != 0
    plain_teacher = method._teachers_stages
    method._teachers_stages = lambda image: [torch.ones_like(stage) for stage in plain_teacher(image)]  # type: ignore[method-assign]
    collapsed = health_of(method, views)
    assert collapsed["dense_std"] == 0 and collapsed["dense_rank"] == pytest.approx(1.0, abs=1e-3)
    plain = method.encoder.stages
    method.encoder.stages = lambda image: [torch.ones_like(stage) for stage in plain(image)]  # type: ignore[method-assign]
    collapsed = health_of(method, views)
    assert collapsed["pooled_feature_std"] == 0 and collapsed["pooled_projection_std"] < 1e-4


def test_health_tells_a_missing_predictor_and_a_teacher_that_is_the_student() -> None:
    method = method_of(teacher={"momentum": 0.0, "final": 0.0})
    views = views_of(method)
    train(method, views, 1)  # type: ignore[arg-type]
    assert health_of(method, views)["teacher_lag"] < 1e-6
    method.predictor = torch.nn.Identity()
    assert health_of(method, views)["predictor_gain"] == 0


def test_the_state_holds_each_weight_of_the_network_once_and_the_decoder_transfers() -> None:
    method = method_of()
    parts = {name.partition(".")[0] for name, _ in method.named_parameters()}
    assert parts == {"network", "token", "dense_heads", "projector", "predictor", "teacher"}
    assert method.trains_decoder
    assert not any("decoder" in name for name, _ in method.teacher.named_parameters())


def test_losses_are_float32_under_bfloat16() -> None:
    method = method_of()
    views = views_of(method)
    with torch.autocast("cpu", torch.bfloat16):
        terms = method.losses(views, STEP)
    assert all(term.dtype == torch.float32 and math.isfinite(term.item()) for term in terms.values())


def test_pictures_show_both_crops() -> None:
    method = method_of()
    with torch.no_grad():
        pictures = method.pictures(views_of(method))
    assert {"target", "input", "restored", "second"} <= set(pictures)
