"""The confident regional cross-entropy: what is sure, what is excluded, and what is neither."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medssl.losses.confident import confident_regional, confident_sums
from tests.losses.conftest import TwoRanks
from tests.losses.references import never_waits, softmax

SHAPES = [(3, 4, 2, 3, 2), (3, 2, 3, 2), (6, 3)]
TERMS = ["positive", "negative"]


def sample(seed: int, shape: tuple[int, ...] = SHAPES[0], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return logits, target probabilities, some of them sure, and which places count."""
    generator = torch.Generator().manual_seed(seed)
    logits, others = torch.randn((2, *shape), generator=generator, dtype=dtype)
    where = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.7
    return logits, (2 * others).softmax(dim=1), where


def terms_of(
    logits: Tensor, target: Tensor, where: Tensor | None = None, *, sure: float = 0.65, excluded: float = 0.1
) -> dict[str, Tensor]:
    return confident_regional(confident_sums(logits, target, where, sure=sure, excluded=excluded))


def rows_of(values: Tensor) -> list[list[float]]:
    found: list[list[float]] = values.movedim(1, -1).flatten(0, -2).tolist()
    return found


def slow(logits: Tensor, target: Tensor, where: Tensor, sure: float = 0.65, excluded: float = 0.1) -> list[float]:
    """Both terms place by place in plain Python."""
    positive, negative = [], []
    for z, q, counts in zip(rows_of(logits), rows_of(target), where.movedim(1, -1).flatten().tolist(), strict=True):
        if not counts:
            continue
        p = softmax(z)
        if max(q) >= sure:
            positive.append(-max(q) * math.log(p[q.index(max(q))]))
        if min(q) < excluded:
            negative.append(-min(q) * math.log(1 - p[q.index(min(q))]))
    assert positive and negative
    return [sum(positive) / len(positive), sum(negative) / len(negative)]


def test_hand_value() -> None:
    # Sure and excluding; sure only; neither.
    target = torch.tensor([[0.95, 0.05], [0.8, 0.2], [0.4, 0.6]])
    logits = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]]).log()
    terms = terms_of(logits, target)
    assert terms["positive"].item() == pytest.approx((-0.95 * math.log(0.75) - 0.8 * math.log(0.5)) / 2, rel=1e-5)
    assert terms["negative"].item() == pytest.approx(-0.05 * math.log(0.75), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_terms_equal_their_definitions(shape: tuple[int, ...]) -> None:
    logits, target, where = sample(0, shape)
    terms = terms_of(logits, target, where)
    assert [terms[name].item() for name in TERMS] == pytest.approx(slow(logits, target, where), rel=1e-4)


def test_sums_of_a_sample_are_errors_and_numbers_of_its_own_places() -> None:
    logits, target, where = sample(1)
    sums = confident_sums(logits, target, where)
    for row in range(3):
        assert torch.allclose(
            sums[row], confident_sums(logits[row : row + 1], target[row : row + 1], where[row : row + 1])[0]
        )
    assert sums[:, 0, 1].sum().item() == ((target.amax(dim=1, keepdim=True) >= 0.65) & where).sum().item()
    assert sums[:, 1, 1].sum().item() == ((target.amin(dim=1, keepdim=True) < 0.1) & where).sum().item()


def test_order_of_samples_places_and_classes_does_not_matter() -> None:
    logits, target, where = sample(2)
    moved = [tensor[[2, 0, 1]].transpose(2, 4) for tensor in (logits, target, where)]
    again = terms_of(moved[0][:, [3, 1, 0, 2]], moved[1][:, [3, 1, 0, 2]], moved[2])
    for name, value in terms_of(logits, target, where).items():
        assert again[name].item() == pytest.approx(value.item(), rel=1e-5)


@pytest.mark.parametrize("term", TERMS)
def test_gradients_match_finite_differences(term: str) -> None:
    logits, target, where = sample(3, (2, 3, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: terms_of(z, target, where, sure=0.4, excluded=0.3)[term], logits.requires_grad_()
    )


def test_the_target_gets_no_gradient() -> None:
    logits, target, _ = sample(4)
    logits.requires_grad_()
    target.requires_grad_()
    torch.stack(list(terms_of(logits, target).values())).sum().backward()
    assert target.grad is None and logits.grad is not None


def test_places_that_do_not_count_have_no_influence_even_where_they_are_not_numbers() -> None:
    logits, target, where = sample(5)
    spoilt = torch.where(where, logits, float("nan")).requires_grad_()
    again = terms_of(spoilt, torch.where(where, target, float("nan")), where)
    torch.stack(list(again.values())).sum().backward()
    for name, value in terms_of(logits, target, where).items():
        assert again[name].item() == value.item()
    assert spoilt.grad is not None and spoilt.grad.isfinite().all()
    assert spoilt.grad[~where.expand_as(spoilt)].abs().max() == 0


def test_an_undecided_target_costs_nothing_whatever_is_predicted() -> None:
    logits, target, _ = sample(6)
    for value in terms_of(logits, torch.full_like(target, 0.25)).values():
        assert value.item() == 0


def test_one_answer_for_all_places_costs_the_logarithm_of_the_classes() -> None:
    target = torch.eye(4)
    terms = terms_of(torch.zeros(4, 4), target)
    assert terms["positive"].item() == pytest.approx(math.log(4), rel=1e-6)
    # The weight is the class's own probability, which is none.
    assert terms["negative"].item() == 0


def test_bfloat16_is_computed_in_float32_and_huge_logits_stay_finite() -> None:
    logits, target, where = sample(7)
    narrow = terms_of(logits.bfloat16(), target, where)
    expected = slow(logits.bfloat16().float(), target, where)
    assert [narrow[name].item() for name in TERMS] == pytest.approx(expected, rel=1e-4)
    assert all(value.dtype == torch.float32 for value in narrow.values())
    huge = (1e4 * logits).requires_grad_()
    total = torch.stack(list(terms_of(huge, target, where).values())).sum()
    total.backward()
    assert total.isfinite() and huge.grad is not None and huge.grad.isfinite().all()


def test_two_ranks_that_gather_equal_one(two_ranks: TwoRanks) -> None:
    logits, target, _ = sample(8, (4, 3, 3, 2))
    two_ranks(confident_regional, confident_sums(logits, target))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 1, 3)}, "2 classes or more"),
        ({"target": torch.zeros(2, 3, 4)}, "target needs the shape"),
        ({"target": torch.zeros(2, 3, 3, dtype=torch.int64)}, "probabilities"),
        ({"where": torch.zeros(2, 3, 3, dtype=torch.bool)}, "'where' needs shape"),
        ({"where": torch.zeros(2, 1, 3)}, "bool"),
    ],
)
def test_unusable_input_is_named(change: dict[str, Tensor], message: str) -> None:
    logits, target, where = sample(9, (2, 3, 3))
    with pytest.raises(ValueError, match=message):
        confident_sums(*({"logits": logits, "target": target, "where": where} | change).values())


def test_sums_of_another_shape_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(B, 2, 2\)"):
        confident_regional(torch.zeros(3, 4))


def test_it_never_waits_for_the_device() -> None:
    logits, target, where = sample(10)
    never_waits(terms_of, logits, target=target, where=where)
