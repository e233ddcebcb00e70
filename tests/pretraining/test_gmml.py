"""GMML: groups of voxels show noise or another sample and are restored."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.config import check_settings
from medssl.data.batch import Batch, View
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.pretraining.gmml import GMML, GMMLSettings
from medssl.pretraining.partners import partner_rows
from medssl.training.method import Step
from tests.augmentation.batches import row_of
from tests.pretraining.test_mae import batch_of
from tests.training.waiting import META, no_waiting

STEP = Step(0, 10)
SIZES = [(16, 16, 16), (16, 24)]
NOISY = AugmentationSettings(overrides={"intensity": {"noise": {"probability": 1.0, "std": [0.2, 0.3]}}})


def method_of(size: tuple[int, ...] = (16, 16, 16), channels: int = 1, **mask: object) -> GMML:
    network = build_network("resenc-xs", dimensions=len(size), in_channels=channels, out_channels=channels, seed=0)
    freeze_unused_outputs(network)
    return GMML(
        network, policy_for(GMML.needs.policy, {"MR"}, size, NOISY), check_settings(GMMLSettings, {"mask": mask}, "")
    )


def crops_for(method: GMML, count: int = 4, channels: int = 1) -> Batch:
    return batch_of(method, count=count, channels=channels)  # type: ignore[arg-type]


def view_of(method: GMML, batch: Batch, seed: int = 0) -> tuple[View, View, Tensor]:
    """Return the view, what the policy made, and which voxels are spoilt."""
    draw = Draw(seed, batch.sample_index)
    (view,) = method.views(batch, draw)
    assert view.mask is not None and view.target is not None
    return view, method.policy.view(batch, draw.child("view")), view.mask


@pytest.mark.parametrize("size", SIZES)
def test_the_target_is_clean_and_the_input_is_degraded_where_it_is_not_spoilt(size: tuple[int, ...]) -> None:
    method = method_of(size)
    view, made, mask = view_of(method, crops_for(method))
    assert made.target is not None and torch.equal(view.target, made.target)  # type: ignore[arg-type]
    assert torch.equal(view.image[~mask], made.image[~mask])
    assert ((made.image - made.target).flatten(1).std(dim=1) > 0.1).all()


@pytest.mark.parametrize("size", SIZES)
def test_spoilt_parts_have_the_published_size(size: tuple[int, ...]) -> None:
    for fill, low, high in (("noise", 0.5, 0.75), ("alien", 0.0, 0.3)):
        method = method_of(size, fill=[fill])
        mask = view_of(method, crops_for(method, count=12))[2]
        parts = mask.flatten(1).float().mean(dim=1)
        # The last box may go beyond by its size.
        assert parts.min() >= low and parts.max() <= high + 0.3 ** len(size)
        assert parts.std() > 0.02


@pytest.mark.parametrize("size", SIZES)
def test_alien_voxels_are_those_of_another_volume_at_the_same_place(size: tuple[int, ...]) -> None:
    method = method_of(size, channels=2, fill=["alien"])
    batch = dataclasses.replace(crops_for(method, channels=2), sample_id=torch.tensor([7, 7, 3, 3]))
    view, made, mask = view_of(method, batch)
    rows = partner_rows(batch, Draw(0, batch.sample_index).child("partner"), method.policy)
    assert set(rows[:2].tolist()) <= {2, 3} and set(rows[2:].tolist()) <= {0, 1}
    assert torch.equal(view.image, torch.where(mask, made.image[rows], made.image))
    assert mask.any()


@pytest.mark.parametrize("fill", ["noise", "zero", "mean"])
def test_other_fills_have_their_values_and_do_not_depend_on_batch_mates(fill: str) -> None:
    method = method_of(channels=2, fill=[fill])
    batch = crops_for(method, channels=2)
    view, made, mask = view_of(method, batch)
    for row in range(4):
        alone = view_of(method, row_of(batch, row))[0]
        torch.testing.assert_close(alone.image[0], view.image[row])
        for channel in range(2):
            seen = made.image[row, channel][(made.inside & ~mask)[row, 0]]
            spoilt = view.image[row, channel][mask[row, 0]]
            mean, std = {"noise": (seen.mean(), seen.std()), "zero": (0, 0), "mean": (seen.mean(), 0)}[fill]
            assert spoilt.mean().item() == pytest.approx(float(mean), abs=0.1)
            assert spoilt.std().item() == pytest.approx(float(std), abs=0.1)


def test_what_lies_outside_the_volume_has_no_say_in_the_mean() -> None:
    method = method_of(fill=["mean"])
    batch = crops_for(method)
    batch.valid[:, 0, 0] = method.policy.read_size[0] // 2
    batch.image[:, :, : method.policy.read_size[0] // 2] = 1e4
    view, made, mask = view_of(method, batch)
    for row in range(4):
        inside = made.inside[row, 0] & ~mask[row, 0]
        if inside.any():
            expected = made.image[row, 0][inside].mean().item()
            assert view.image[row, 0][mask[row, 0]].unique().item() == pytest.approx(expected, abs=1e-3)


def test_fills_are_drawn_evenly_from_those_named() -> None:
    method = method_of((8, 8), fill=["zero", "zero", "mean"])
    view, _, mask = view_of(method, crops_for(method, count=400))
    spoilt = torch.where(mask, view.image, 0.0).flatten(1).abs().amax(dim=1)
    assert (spoilt == 0).float().mean().item() == pytest.approx(2 / 3, abs=0.08)


def test_alien_patches_ask_for_a_second_volume_and_other_fills_do_not() -> None:
    needs = GMML.needs_of(GMMLSettings())
    assert (needs.least_batch, needs.least_volumes, needs.policy) == (2, 2, "restoration")
    alone = GMML.needs_of(check_settings(GMMLSettings, {"mask": {"fill": ["noise", "mean"]}}, ""))
    assert (alone.least_batch, alone.least_volumes, alone.policy) == (1, 1, "restoration")


def test_a_batch_of_one_is_refused_for_alien_patches() -> None:
    method = method_of()
    with pytest.raises(ValueError, match="raise batch_size"):
        method.views(crops_for(method, count=1), Draw(0, [0]))


def test_the_error_counts_on_spoilt_voxels_inside_the_volume_and_on_no_other() -> None:
    method = method_of()
    view, _, mask = view_of(method, crops_for(method))
    view.inside[:, :, :8] = False
    assert view.target is not None
    restored = view.target + torch.where(mask & view.inside, -3.0, 1e6)
    method.restore = lambda _: restored  # type: ignore[method-assign]
    # Absolute, as published: squared it would be 9.
    assert method.losses([view], STEP)["reconstruction"].item() == pytest.approx(3.0, rel=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_gradients_reach_every_trained_weight(size: tuple[int, ...]) -> None:
    method = method_of(size)
    view = view_of(method, crops_for(method))[0]
    optimiser = torch.optim.SGD(method.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.step()
        optimiser.zero_grad()
        method.losses([view], STEP)["reconstruction"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_health_tells_restoring_from_copying_and_filling_in_and_sees_a_leak() -> None:
    method = method_of()
    view, _, mask = view_of(method, crops_for(method))
    target = view.target
    assert target is not None
    visible = view.inside & ~mask
    means = torch.stack([target[i][visible[i]].mean() for i in range(4)]).view(4, 1, 1, 1, 1)
    method.restore = lambda _: means.expand_as(target)  # type: ignore[method-assign]
    assert method.health([view])["error_to_mean"] == pytest.approx(1.0, rel=1e-4)
    method.restore = lambda view: view.image  # type: ignore[method-assign]
    copied = method.health([view])
    assert copied["error_to_input"] == pytest.approx(1.0) and copied["damage"] > 1
    method.restore = lambda _: target  # type: ignore[method-assign]
    healthy = method.health([view])
    assert healthy["error_to_input"] == healthy["error_to_mean"] == healthy["error_to_neighbours"] == 0
    assert healthy["feature_std"] > 0.01 and healthy["effective_rank"] > 1
    # The target shines through where the input should be spoilt.
    view.image = target
    assert method.health([view])["damage"] == 0


def test_boxes_too_small_to_cover_the_patch_are_refused_before_training() -> None:
    settings = check_settings(GMMLSettings, {"mask": {"side": [0.0, 0.01]}}, "")
    reason = GMML.misfit(settings, (160, 160, 160), [])
    assert reason is not None and "mask.side [0.0, 0.01]" in reason and "Raise it" in reason
    assert GMML.misfit(GMMLSettings(), (160, 160, 160), []) is None


@pytest.mark.parametrize(
    "mask", [{"ratio": (0.7, 0.5)}, {"side": (0, 0)}, {"fill": ()}, {"fill": ("token",)}, {"alien_ratio": (0, 1.2)}]
)
def test_settings_that_make_no_sense_are_refused(mask: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GMMLSettings(mask=mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_views_and_losses_let_no_host_wait(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(size, fill=["noise", "alien", "zero", "mean"]).to(META)
    batch = crops_for(method, count=12).to(META)
    with no_waiting(monkeypatch), torch.no_grad():
        loss = method.losses(method.views(batch, Draw(0, batch.sample_index)), STEP)["reconstruction"]
    assert loss.device == META
