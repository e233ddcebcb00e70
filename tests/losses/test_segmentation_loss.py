"""The error of a dense classifier: Dice over the batch, and cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl.losses.segmentation import dice_cross_entropy, dice_sums, masked_cross_entropy, soft_dice
from tests.losses.conftest import TwoRanks

SHAPES = [(3, 4, 3, 4, 2), (2, 3, 4, 5)]


def sample(
    seed: int, shape: tuple[int, ...] = SHAPES[0], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, classes, and which voxels count."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    where = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.6
    return logits, target, where


def soft(seed: int, shape: tuple[int, ...] = SHAPES[0]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)


def slow(logits: Tensor, target: Tensor, where: Tensor, background: bool = True) -> tuple[float, float]:
    """The definitions of Dice loss and cross-entropy, voxel by voxel in plain Python."""
    classes = logits.shape[1]
    overlap, total = [0.0] * classes, [0.0] * classes
    error, count = 0.0, 0
    for row in range(len(logits)):
        for values, truth, counts in zip(
            logits[row].flatten(1).T.tolist(),
            target[row].flatten().tolist(),
            where[row].flatten().tolist(),
            strict=True,
        ):
            if not counts:
                continue
            exponents = [math.exp(value) for value in values]
            for k in range(classes):
                p = exponents[k] / sum(exponents)
                overlap[k] += p * (k == truth)
                total[k] += p + (k == truth)
            error -= math.log(exponents[truth] / sum(exponents))
            count += 1
    dice = [(2 * o + 1e-5) / (t + 1e-5) for o, t in zip(overlap, total, strict=True)][0 if background else 1 :]
    return 1 - sum(dice) / len(dice), error / count


def test_hand_value() -> None:
    # Each class has half of each of four voxels; one voxel is class 1.
    target = torch.tensor([[[0, 0], [0, 1]]])
    terms = dice_cross_entropy(torch.zeros(1, 2, 2, 2), target)
    assert terms["dice"].item() == pytest.approx(1 - (2 * 1.5 / 5 + 2 * 0.5 / 3) / 2, abs=1e-5)
    assert terms["cross_entropy"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("background", [True, False])
def test_both_terms_equal_their_definitions(shape: tuple[int, ...], background: bool) -> None:
    logits, target, where = sample(0, shape)
    terms = dice_cross_entropy(logits, target, where, background=background)
    dice, error = slow(logits, target, where, background)
    assert terms["dice"].item() == pytest.approx(dice, rel=1e-4)
    assert terms["cross_entropy"].item() == pytest.approx(error, rel=1e-5)


def test_sums_are_overlap_predicted_and_true_voxels_of_each_sample() -> None:
    logits, target, where = sample(1)
    sums = dice_sums(logits, target, where)
    p = logits.softmax(dim=1)
    for row in range(3):
        for k in range(4):
            true = (target[row] == k) & where[row, 0]
            expected = [p[row, k][true].sum(), p[row, k][where[row, 0]].sum(), true.sum()]
            assert sums[row, :, k].tolist() == pytest.approx([float(value) for value in expected], rel=1e-5)


def test_dice_is_of_the_whole_batch_and_no_mean_over_samples() -> None:
    # All of the class lies in one sample and all of what is predicted of it in the other.
    target = torch.zeros(2, 1, 4, dtype=torch.int64)
    target[0, 0, :2] = 1
    logits = torch.stack([torch.zeros(2, 1, 4), torch.full((2, 1, 4), -50.0)], dim=1)
    logits[0, 1, 0, :2] = 50
    sums = dice_sums(logits, target)
    assert soft_dice(sums, background=False).item() == pytest.approx(0, abs=1e-5)
    logits[1, 1, 0, :2] = 50
    assert soft_dice(dice_sums(logits, target), background=False).item() == pytest.approx(1 - 4 / 6, abs=1e-5)


def test_smoothing_is_in_voxels_of_the_whole_batch() -> None:
    # Overlap, predicted and true voxels of one class in two samples.
    sums = torch.tensor([[[2.0], [3.0], [4.0]], [[1.0], [1.0], [2.0]]])
    assert soft_dice(sums, smooth=2.0).item() == pytest.approx(1 - (2 * 3 + 2) / (4 + 6 + 2))


def test_certain_probabilities_as_target_equal_classes() -> None:
    logits, target, where = sample(2)
    certain = torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float()
    first, second = (dice_cross_entropy(logits, truth, where) for truth in (target, certain))
    for name, value in first.items():
        assert value.item() == pytest.approx(second[name].item(), rel=1e-6)


def test_soft_targets_equal_their_definition() -> None:
    logits, truth = sample(3)[0], soft(4)
    p = logits.softmax(dim=1)
    axes = (0, 2, 3, 4)
    dice = 1 - (2 * (p * truth).sum(axes) / (p + truth).sum(axes)).mean()
    terms = dice_cross_entropy(logits, truth)
    assert terms["dice"].item() == pytest.approx(dice.item(), rel=1e-5)
    assert terms["cross_entropy"].item() == pytest.approx(-(truth * p.log()).sum(dim=1).mean().item(), rel=1e-5)


def test_order_of_samples_voxels_and_classes_does_not_matter() -> None:
    logits, target, where = sample(5)
    order, classes = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    moved = dice_cross_entropy(
        logits[order].permute(0, 1, 4, 2, 3)[:, classes],
        classes.argsort()[target[order].permute(0, 3, 1, 2)],
        where[order].permute(0, 1, 4, 2, 3),
    )
    for name, value in dice_cross_entropy(logits, target, where).items():
        assert moved[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_voxels_that_do_not_count_do_not_matter_even_where_they_are_not_numbers_or_classes() -> None:
    logits, target, where = sample(6)
    values = dice_cross_entropy(logits, target, where)
    spoilt = torch.where(where, logits, float("nan")).requires_grad_()
    again = dice_cross_entropy(spoilt, torch.where(where[:, 0], target, 255), where)
    torch.stack(list(again.values())).sum().backward()
    assert {name: value.item() for name, value in again.items()} == {n: v.item() for n, v in values.items()}
    assert spoilt.grad is not None and torch.isfinite(spoilt.grad).all()
    assert spoilt.grad[~where.expand_as(spoilt)].abs().max() == 0


@pytest.mark.parametrize("term", ["dice", "cross_entropy"])
def test_gradients_match_finite_differences(term: str) -> None:
    logits, target, where = sample(7, (2, 3, 2, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda z: dice_cross_entropy(z, target, where)[term], logits.requires_grad_())


@pytest.mark.parametrize("classes", [2, 5])
def test_one_answer_for_all_voxels_costs_the_logarithm_of_the_classes_and_most_of_dice(classes: int) -> None:
    target = torch.arange(classes).repeat(2, 6, 1)
    terms = dice_cross_entropy(torch.zeros(2, classes, 6, classes), target)
    assert terms["cross_entropy"].item() == pytest.approx(math.log(classes), rel=1e-5)
    assert terms["dice"].item() == pytest.approx(1 - 1 / classes, rel=1e-4)


def test_the_right_answer_costs_nothing() -> None:
    _, target, where = sample(8)
    logits = 100 * torch.nn.functional.one_hot(target, 4).movedim(-1, 1).float()
    for value in dice_cross_entropy(logits, target, where).values():
        assert value.item() == pytest.approx(0, abs=1e-5)


def test_no_counted_voxel_costs_nothing_and_gives_no_gradient() -> None:
    logits, target, where = sample(9)
    logits.requires_grad_()
    total = torch.stack(list(dice_cross_entropy(logits, target, torch.zeros_like(where)).values())).sum()
    total.backward()
    assert total.item() == 0
    assert logits.grad is not None and logits.grad.abs().max() == 0


def test_bfloat16_is_computed_in_float32_and_huge_logits_stay_finite() -> None:
    logits, target, where = sample(10)
    for value, expected in zip(
        dice_cross_entropy(logits.bfloat16(), target, where).values(), slow(logits.bfloat16().float(), target, where),
        strict=True,
    ):  # fmt: skip
        assert value.dtype == torch.float32 and value.item() == pytest.approx(expected, rel=1e-4)
    assert all(torch.isfinite(value) for value in dice_cross_entropy(1e4 * logits, target, where).values())


def test_two_ranks_equal_one(two_ranks: TwoRanks) -> None:
    shape = (4, 3, 3, 2)
    logits, truth = sample(11, shape)[0], soft(12, shape)
    two_ranks(dice_cross_entropy, logits, truth)
    # What a method gathers in place of the images.
    two_ranks(soft_dice, dice_sums(logits, truth), background=False)


def test_parts_of_a_batch_give_the_whole_with_gathered_sums_and_the_mean_count() -> None:
    logits, target, where = sample(13, (4, 3, 3, 2))
    whole = dice_cross_entropy(logits, target, where)
    parts = [(logits[i::2], target[i::2], where[i::2]) for i in range(2)]
    gathered = torch.cat([dice_sums(*part) for part in parts])
    assert soft_dice(gathered).item() == pytest.approx(whole["dice"].item(), rel=1e-6)
    errors = [masked_cross_entropy(*part, count=where.sum() / 2) for part in parts]
    assert (sum(errors) / 2).item() == pytest.approx(whole["cross_entropy"].item(), rel=1e-6)  # type: ignore[union-attr]
    error = masked_cross_entropy(logits, target, count=torch.tensor(48))
    assert error.item() == pytest.approx(masked_cross_entropy(logits, target).item() * target.numel() / 48, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 1, 3, 4)}, "2 classes or more"),
        ({"logits": torch.zeros(2, 3)}, "2 classes or more"),
        ({"target": torch.zeros(2, 3, 5, dtype=torch.int64)}, r"shape \(2, 3, 4\) and int64"),
        ({"target": torch.zeros(2, 3, 4, dtype=torch.int32)}, "int64"),
        ({"target": torch.zeros(2, 3, 4)}, "Probabilities need the logits' shape"),
        ({"where": torch.zeros(2, 1, 3, 4)}, "bool"),
        ({"where": torch.zeros(2, 3, 4, dtype=torch.bool)}, "'where' needs shape"),
    ],
)
def test_unusable_input_is_named(change: dict[str, Tensor], message: str) -> None:
    logits, target, where = sample(14, (2, 3, 3, 4))
    with pytest.raises(ValueError, match=message):
        dice_cross_entropy(**{"logits": logits, "target": target, "where": where, **change})


@pytest.mark.parametrize("sums", [torch.zeros(2, 4, 3), torch.zeros(3, 3), torch.zeros(2, 3, 1)])
def test_sums_of_another_shape_are_named(sums: Tensor) -> None:
    with pytest.raises(ValueError, match="Dice needs sums"):
        soft_dice(sums, background=False)
