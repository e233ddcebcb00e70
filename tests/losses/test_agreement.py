"""T-similarity: how far the members of an ensemble agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medssl.losses.agreement import t_similarities, t_similarity
from tests.losses.conftest import TwoRanks
from tests.losses.references import dot, never_waits

SHAPES = [(3, 4, 3, 2, 3, 2), (3, 2, 4, 2, 3), (4, 5, 3)]


def sample(seed: int, shape: tuple[int, ...] = SHAPES[0], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return logits of members and which places count."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=dtype)
    return logits, torch.rand((shape[0], 1, *shape[3:]), generator=generator) < 0.6


def slow(probabilities: Tensor, where: Tensor) -> float:
    """The mean over ordered pairs of different members of their inner product, place by place in plain Python."""
    values = []
    members = probabilities.shape[1]
    flat = probabilities.flatten(3) if probabilities.ndim > 3 else probabilities[..., None]
    for row, counts in zip(flat, where.flatten(1).tolist(), strict=True):
        for place in range(row.shape[2]):
            if counts[place]:
                rows = row[:, :, place].tolist()
                pairs = [dot(rows[m], rows[k]) for m in range(members) for k in range(members) if m != k]
                values.append(sum(pairs) / (members * (members - 1)))
    return sum(values) / len(values)


def of_logits(logits: Tensor, **keywords: Tensor) -> Tensor:
    return t_similarity(logits.softmax(dim=2), **keywords)


def test_hand_value() -> None:
    # Three members: the products of the pairs are 0.5, 0.9 and 0.5.
    members = torch.tensor([[[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]]])
    assert t_similarities(members).tolist() == pytest.approx([(0.5 + 0.9 + 0.5) / 3])


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_its_definition(shape: tuple[int, ...]) -> None:
    logits, where = sample(0, shape)
    assert of_logits(logits, where=where).item() == pytest.approx(slow(logits.softmax(dim=2), where), rel=1e-5)


def test_order_of_members_classes_samples_and_places_does_not_matter() -> None:
    logits, where = sample(1)
    moved = logits[[2, 0, 1]][:, [3, 1, 0, 2]][:, :, [2, 0, 1]].transpose(3, 5)
    expected = of_logits(logits, where=where).item()
    assert of_logits(moved, where=where[[2, 0, 1]].transpose(2, 4)).item() == pytest.approx(expected, rel=1e-6)


def test_members_that_are_sure_of_one_class_have_one_of_different_classes_none_and_that_know_nothing_a_part() -> None:
    sure = torch.eye(3)[None]
    assert t_similarities(sure).item() == 0
    assert t_similarities(sure[:, [1, 1, 1]]).item() == 1
    assert t_similarities(torch.full((1, 4, 3), 1 / 3)).item() == pytest.approx(1 / 3)


def test_one_member_repeated_has_the_square_of_its_length() -> None:
    p = torch.tensor([0.2, 0.3, 0.5])
    assert t_similarities(p.repeat(1, 7, 1)).item() == pytest.approx(p.square().sum().item(), rel=1e-6)


def test_gradients_match_finite_differences() -> None:
    logits, where = sample(2, (2, 3, 3, 2, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda z: of_logits(z, where=where), logits.requires_grad_())


def test_places_that_do_not_count_have_no_influence() -> None:
    logits, where = sample(3)
    spoilt = torch.where(where[:, :, None], logits, 1e4).requires_grad_()
    value = of_logits(spoilt, where=where)
    value.backward()
    assert value.item() == of_logits(logits, where=where).item()
    assert spoilt.grad is not None and spoilt.grad[~where[:, :, None].expand_as(spoilt)].abs().max() == 0


def test_bfloat16_is_computed_in_float32_and_huge_logits_stay_finite() -> None:
    logits, where = sample(4)
    narrow = logits.softmax(dim=2).bfloat16()
    value = t_similarity(narrow, where)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(slow(narrow.float(), where), rel=1e-5)
    assert torch.isfinite(of_logits(1e4 * logits, where=where))


def test_two_ranks_equal_one(two_ranks: TwoRanks) -> None:
    two_ranks(t_similarity, sample(5, (4, 3, 3, 2, 2))[0].softmax(dim=2))


def test_parts_of_a_batch_give_the_whole_with_the_mean_count() -> None:
    logits, where = sample(6, (4, 3, 3, 2, 2))
    parts = [of_logits(logits[i::2], where=where[i::2], count=where.sum() / 2) for i in range(2)]
    assert torch.stack(parts).mean().item() == pytest.approx(of_logits(logits, where=where).item(), rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 3), (2, 3, 1), (2, 3)])
def test_too_few_members_or_classes_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="2 members and 2 classes"):
        t_similarity(torch.zeros(shape))


def test_a_mask_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match="'where' needs shape"):
        t_similarity(sample(7)[0].softmax(dim=2), torch.ones(3, 2, 3, 2, dtype=torch.bool))


def test_it_never_waits_for_the_device() -> None:
    logits, where = sample(8)
    never_waits(of_logits, logits, where=where, count=where.sum())
