"""Contrast by position."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.networks.build import build_network, freeze_decoder
from medssl.pretraining.heads import ProjectorSettings
from medssl.pretraining.positional_contrast import PositionContrast, PositionContrastSettings, position_error
from medssl.training.method import Step
from tests.pretraining.crops import STILL, crops

STEP = Step(0, 10)
SIZES = [(16, 16, 16), (32, 32)]


def method_of(
    size: tuple[int, ...] = (32, 32), overrides: dict[str, Any] | None = None, **settings: Any
) -> PositionContrast:
    network = build_network("resenc-xs", dimensions=len(size), seed=0)
    freeze_decoder(network)
    policy = policy_for("contrastive", {"MR"}, size, AugmentationSettings(overrides=overrides or {}))
    torch.manual_seed(0)
    head = ProjectorSettings(hidden=16, width=8)
    return PositionContrast(network, policy, PositionContrastSettings(projector=head, **settings))


def fractions(views: Views) -> list[Tensor]:
    return [view.parameters["position"]["fraction"] for view in views]


def placed(method: PositionContrast, batch: Batch, positions: list[float]) -> Views:
    """Return views of a batch whose position along Z is set by hand."""
    views = method.views(batch, Draw(0, batch.sample_index))
    for view in views:
        view.parameters["position"]["fraction"][:, 0] = torch.tensor(positions)
    return views


@pytest.mark.parametrize("slices", [5, 40])
def test_a_slice_lies_at_its_fraction_of_the_volume_whatever_the_slice_thickness(slices: int) -> None:
    method = method_of(overrides=STILL)
    thickness = 200 / slices
    origin = [[0.0, 0, 0], [thickness * (slices // 2), 0, 0], [thickness * (slices - 1), 0, 0]]
    batch = crops(method.policy, spacing_mm=(thickness, 1.0, 1.0), origin_mm=origin, extent_mm=(200.0, 64.0, 64.0))
    found = fractions(method.views(batch, Draw(0, batch.sample_index)))[0][:, 0]
    expected = [(number + 0.5) / slices for number in (0, slices // 2, slices - 1)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_crop_lies_where_its_middle_does_with_anisotropic_voxels() -> None:
    method = method_of((16, 16, 16), overrides=STILL)
    batch = crops(
        method.policy,
        2,
        spacing_mm=(3.0, 1.0, 0.5),
        origin_mm=[[0.0] * 3, [30.0, 8.0, 4.0]],
        extent_mm=(96.0, 40.0, 16.0),
    )
    for found in fractions(method.views(batch, Draw(0, [0, 1]))):
        torch.testing.assert_close(found, torch.tensor([[24 / 96, 8 / 40, 4 / 16], [54 / 96, 16 / 40, 8 / 16]]))


def test_each_view_has_the_position_that_its_own_shift_gave_it() -> None:
    still = {"spatial": {**STILL["spatial"], "shift": 0.25}}
    method = method_of((16, 16, 16), overrides=still)
    batch = crops(method.policy, spacing_mm=(2.0, 1.0, 1.0))
    views = method.views(batch, Draw(3, batch.sample_index))
    first, second = fractions(views)
    shifts = [view.parameters["spatial"]["shift"] for view in views]
    assert not torch.equal(*shifts)
    torch.testing.assert_close(first - second, (shifts[0] - shifts[1]) * torch.tensor([2.0, 1, 1]) / 100)


def test_an_unknown_extent_is_refused_with_the_method_that_asks_for_none() -> None:
    method = method_of()
    batch = crops(method.policy)
    batch.extent_mm = None
    with pytest.raises(UsageError, match=r"how large volumes are.*simclr"):
        method.views(batch, Draw(0, batch.sample_index))


def test_weights_fall_with_distance_and_end_at_the_reach() -> None:
    method = method_of(sigma=0.1, reach=2.5)
    position = torch.tensor([0.0, 0.1, 0.2, 0.24, 0.26])
    weights = method.weights(torch.cat([position, position])[:, None])
    expected = [1.0, math.exp(-0.5), math.exp(-2), math.exp(-2.88), 0.0]
    assert weights[0, :5].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(weights, weights.T)
    # The other view of a sample is its positive wherever it lies.
    apart = method.weights(torch.tensor([[0.0], [1.0], [0.5], [0.0]]))
    assert apart[0].tolist() == [1.0, 0.0, 1.0, 1.0] and apart[1].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_only_the_chosen_axes_count() -> None:
    batch = crops(method_of().policy)
    for axes, matters in ((("z",), False), (("z", "y"), True)):
        method = method_of(axes=axes)
        views = placed(method, batch, [0.1, 0.12, 0.9])
        before = method.losses(views, STEP)["contrast"]
        for view in views:
            view.parameters["position"]["fraction"][0, 1] += 0.5
        after = method.losses(views, STEP)["contrast"]
        assert (before != after) == matters


def test_the_loss_equals_its_definition() -> None:
    method = method_of(temperature=0.3)
    positions = [0.1, 0.15, 0.6]
    views = placed(method, crops(method.policy), positions)
    views[1].parameters["position"]["fraction"][:, 0] += 0.04
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((6, 4), generator=generator, dtype=torch.float64)
    place = [*positions, *(position + 0.04 for position in positions)]
    total = 0.0
    for i in range(6):
        cosine = [torch.cosine_similarity(rows[i], rows[j], dim=0).item() / 0.3 for j in range(6)]
        others = math.log(sum(math.exp(cosine[j]) for j in range(6) if j != i))
        weight = [math.exp(-((place[i] - place[j]) ** 2) / 0.02) * (abs(place[i] - place[j]) <= 0.25) for j in range(6)]
        weight[(i + 3) % 6] = 1.0
        positives = [j for j in range(6) if j != i]
        total += sum(weight[j] * (others - cosine[j]) for j in positives) / sum(weight[j] for j in positives)
    loss = method.objective([rows[:3], rows[3:]], views, STEP)["contrast"]
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)


def by_angle(numbers: list[float]) -> Tensor:
    """Return embeddings as wide as the projector's. Shape: (N, 8)."""
    angle = math.pi * torch.tensor(numbers)
    return torch.nn.functional.pad(torch.stack([angle.cos(), angle.sin()], dim=1), (0, 6))


def test_embeddings_of_the_position_are_better_than_embeddings_of_the_volume() -> None:
    method = method_of()
    positions, volumes = [0.1, 0.5, 0.9, 0.1, 0.5, 0.9], [0.1, 0.1, 0.1, 0.9, 0.9, 0.9]
    batch = crops(method.policy, 6, volumes=[0, 0, 0, 1, 1, 1])
    views = placed(method, batch, positions)
    by_position = method.objective([by_angle(positions)] * 2, views, STEP)["contrast"]
    by_volume = method.objective([by_angle(volumes)] * 2, views, STEP)["contrast"]
    assert by_position < by_volume - 1


def test_health_tells_volumes_that_are_turned_over_from_aligned_ones() -> None:
    method = method_of()
    positions = [0.05, 0.35, 0.65, 0.95] * 2
    batch = crops(method.policy, 8, volumes=[0] * 4 + [1] * 4)
    method.project = lambda view: by_angle(positions)  # type: ignore[method-assign]
    aligned = method.health(placed(method, batch, positions))
    turned = method.health(placed(method, batch, [*positions[:4], *positions[3::-1]]))
    assert aligned["position_error"] == pytest.approx(0.0, abs=1e-6)
    assert turned["position_error"] > 1
    assert aligned["near_similarity"] > 0.99 > turned["near_similarity"]
    assert aligned["positives"] == pytest.approx(2.0, abs=1e-4)
    method.project = lambda view: torch.ones(8, 8)  # type: ignore[method-assign]
    collapsed = method.health(placed(method, batch, positions))
    assert collapsed["far_similarity"] == pytest.approx(1.0, abs=1e-5)


def test_the_position_error_looks_at_other_volumes_first_and_at_the_own_where_there_are_none() -> None:
    rows, positions = by_angle([0.1, 0.12, 0.5, 0.115]), torch.tensor([[0.1], [0.12], [0.5], [0.8]])
    own = position_error(rows, positions, torch.zeros(4, dtype=torch.int64))
    foreign = position_error(rows, positions, torch.tensor([0, 0, 0, 1]))
    # The last, of another volume, resembles the first two and lies far away from them.
    assert foreign.item() == pytest.approx((0.7 + 0.68 + 0.3 + 0.68) / (0.7 + 0.68 + 0.3 + 1.68 / 3))
    assert own.item() == pytest.approx((0.7 + 0.68 + 0.38 + 0.68) / ((1.12 + 1.08 + 1.08 + 1.68) / 3))


@pytest.mark.parametrize("size", SIZES)
def test_gradients_reach_every_trained_weight_and_the_step_lowers_the_loss(size: tuple[int, ...]) -> None:
    method = method_of(size)
    batch = crops(method.policy)
    views = method.views(batch, Draw(0, batch.sample_index))
    optimiser = torch.optim.SGD([weight for weight in method.parameters() if weight.requires_grad], lr=0.001)
    losses = []
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    for _ in range(3):
        optimiser.zero_grad()
        loss = method.losses(views, STEP)["contrast"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    for name, weight in method.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("patch", "shapes", "axes", "reason"),
    [
        ((32, 32), [(1, 64, 64)] * 3, ("z",), "one slice.*SimCLR"),
        ((32, 32, 32), [(34, 64, 64)] * 3, ("z",), "at most 0.06 of it apart"),
        ((32, 32, 32), [(20, 64, 64)] * 3, ("z",), "at most 0.00 of it apart"),
    ],
)
def test_volumes_without_positions_are_refused(
    patch: tuple[int, ...], shapes: list[tuple[int, ...]], axes: tuple[Any, ...], reason: str
) -> None:
    found = PositionContrast.misfit(PositionContrastSettings(axes=axes), patch, shapes)
    assert found is not None
    with pytest.raises(UsageError, match=reason):
        raise UsageError(found)


@pytest.mark.parametrize(
    ("patch", "shapes", "axes"),
    [
        ((32, 32), [(20, 64, 64)] * 3, ("z",)),
        ((32, 32, 32), [(96, 64, 64)] * 3, ("z",)),
        ((32, 32, 32), [(32, 64, 64)] * 3, ("z", "y")),
        ((32, 32), [(1, 64, 64), (20, 64, 64), (30, 64, 64)], ("z",)),
    ],
)
def test_volumes_with_positions_are_not_refused(
    patch: tuple[int, ...], shapes: list[tuple[int, ...]], axes: tuple[Any, ...]
) -> None:
    assert PositionContrast.misfit(PositionContrastSettings(axes=axes), patch, shapes) is None


@pytest.mark.parametrize("axes", [(), ("z", "z"), ("t",)])
def test_axes_that_make_no_sense_are_refused(axes: tuple[Any, ...]) -> None:
    with pytest.raises(ValidationError, match="axes"):
        PositionContrastSettings(axes=axes)
