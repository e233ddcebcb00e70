"""Volume Fusion: two crops mixed by a map of boxes, and the share of each voxel found."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.config import check_settings
from medssl.data.batch import Batch, View
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.pretraining.partners import partner_rows
from medssl.pretraining.volume_fusion import VolumeFusion, VolumeFusionSettings
from medssl.training.method import Step
from tests.pretraining.test_mae import batch_of
from tests.training.waiting import META, no_waiting

STEP = Step(0, 10)
SIZES = [(16, 16, 16), (16, 24)]


def method_of(size: tuple[int, ...] = (16, 16, 16), channels: int = 1, **values: object) -> VolumeFusion:
    settings = check_settings(VolumeFusionSettings, values, "")
    outputs = VolumeFusion.output_channels(channels, settings)
    network = build_network("resenc-xs", dimensions=len(size), in_channels=channels, out_channels=outputs, seed=0)
    freeze_unused_outputs(network)
    policy = policy_for(VolumeFusion.needs.policy, {"MR"}, size, AugmentationSettings())
    return VolumeFusion(network, policy, settings.resolved(size))


def crops_for(method: VolumeFusion, count: int = 4, channels: int = 1) -> Batch:
    return batch_of(method, count=count, channels=channels)  # type: ignore[arg-type]


def view_of(method: VolumeFusion, batch: Batch | None = None) -> tuple[View, Tensor]:
    """Return the view and its map of classes."""
    batch = batch or crops_for(method)
    (view,) = method.views(batch, Draw(0, batch.sample_index))
    assert view.label is not None
    return view, view.label


def answer(method: VolumeFusion, logits: Tensor) -> None:
    """Let the network say the same whatever it is shown."""

    class Fixed(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return logits

    method.network = Fixed()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("classes", [2, 5])
def test_each_voxel_shows_the_share_of_its_class_of_two_volumes(size: tuple[int, ...], classes: int) -> None:
    method = method_of(size, channels=2, classes=classes)
    batch = dataclasses.replace(crops_for(method, channels=2), sample_id=torch.tensor([4, 4, 8, 8]))
    batch.valid[:2, -2, 0] = method.policy.read_size[-2] // 2
    view, label = view_of(method, batch)
    draw = Draw(0, batch.sample_index)
    foreground = method.policy.view(batch, draw.child("view"))
    rows = partner_rows(batch, draw.child("partner"), method.policy)
    assert set(rows[:2].tolist()) <= {2, 3} and set(rows[2:].tolist()) <= {0, 1}
    share = label[:, None] / (classes - 1)
    expected = share * foreground.image + (1 - share) * foreground.image[rows]
    torch.testing.assert_close(view.image, expected)
    assert torch.equal(view.inside, foreground.inside & foreground.inside[rows])
    assert not foreground.inside[0].all() and not torch.equal(view.inside, foreground.inside)
    assert set(label.unique().tolist()) == set(range(classes))


@pytest.mark.parametrize(
    ("patch", "smallest"), [((160, 160, 160), 8), ((48, 48, 40), 5), ((16, 16, 16), 2), ((8, 8), 1), ((512, 512), 8)]
)
def test_boxes_are_as_published_and_smaller_in_small_patches(patch: tuple[int, ...], smallest: int) -> None:
    boxes = VolumeFusionSettings().resolved(patch).boxes
    assert boxes.smallest == smallest
    assert boxes.count == (10, 39) and boxes.largest == 0.625 and VolumeFusionSettings().classes == 5


def test_boxes_have_the_sides_and_the_number_that_was_asked() -> None:
    method = method_of((40, 40), boxes={"count": [1, 2], "smallest": 3, "largest": 0.25})
    view, _ = view_of(method, crops_for(method, count=60))
    boxes = view.parameters["volume_fusion"]["boxes"]
    sides = (boxes[..., 1] - boxes[..., 0])[(boxes[..., 1] > 0).all(dim=2)]
    assert boxes.shape[1] == 2 and sides.min() == 3 and sides.max() == 10


def test_the_network_has_an_output_for_each_class_whatever_the_image_has() -> None:
    assert VolumeFusion.output_channels(1, VolumeFusionSettings()) == 5
    assert VolumeFusion.output_channels(3, VolumeFusionSettings(classes=9)) == 9


def test_a_second_sample_and_a_second_volume_are_needed() -> None:
    method = method_of()
    assert method.needs.least_batch == 2 and method.needs.least_volumes == 2
    with pytest.raises(ValueError, match="raise batch_size"):
        view_of(method, crops_for(method, count=1))


def test_right_answers_cost_nothing_and_no_answer_costs_the_logarithm_of_the_classes() -> None:
    method = method_of()
    view, label = view_of(method)
    right = torch.nn.functional.one_hot(label, 5).movedim(-1, 1).float()
    answer(method, 100 * right)
    terms = method.losses([view], STEP)
    assert set(terms) == {"dice", "cross_entropy"}
    assert all(term.item() == pytest.approx(0, abs=1e-4) for term in terms.values())
    answer(method, torch.zeros_like(right))
    terms = method.losses([view], STEP)
    assert terms["cross_entropy"].item() == pytest.approx(math.log(5), rel=1e-5) and terms["dice"].item() > 0.5


def test_voxels_outside_one_of_the_volumes_do_not_count() -> None:
    method = method_of()
    view, label = view_of(method)
    view.inside[:, :, :8] = False
    logits = torch.randn((4, 5, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    answer(method, logits)
    before = {name: term.item() for name, term in method.losses([view], STEP).items()}
    answer(method, torch.where(view.inside, logits, float("nan")))
    view.label = torch.where(view.inside[:, 0], label, 4)
    assert {name: term.item() for name, term in method.losses([view], STEP).items()} == before


@pytest.mark.parametrize("size", SIZES)
def test_gradients_reach_every_trained_weight_of_encoder_and_decoder(size: tuple[int, ...]) -> None:
    method = method_of(size)
    view, _ = view_of(method)
    optimiser = torch.optim.SGD(method.parameters(), lr=0.01)
    for _ in range(2):
        optimiser.step()
        optimiser.zero_grad()
        torch.stack(list(method.losses([view], STEP).values())).sum().backward()
    assert method.trains_decoder
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_health_compares_with_whoever_always_names_the_most_frequent_class() -> None:
    method = method_of()
    view, label = view_of(method)
    view.inside[:, :, :8] = False
    counted = label[view.inside[:, 0]]
    frequent = counted.mode().values.item()
    answer(method, torch.nn.functional.one_hot(torch.full_like(label, int(frequent)), 5).movedim(-1, 1).float())
    idle = method.health([view])
    assert idle["accuracy"] == pytest.approx(idle["chance"])
    assert idle["chance"] == pytest.approx((counted == frequent).float().mean().item())
    answer(method, torch.nn.functional.one_hot(label, 5).movedim(-1, 1).float())
    healthy = method.health([view])
    assert healthy["accuracy"] == 1 > healthy["chance"]
    assert healthy["feature_std"] > 0.01 and healthy["effective_rank"] > 1


@torch.no_grad()
def test_pictures_show_the_mixture_its_shares_and_the_named_ones() -> None:
    method = method_of()
    view, label = view_of(method)
    answer(method, torch.nn.functional.one_hot(label, 5).movedim(-1, 1).float())
    pictures = method.pictures([view])
    assert list(pictures) == ["input", "share", "output"]
    assert torch.equal(pictures["share"], pictures["output"]) and pictures["share"].shape == view.image.shape
    assert len(pictures["share"][0].unique()) == len(label[0].unique())


@pytest.mark.parametrize(
    "values", [{"classes": 1}, {"boxes": {"count": (5, 2)}}, {"boxes": {"largest": 0}}, {"boxes": {"smallest": 0}}]
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        VolumeFusionSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_views_and_losses_let_no_host_wait(size: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(size).to(META)
    batch = crops_for(method).to(META)
    with no_waiting(monkeypatch), torch.no_grad():
        terms = method.losses(method.views(batch, Draw(0, batch.sample_index)), STEP)
    assert all(term.device == META for term in terms.values())
