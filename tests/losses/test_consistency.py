"""Errors of predictions against predictions: values, gradients, and places that do not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.losses import consistency
from medssl.losses.consistency import (
    confident_cross_entropy,
    divergence,
    entropies,
    entropy,
    entropy_of,
    mean_where,
    sharpened,
    soft_cross_entropy,
    squared_difference,
)
from medssl.training.distributed import gather, mean_across_ranks
from tests.losses.conftest import TwoRanks
from tests.losses.references import never_waits, softmax

SHAPES = [(3, 4, 2, 3, 2), (3, 4, 3, 2), (5, 3)]
Values = Sequence[float]
THRESHOLD = 0.45


def sample(seed: int, shape: tuple[int, ...] = SHAPES[0], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return logits, target probabilities, and which places count."""
    generator = torch.Generator().manual_seed(seed)
    logits, others = torch.randn((2, *shape), generator=generator, dtype=dtype)
    where = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < 0.6
    return logits, others.softmax(dim=1), where


def squared_of_logits(logits: Tensor, target: Tensor, where: Tensor | None = None, **keywords: Any) -> Tensor:
    return squared_difference(logits.softmax(dim=1), target, where, **keywords)


def entropy_of_logits(logits: Tensor, target: Tensor, where: Tensor | None = None, **keywords: Any) -> Tensor:
    """`entropy` with the arguments of the others; the target is not used."""
    return entropy(logits, where, **keywords)


def confident(logits: Tensor, target: Tensor, where: Tensor | None = None, **keywords: Any) -> Tensor:
    return confident_cross_entropy(logits, target, THRESHOLD, where, **keywords)


def slow_squared(z: Values, q: Values) -> float:
    return sum((a - b) ** 2 for a, b in zip(softmax(z), q, strict=True)) / len(q)


def slow_cross_entropy(z: Values, q: Values) -> float:
    return -sum(b * math.log(a) for a, b in zip(softmax(z), q, strict=True))


def slow_divergence(z: Values, q: Values) -> float:
    return sum(b * math.log(b / a) for a, b in zip(softmax(z), q, strict=True))


def slow_entropy(z: Values, q: Values) -> float:
    return -sum(a * math.log(a) for a in softmax(z)) / math.log(len(z))


def slow_confident(z: Values, q: Values) -> float:
    best = max(range(len(q)), key=lambda k: q[k])
    return -math.log(softmax(z)[best]) if q[best] >= THRESHOLD else 0.0


#: Each loss on logits, a target and `where`, with what it is at one place in plain Python.
LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[Values, Values], float]]] = {
    "squared_difference": (squared_of_logits, slow_squared),
    "soft_cross_entropy": (soft_cross_entropy, slow_cross_entropy),
    "divergence": (divergence, slow_divergence),
    "entropy": (entropy_of_logits, slow_entropy),
    "confident_cross_entropy": (confident, slow_confident),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def slow(name: str, logits: Tensor, target: Tensor, where: Tensor | None) -> float:
    """The mean over places that count, place by place."""
    z, q = (values.movedim(1, -1).flatten(0, -2).tolist() for values in (logits, target))
    counts = [True] * len(z) if where is None else where.flatten().tolist()
    found = [LOSSES[name][1](a, b) for a, b, counted in zip(z, q, counts, strict=True) if counted]
    return sum(found) / len(found)


def test_hand_values() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]])
    target = torch.tensor([[0.5, 0.5]])
    assert squared_of_logits(logits, target).item() == pytest.approx(0.25**2)
    assert soft_cross_entropy(logits, target).item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert divergence(logits, target).item() == pytest.approx(-math.log(2) - math.log(0.75 * 0.25) / 2)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropies(logits).item() == pytest.approx(expected)
    assert entropy_of(logits.softmax(dim=1)).item() == pytest.approx(expected)
    assert entropy(logits).item() == pytest.approx(expected / math.log(2))
    assert sharpened(logits.softmax(dim=1), 0.5)[0].tolist() == pytest.approx([0.9, 0.1])


def test_a_place_at_the_threshold_is_learnt_from_and_one_below_it_is_not() -> None:
    logits, target = torch.zeros(2, 2), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    assert confident_cross_entropy(logits, target, 0.75).item() == pytest.approx(math.log(2) / 2)
    assert confident_cross_entropy(logits, target, 0.76).item() == 0


@every_loss
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [True, False])
def test_each_loss_equals_its_definition(name: str, shape: tuple[int, ...], masked: bool) -> None:
    logits, target, where = sample(0, shape)
    counted = where if masked else None
    expected = slow(name, logits, target, counted)
    assert expected > 0
    assert LOSSES[name][0](logits, target, counted).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_maps_of_entropy_equal_their_definition(shape: tuple[int, ...]) -> None:
    logits, _, _ = sample(1, shape)
    p = logits.double().softmax(dim=1)
    expected = -(p * p.log()).sum(dim=1)
    torch.testing.assert_close(entropies(logits).double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy_of(logits.softmax(dim=1)).double(), expected, rtol=1e-5, atol=1e-6)


@every_loss
def test_order_of_samples_places_and_classes_does_not_matter(name: str) -> None:
    loss, (logits, target, where) = LOSSES[name][0], sample(2)
    order, classes = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    moved = [values[order].permute(0, 1, 4, 2, 3) for values in (logits, target, where)]
    value = loss(moved[0][:, classes], moved[1][:, classes], moved[2])
    assert value.item() == pytest.approx(loss(logits, target, where).item(), rel=1e-5)


@every_loss
def test_a_constant_on_all_logits_does_not_matter(name: str) -> None:
    loss, (logits, target, where) = LOSSES[name][0], sample(3)
    moved = loss(logits + 7, target, where).item()
    assert moved == pytest.approx(loss(logits, target, where).item(), rel=1e-4)


@every_loss
def test_places_that_do_not_count_do_not_matter_even_where_they_are_not_numbers(name: str) -> None:
    loss, (logits, target, where) = LOSSES[name][0], sample(4)
    if name == "squared_difference":
        # On probabilities: the softmax before it would pass on what is no number.
        loss, logits = squared_difference, logits.softmax(dim=1)
    for bad in (float("nan"), float("inf")):
        spoilt = torch.where(where, logits, bad).requires_grad_()
        value = loss(spoilt, torch.where(where, target, bad), where)
        value.backward()
        assert value.item() == loss(logits, target, where).item()
        assert spoilt.grad is not None and torch.isfinite(spoilt.grad).all()
        assert spoilt.grad[~where.expand_as(spoilt)].abs().max() == 0
        assert spoilt.grad.abs().max() > 0


@every_loss
def test_where_nothing_counts_nothing_is_lost_and_no_gradient_flows(name: str) -> None:
    logits, target, where = sample(5)
    for count in (None, torch.tensor(0.0)):
        leaf = logits.clone().requires_grad_()
        value = LOSSES[name][0](leaf, target, torch.zeros_like(where), count=count)
        value.backward()
        assert value.item() == 0
        assert leaf.grad is not None and leaf.grad.abs().max() == 0


@every_loss
@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (4, 2)])
def test_gradients_match_finite_differences(name: str, shape: tuple[int, ...]) -> None:
    logits, target, where = sample(6, shape, torch.float64)
    loss = LOSSES[name][0]
    if name in ("entropy", "confident_cross_entropy"):
        assert torch.autograd.gradcheck(lambda z: loss(z, target, where), logits.requires_grad_())
    else:
        inputs = (logits.requires_grad_(), target.requires_grad_())
        assert torch.autograd.gradcheck(lambda z, q: loss(z, q, where), inputs)


def test_gradients_of_maps_match_finite_differences() -> None:
    logits, target, _ = sample(7, (2, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(entropies, logits.requires_grad_())
    assert torch.autograd.gradcheck(entropy_of, target.requires_grad_())
    assert torch.autograd.gradcheck(partial(sharpened, temperature=0.3), target.detach().requires_grad_())


def test_a_label_does_not_learn_from_whom_it_teaches() -> None:
    logits, target, _ = sample(8)
    target.requires_grad_()
    confident_cross_entropy(logits.requires_grad_(), target, 0.0).backward()
    assert target.grad is None


@pytest.mark.parametrize("classes", [2, 5])
def test_one_answer_everywhere_costs_what_it_must(classes: int) -> None:
    # Undecided everywhere, while the target is certain of some class.
    logits = torch.zeros(2, classes, 3)
    target = torch.nn.functional.one_hot(torch.arange(6).view(2, 3) % classes, classes).movedim(-1, 1).float()
    assert entropy(logits).item() == pytest.approx(1)
    for loss in (soft_cross_entropy, divergence, partial(confident_cross_entropy, threshold=1.0)):
        assert loss(logits, target).item() == pytest.approx(math.log(classes))
    expected = ((1 - 1 / classes) ** 2 + (classes - 1) / classes**2) / classes
    assert squared_of_logits(logits, target).item() == pytest.approx(expected)


@every_loss
def test_an_answer_that_is_the_target_costs_nothing_but_the_targets_own_entropy(name: str) -> None:
    logits, _, where = sample(9)
    certain = 100 * torch.nn.functional.one_hot(logits.argmax(dim=1), 4).movedim(-1, 1).float()
    assert LOSSES[name][0](certain, certain.softmax(dim=1), where).item() == pytest.approx(0, abs=1e-6)
    target = logits.softmax(dim=1)
    assert divergence(logits, target, where).item() == pytest.approx(0, abs=1e-6)
    assert soft_cross_entropy(logits, target).item() == pytest.approx(entropies(logits).mean().item(), rel=1e-5)


def test_probabilities_of_zero_have_entropy_zero_and_finite_gradients() -> None:
    certain = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    entropy_of(certain).sum().backward()
    divergence(torch.zeros(1, 3, requires_grad=True), certain).backward()
    assert entropy_of(certain).item() == 0
    assert certain.grad is not None and torch.isfinite(certain.grad).all()


def test_sharpening_keeps_order_and_sum_and_ends_at_one_class() -> None:
    _, target, _ = sample(10)
    torch.testing.assert_close(sharpened(target, 1.0), target)
    for temperature in (0.5, 0.1):
        sharp = sharpened(target, temperature)
        torch.testing.assert_close(sharp.sum(dim=1), torch.ones_like(sharp[:, 0]))
        powers = target.double() ** (1 / temperature)
        torch.testing.assert_close(sharp.double(), powers / powers.sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-6)
    last = sharpened(torch.tensor([[1e-30, 0.6, 0.4]]), 1e-3)
    assert last[0].tolist() == pytest.approx([0, 1, 0])


@every_loss
def test_bfloat16_is_computed_in_float32_and_huge_logits_stay_finite(name: str) -> None:
    loss, (logits, target, where) = LOSSES[name][0], sample(11)
    if name == "squared_difference":
        loss, logits = squared_difference, logits.softmax(dim=1)
        reference = loss(logits.bfloat16().float(), target.bfloat16().float(), where)
    else:
        huge = (1e4 * logits).requires_grad_()
        loss(huge, target, where).backward()
        assert huge.grad is not None and torch.isfinite(huge.grad).all()
        reference = loss(logits.bfloat16().float(), target.bfloat16().float(), where)
    value = loss(logits.bfloat16(), target.bfloat16(), where)
    assert value.dtype == torch.float32 and value.item() == pytest.approx(reference.item(), rel=1e-6)


def test_the_mean_divides_by_the_count_that_is_given() -> None:
    values, where = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[[True, False, True]]])
    assert mean_where(values, None).item() == pytest.approx(7 / 3)
    assert mean_where(values, where).item() == pytest.approx(5 / 2)
    assert mean_where(values, None, torch.tensor(2)).item() == pytest.approx(7 / 2)
    # One place on one of two ranks: half a place on average.
    assert mean_where(values, where, torch.tensor(0.5)).item() == pytest.approx(10)


@every_loss
def test_two_ranks_that_gather_equal_one(name: str, two_ranks: TwoRanks) -> None:
    logits, target, where = sample(12, (4, 3, 3, 2))
    keywords = {"target": target, "where": where, "count": where.sum()}
    if name == "entropy":
        two_ranks(entropy, logits, where=where, count=where.sum())
    elif name == "squared_difference":
        two_ranks(squared_difference, logits.softmax(dim=1), **keywords)
    elif name == "confident_cross_entropy":
        two_ranks(confident_cross_entropy, logits, threshold=THRESHOLD, **keywords)
    else:
        two_ranks(getattr(consistency, name), logits, **keywords)


def mean_of_parts(logits: Tensor, *, name: str, target: Tensor, where: Tensor) -> Tensor:
    """The mean over two ranks of what each finds in its own rows, as methods compute it; alone, of all rows."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    logits, target, where = (values[rank::world] for values in (logits, target, where))
    count = mean_across_ranks(where.sum().float())
    return gather(LOSSES[name][0](logits, target, where, count=count)[None]).mean()


@every_loss
def test_two_ranks_that_share_their_count_alone_equal_one(name: str, two_ranks: TwoRanks) -> None:
    logits, target, where = sample(13, (4, 3, 3, 2))
    # Most of what counts lies on one rank.
    where[::2, :, 1:] = False
    assert where[::2].sum() != where[1::2].sum()
    two_ranks(mean_of_parts, logits, name=name, target=target, where=where)


@every_loss
def test_no_loss_waits_for_the_device(name: str) -> None:
    logits, target, where = sample(14)
    never_waits(LOSSES[name][0], logits, target=target, where=where, count=where.sum())


@every_loss
def test_unusable_input_is_named(name: str) -> None:
    loss, (logits, target, where) = LOSSES[name][0], sample(15)
    with pytest.raises(ValueError, match="2 classes or more"):
        loss(logits[:, :1], target[:, :1], where)
    with pytest.raises(ValueError, match=r"'where' needs shape .*and bool"):
        loss(logits, target, where.float())
    with pytest.raises(ValueError, match=r"'where' needs shape \(3, 1, 2, 3, 2\)"):
        loss(logits, target, where[:, 0])
    if name != "entropy":
        with pytest.raises(ValueError, match=r"needs the shape \(3, 4, 2, 3, 2\), got \(3, 4, 2, 3, 1\)"):
            loss(logits, target[..., :1], where)


def test_other_unusable_input_is_named() -> None:
    _, target, where = sample(16)
    with pytest.raises(ValueError, match="must be above 0, got 0"):
        sharpened(target, 0)
    with pytest.raises(ValueError, match=r"probability in \[0, 1\], got 95"):
        confident_cross_entropy(target, target, 95)
    with pytest.raises(ValueError, match="'where' needs shape"):
        mean_where(target[:, 0], where[:1])
    for function in (entropies, entropy_of):
        with pytest.raises(ValueError, match="2 classes or more"):
            function(torch.zeros(3))
