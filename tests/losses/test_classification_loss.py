"""The errors of a classifier and the weights of its classes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl.losses.classification import classification_error, effective_number_weights, positive_weights

KINDS = ("multiclass", "multilabel", "ordinal")


def sample(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets and weights of six samples and four classes."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3 if kind == "ordinal" else 4, generator=generator, dtype=dtype)
    shape = (6, 4) if kind == "multilabel" else (6,)
    target = torch.randint(0, 2 if kind == "multilabel" else 4, shape, generator=generator)
    return logits, target, torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=dtype)


def slow(logits: Tensor, target: Tensor, kind: str, weights: list[float]) -> float:
    """The definition, number by number in plain Python."""
    total, count = 0.0, 0
    for row, wanted in zip(logits.tolist(), target.tolist(), strict=True):
        if kind == "multiclass":
            total -= weights[wanted] * (row[wanted] - math.log(sum(math.exp(value) for value in row)))
            count += 1
            continue
        for k, value in enumerate(row):
            p = 1 / (1 + math.exp(-value))
            yes = wanted[k] == 1 if kind == "multilabel" else wanted > k
            factor = (weights[k] if yes else 1.0) if kind == "multilabel" else weights[wanted]
            total -= factor * math.log(p if yes else 1 - p)
            count += 1
    return total / count


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_equals_its_definition(kind: str, weighted: bool) -> None:
    logits, target, weights = sample(kind)
    value = classification_error(logits, target, kind, weights=weights if weighted else None)
    assert value.item() == pytest.approx(
        slow(logits, target, kind, weights.tolist() if weighted else [1.0] * 4), rel=1e-5
    )


@pytest.mark.parametrize(("kind", "width", "chance"), [("multiclass", 4, math.log(4)), ("multilabel", 4, math.log(2)),
                                                       ("ordinal", 3, math.log(2))])  # fmt: skip
def test_a_classifier_that_knows_nothing_pays_the_entropy_of_chance(kind: str, width: int, chance: float) -> None:
    _, target, _ = sample(kind)
    assert classification_error(torch.zeros(6, width), target, kind).item() == pytest.approx(chance)


def test_smoothing_moves_a_part_of_the_target_to_all_classes() -> None:
    logits, target, _ = sample("multiclass")
    spread = -logits.log_softmax(dim=1).mean(dim=1).mean()
    plain = classification_error(logits, target, "multiclass")
    smoothed = classification_error(logits, target, "multiclass", smoothing=0.1)
    assert smoothed.item() == pytest.approx((0.9 * plain + 0.1 * spread).item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_samples_does_not_matter(kind: str) -> None:
    logits, target, weights = sample(kind)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = classification_error(logits[order], target[order], kind, weights=weights)
    assert turned.item() == pytest.approx(classification_error(logits, target, kind, weights=weights).item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_counts_the_same_whichever_others_share_its_batch(kind: str) -> None:
    logits, target, weights = sample(kind)
    parts = [classification_error(logits[i : i + 2], target[i : i + 2], kind, weights=weights) for i in (0, 2, 4)]
    whole = classification_error(logits, target, kind, weights=weights)
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_match_finite_differences(kind: str) -> None:
    logits, target, weights = sample(kind, torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: classification_error(z, target, kind, weights=weights), (logits,))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind: str) -> None:
    logits, target, _ = sample(kind)
    value = classification_error(logits.bfloat16(), target, kind)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(classification_error(logits.bfloat16().float(), target, kind).item())


@pytest.mark.parametrize(
    ("shape", "target", "kind", "weights", "message"),
    [
        ((6, 4), (5,), "multiclass", None, "needs targets of shape"),
        ((6, 4), (6,), "multilabel", None, "needs targets of shape"),
        ((6,), (6,), "multiclass", None, "needs targets of shape"),
        ((6, 4), (6,), "ordinal", 4, "5 classes need 5 weights"),
        ((6, 4), (6,), "regression", None, "no kind of target 'regression'"),
    ],
)
def test_unusable_batches_are_named(shape, target, kind: str, weights: int | None, message: str) -> None:
    factors = None if weights is None else torch.ones(weights)
    with pytest.raises(ValueError, match=message):
        classification_error(torch.zeros(shape), torch.zeros(target, dtype=torch.int64), kind, weights=factors)


def test_weights_follow_the_effective_number_of_samples() -> None:
    few, many = effective_number_weights([10, 100], beta=0.99)
    assert few / many == pytest.approx((1 - 0.99**100) / (1 - 0.99**10))
    assert (10 * few + 100 * many) / 110 == pytest.approx(1)


def test_weights_run_from_none_to_the_inverse_of_the_count() -> None:
    assert effective_number_weights([5, 50, 500], beta=0) == pytest.approx([1, 1, 1])
    few, many = effective_number_weights([5, 50], beta=1 - 1e-9)
    assert few / many == pytest.approx(10, rel=1e-4)


def test_a_rare_label_gets_a_larger_factor_than_a_frequent_one() -> None:
    rare, even, frequent = positive_weights([10, 50, 90], 100, beta=1 - 1e-9)
    assert (rare, even, frequent) == pytest.approx((9, 1, 1 / 9), rel=1e-4)


@pytest.mark.parametrize(("counts", "beta", "message"), [([3, 0], 0.9, "at least one sample"), ([3], 1.0, "beta must")])
def test_weights_of_empty_classes_are_refused(counts: list[int], beta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        effective_number_weights(counts, beta)


@pytest.mark.parametrize("positives", [0, 20])
def test_a_label_with_one_side_only_has_no_factor(positives: int) -> None:
    with pytest.raises(ValueError, match="both sides are needed"):
        positive_weights([positives], 20)
