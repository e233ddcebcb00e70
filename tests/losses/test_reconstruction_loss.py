"""The error of a reconstruction."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl.losses.precision import at_least_float32
from medssl.losses.reconstruction import masked_mean, masked_reconstruction

KINDS = ("l2", "l1", "huber")


def slow(prediction: Tensor, target: Tensor, where: Tensor, kind: str) -> float:
    """The definition, voxel by voxel in plain Python."""
    total, count = 0.0, 0
    flat = where.expand_as(target).flatten().tolist()
    for p, t, chosen in zip(prediction.flatten().tolist(), target.flatten().tolist(), flat, strict=True):
        if chosen:
            error = abs(p - t)
            total += {"l2": error**2, "l1": error, "huber": error**2 / 2 if error <= 1 else error - 0.5}[kind]
            count += 1
    return total / count


def sample(
    seed: int, shape: tuple[int, ...] = (3, 2, 4, 5, 6), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randn(shape, generator=generator, dtype=dtype)
    target = torch.randn(shape, generator=generator, dtype=dtype)
    where = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.6
    return prediction, target, where


def test_hand_value() -> None:
    prediction = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    target = torch.tensor([[[[0.0, 2.0], [0.0, 9.0]]]])
    where = torch.tensor([[[[True, True], [True, False]]]])
    assert masked_reconstruction(prediction, target, where).item() == pytest.approx((1 + 0 + 9) / 3)
    assert masked_reconstruction(prediction, target, where, kind="l1").item() == pytest.approx((1 + 0 + 3) / 3)
    assert masked_reconstruction(prediction, target, where, kind="huber").item() == pytest.approx((0.5 + 0 + 2.5) / 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 2, 4, 5, 6), (2, 1, 7, 5)])
def test_it_equals_its_definition(kind: str, shape: tuple[int, ...]) -> None:
    prediction, target, where = sample(0, shape)
    value = masked_reconstruction(prediction, target, where, kind=kind)  # type: ignore[arg-type]
    assert value.item() == pytest.approx(slow(prediction, target, where, kind), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_samples_and_voxels_does_not_matter(kind: str) -> None:
    prediction, target, where = sample(1)
    order = torch.randperm(3)
    axes = (0, 1, 4, 2, 3)
    value = masked_reconstruction(prediction, target, where, kind=kind)  # type: ignore[arg-type]
    moved = masked_reconstruction(
        prediction[order].permute(axes), target[order].permute(axes), where[order].permute(axes), kind=kind  # type: ignore[arg-type]
    )  # fmt: skip
    assert moved.item() == pytest.approx(value.item(), rel=1e-5)


def test_visible_voxels_do_not_matter_even_where_they_are_not_numbers() -> None:
    prediction, target, where = sample(2)
    value = masked_reconstruction(prediction, target, where)
    changed = torch.where(where, prediction, float("nan")).requires_grad_()
    again = masked_reconstruction(changed, torch.where(where, target, float("inf")), where)
    again.backward()
    assert again.item() == value.item()
    assert torch.isfinite(changed.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind: str) -> None:
    prediction, target, where = sample(3, (2, 1, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(
        lambda p: masked_reconstruction(p, target, where, kind=kind),  # type: ignore[arg-type]
        prediction.requires_grad_(),
    )


def test_a_constant_output_pays_the_variance_of_the_target() -> None:
    _, target, where = sample(4)
    mean = target[where.expand_as(target)].mean()
    value = masked_reconstruction(mean.expand_as(target), target, where)
    assert value.item() == pytest.approx(target[where.expand_as(target)].var(correction=0).item(), rel=1e-5)


def test_nothing_hidden_costs_nothing_and_gives_no_gradient() -> None:
    prediction, target, where = sample(5)
    prediction.requires_grad_()
    loss = masked_reconstruction(prediction, target, torch.zeros_like(where))
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None and prediction.grad.abs().max() == 0


def test_bfloat16_is_computed_in_float32() -> None:
    prediction, target, where = sample(6)
    value = masked_reconstruction(prediction.bfloat16(), target, where)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(slow(prediction.bfloat16().float(), target, where, "l2"), rel=1e-5)
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64


def test_parts_divided_by_the_mean_count_average_to_the_whole() -> None:
    prediction, target, where = sample(7, (4, 1, 5, 6))
    whole = masked_reconstruction(prediction, target, where)
    count = where.sum() / 2
    parts = [masked_reconstruction(prediction[i::2], target[i::2], where[i::2], count=count) for i in range(2)]
    assert (sum(parts) / 2).item() == pytest.approx(whole.item(), rel=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": torch.zeros(1, 1, 2)}, "target's shape"),
        ({"where": torch.zeros(2, 1, 3, 4)}, "bool"),
        ({"where": torch.zeros(2, 1, 4, 3, dtype=torch.bool)}, "shape"),
        ({"kind": "l3"}, "l2, l1 or huber"),
    ],
)
def test_unusable_input_is_named(change: dict[str, object], message: str) -> None:
    prediction, target, where = sample(8, (2, 1, 3, 4))
    with pytest.raises(ValueError, match=message):
        masked_reconstruction(**{"prediction": prediction, "target": target, "where": where, **change})  # type: ignore[arg-type]


def test_masked_mean_is_the_mean_of_what_is_chosen() -> None:
    image, _, where = sample(9)
    where[0] = False
    mean = masked_mean(image, where)
    assert mean.shape == (3, 2, 1, 1, 1)
    assert mean[0].abs().max() == 0
    for row in (1, 2):
        for channel in range(2):
            assert mean[row, channel].item() == pytest.approx(
                image[row, channel][where[row, 0]].mean().item(), abs=1e-6
            )
    assert math.isfinite(mean.sum().item())
