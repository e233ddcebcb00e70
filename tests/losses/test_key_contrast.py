"""Contrast with keys of a teacher: MoCo's queue and MoCo v3's batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.losses.key_contrast import key_contrast, queue_contrast, symmetric_key_contrast
from tests.losses.conftest import TwoRanks
from tests.losses.references import dot, mean, never_waits, random_rows, unit

GROUPS = torch.tensor([0, 1, 0, 2, 1, 3])
QUEUE = random_rows(9, 10)
QUEUE_GROUPS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])
VALID = torch.tensor([True] * 7 + [False] * 3)


def slow_queue(query: Tensor, key: Tensor, queue: Tensor, temperature: float, taken: list[list[int]]) -> float:
    """Query by query, with the entries of the queue that each may see."""
    entries, losses = unit(queue), []
    for q, k, seen in zip(unit(query), unit(key), taken, strict=True):
        positive = math.exp(dot(q, k) / temperature)
        negatives = sum(math.exp(dot(q, entries[j]) / temperature) for j in seen)
        losses.append(-math.log(positive / (positive + negatives)))
    return mean(losses)


def slow_keys(query: Tensor, key: Tensor, temperature: float, groups: list[int]) -> float:
    keys, losses = unit(key), []
    for i, q in enumerate(unit(query)):
        seen = [j for j in range(len(keys)) if j == i or groups[j] != groups[i]]
        powers = {j: math.exp(dot(q, keys[j]) / temperature) for j in seen}
        losses.append(-2 * temperature * math.log(powers[i] / sum(powers.values())))
    return mean(losses)


def test_orthogonal_keys_cost_what_a_hand_computes() -> None:
    query, queue = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0], [-3.0, 0.0]])
    value = queue_contrast(query, query, queue, 0.5).item()
    assert value == pytest.approx(math.log(1 + math.exp(-2) + math.exp(-4)), rel=1e-6)
    value = key_contrast(torch.eye(2), torch.eye(2), temperature=0.5).item()
    assert value == pytest.approx(2 * 0.5 * math.log(1 + math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("valid", [None, VALID, torch.tensor(7)], ids=["full", "mask", "count"])
@pytest.mark.parametrize("grouped", [False, True])
def test_queue_contrast_equals_its_definition(valid: Tensor | None, grouped: bool) -> None:
    query, key = random_rows(0), random_rows(1)
    groups = {"groups": GROUPS, "queue_groups": QUEUE_GROUPS} if grouped else {}
    entries = range(10 if valid is None else 7)
    taken = [[j for j in entries if not (grouped and QUEUE_GROUPS[j] == group)] for group in GROUPS]
    value = queue_contrast(query, key, QUEUE, 0.2, valid=valid, **groups)
    assert value.item() == pytest.approx(slow_queue(query, key, QUEUE, 0.2, taken), rel=1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_key_contrast_equals_its_definition(grouped: bool) -> None:
    query, key = random_rows(0), random_rows(1)
    value = key_contrast(query, key, temperature=0.2, groups=GROUPS if grouped else None)
    expected = slow_keys(query, key, 0.2, GROUPS.tolist() if grouped else list(range(6)))
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_symmetric_key_contrast_crosses_the_views() -> None:
    query_a, query_b, key_a, key_b = (random_rows(seed) for seed in range(4))
    value = symmetric_key_contrast(query_a, query_b, key_a, key_b, temperature=0.2, groups=GROUPS)
    expected = slow_keys(query_a, key_b, 0.2, GROUPS.tolist()) + slow_keys(query_b, key_a, 0.2, GROUPS.tolist())
    assert value.item() == pytest.approx(expected, rel=1e-5)
    swapped = symmetric_key_contrast(query_b, query_a, key_b, key_a, temperature=0.2, groups=GROUPS)
    assert swapped.item() == pytest.approx(value.item(), rel=1e-6)


def test_order_of_samples_and_of_the_queue_and_length_of_rows_do_not_matter() -> None:
    query, key = random_rows(2), random_rows(3)
    order, shuffled = torch.tensor([3, 1, 5, 0, 2, 4]), torch.arange(9, -1, -1)
    value = queue_contrast(query, key, QUEUE, 0.2, valid=VALID).item()
    moved = queue_contrast(2 * query[order], key[order] / 3, 5 * QUEUE[shuffled], 0.2, valid=VALID[shuffled])
    assert moved.item() == pytest.approx(value, rel=1e-5)
    value = key_contrast(query, key, temperature=0.2, groups=GROUPS).item()
    moved = key_contrast(2 * query[order], key[order] / 3, temperature=0.2, groups=GROUPS[order])
    assert moved.item() == pytest.approx(value, rel=1e-5)


def test_gradients_of_queries_match_finite_differences() -> None:
    query, key = random_rows(4, 3, 4, torch.float64).requires_grad_(), random_rows(5, 3, 4, torch.float64)
    queue, groups = QUEUE.double(), torch.tensor([0, 1, 0])
    assert torch.autograd.gradcheck(lambda q: queue_contrast(q, key, queue, 0.5, valid=VALID), (query,))
    assert torch.autograd.gradcheck(lambda q: key_contrast(q, key, temperature=0.5, groups=groups), (query,))


def test_keys_and_queues_get_no_gradient() -> None:
    query, key, queue = (random_rows(seed).requires_grad_() for seed in range(3))
    (queue_contrast(query, key, queue, 0.2) + key_contrast(query, key, temperature=0.2)).backward()
    assert query.grad is not None and query.grad.abs().max() > 0
    assert key.grad is None and queue.grad is None


def test_collapsed_rows_cost_the_logarithm_of_the_number_of_keys() -> None:
    rows, queue = torch.ones(6, 4), torch.ones(10, 4)
    assert queue_contrast(rows, rows, queue, 0.2).item() == pytest.approx(math.log(11), rel=1e-6)
    assert queue_contrast(rows, rows, queue, 0.2, valid=VALID).item() == pytest.approx(math.log(8), rel=1e-6)
    assert key_contrast(rows, rows, temperature=0.2).item() == pytest.approx(2 * 0.2 * math.log(6), rel=1e-6)


@pytest.mark.parametrize("valid", [torch.tensor(0), torch.zeros(10, dtype=torch.bool)], ids=["count", "mask"])
def test_an_empty_queue_costs_nothing_whatever_it_holds(valid: Tensor) -> None:
    query = random_rows(0).requires_grad_()
    value = queue_contrast(query, random_rows(1), torch.zeros(10, 4), 0.2, valid=valid)
    value.backward()
    assert value.item() == 0
    assert query.grad is not None and query.grad.abs().max() == 0


def test_half_precision_and_autocast_are_computed_in_float32() -> None:
    query, key, queue = random_rows(6).bfloat16(), random_rows(7).bfloat16(), QUEUE.bfloat16()

    def both(q: Tensor, k: Tensor, entries: Tensor) -> Tensor:
        return queue_contrast(q, k, entries, 0.01, valid=VALID) + key_contrast(q, k, temperature=0.01)

    value = both(query, key, queue)
    with torch.autocast("cpu", torch.bfloat16):
        cast = both(query.float(), key.float(), queue.float())
    assert value.dtype == torch.float32
    assert math.isfinite(value.item())
    assert value.item() == cast.item() == both(query.float(), key.float(), queue.float()).item()


def test_two_ranks_equal_one_and_nothing_waits_for_the_device(two_ranks: TwoRanks) -> None:
    query, key = random_rows(0), random_rows(1)
    grouped = {"groups": GROUPS, "queue_groups": QUEUE_GROUPS}
    cases: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
        (queue_contrast, {"key": key, "queue": QUEUE, "temperature": 0.2, "valid": torch.tensor(7), **grouped}),
        (key_contrast, {"key": key, "temperature": 0.2, "groups": GROUPS}),
    ]
    for loss, keywords in cases:
        two_ranks(loss, query, **keywords)
        never_waits(loss, query, **keywords)
    keywords = {"key_a": key, "key_b": random_rows(2), "temperature": 0.2}
    two_ranks(symmetric_key_contrast, query, random_rows(3), **keywords)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.ones(5, 4)}, "batches of one shape"),
        ({"queue": torch.ones(10, 3)}, r"width 4 needs a \(Q, 4\) queue, got \(10, 3\)"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"valid": torch.ones(9, dtype=torch.bool)}, r"'valid' needs shape \(10,\)"),
        ({"valid": torch.ones(10)}, "'valid' needs shape"),
        ({"groups": GROUPS}, "groups of the queries and of the queue"),
        ({"groups": GROUPS, "queue_groups": GROUPS}, "queue of 10 entries needs as many groups"),
        ({"groups": GROUPS[:4], "queue_groups": QUEUE_GROUPS}, "one integer group for each of 6"),
    ],
)
def test_unusable_queues_are_named(change: dict[str, Any], message: str) -> None:
    usable = {"query": torch.ones(6, 4), "key": torch.ones(6, 4), "queue": torch.ones(10, 4), "temperature": 0.2}
    with pytest.raises(ValueError, match=message):
        queue_contrast(**{**usable, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.ones(5, 4)}, "batches of one shape"),
        ({"query": torch.ones(1, 4), "key": torch.ones(1, 4)}, "at least 2 samples"),
        ({"temperature": -1.0}, "temperature above 0"),
        ({"groups": GROUPS[:4]}, "one integer group for each of 6"),
    ],
)
def test_unusable_keys_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        key_contrast(**{"query": torch.ones(6, 4), "key": torch.ones(6, 4), "temperature": 0.2, **change})
