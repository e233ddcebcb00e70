"""NT-Xent and the losses that can take its place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.losses.contrast import OBJECTIVES, additive_margin, dcl, dclw, debiased, nt_xent
from tests.losses.conftest import TwoRanks
from tests.losses.references import dot, mean, never_waits, random_rows, softmax, unit

NAMES = tuple(OBJECTIVES)
WITH_NEGATIVES_LEFT_OUT = tuple(name for name in NAMES if name != "supcon")
GROUPS = [0, 1, 0, 2, 1, 3]


def slow(name: str, first: Tensor, second: Tensor, temperature: float, groups: list[int] | None) -> float:
    """Each definition, anchor by anchor in plain Python and with exponentials."""
    a, b, count = unit(first), unit(second), len(first)
    rows, group = a + b, list(range(count)) if groups is None else groups
    positives = [dot(x, y) for x, y in zip(a, b, strict=True)]
    weights = [2 - count * share for share in softmax(positives, 0.5)]
    losses = []
    for i, row in enumerate(rows):
        own = i % count
        negatives = [j for j in range(2 * count) if j % count != own and (group[j % count] != group[own])]
        total = sum(math.exp(dot(row, rows[j]) / temperature) for j in negatives)
        p = math.exp(positives[own] / temperature)
        if name == "nt-xent":
            losses.append(-math.log(p / (p + total)))
        elif name == "dcl":
            losses.append(-math.log(p / total))
        elif name == "dclw":
            losses.append(-weights[own] * positives[own] / temperature + math.log(total))
        elif name == "debiased":
            number = len(negatives)
            corrected = max((total - 0.1 * number * p) / 0.9, number * math.exp(-1 / temperature))
            losses.append(-math.log(p / (p + corrected)))
        elif name == "additive-margin":
            p = math.exp((positives[own] - 0.1) / temperature)
            losses.append(-math.log(p / (p + total)))
        else:
            others = [j for j in range(2 * count) if j != i]
            everything = sum(math.exp(dot(row, rows[j]) / temperature) for j in others)
            same = [j for j in others if group[j % count] == group[own]]
            losses.append(mean(-math.log(math.exp(dot(row, rows[j]) / temperature) / everything) for j in same))
    return mean(losses)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nt-xent", math.log(1 + 2 / math.e)),
        ("dcl", math.log(2) - 1),
        ("dclw", math.log(2) - 1),
        ("debiased", math.log(1 + (2 - 0.1 * 2 * math.e) / 0.9 / math.e)),
        ("additive-margin", math.log(1 + 2 * math.exp(-0.9))),
        ("supcon", math.log(1 + 2 / math.e)),
    ],
)
def test_two_orthogonal_samples_cost_what_a_hand_computes(name: str, expected: float) -> None:
    rows = torch.eye(2)
    assert OBJECTIVES[name](rows, 3 * rows, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["alone", "grouped"])
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_its_definition(name: str, groups: list[int] | None, temperature: float) -> None:
    first, second = random_rows(0), random_rows(1)
    given = None if groups is None else torch.tensor(groups)
    value = OBJECTIVES[name](first, second, temperature=temperature, groups=given)
    assert value.item() == pytest.approx(slow(name, first, second, temperature, groups), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_order_of_samples_and_of_views_and_length_of_rows_do_not_matter(name: str) -> None:
    first, second, groups = random_rows(2), random_rows(3), torch.tensor(GROUPS)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    value = OBJECTIVES[name](first, second, temperature=0.2, groups=groups).item()
    for a, b, g in [
        (first[order], second[order], groups[order]),
        (second, first, groups),
        (7 * first, second / 3, groups),
        (first, second, 10 - groups),
    ]:
        assert OBJECTIVES[name](a, b, temperature=0.2, groups=g).item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("groups", [None, [0, 1, 0]], ids=["alone", "grouped"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_match_finite_differences(name: str, groups: list[int] | None) -> None:
    first, second = (random_rows(seed, 3, 3, torch.float64).requires_grad_() for seed in (4, 5))
    given = None if groups is None else torch.tensor(groups)
    assert torch.autograd.gradcheck(lambda a, b: OBJECTIVES[name](a, b, temperature=0.5, groups=given), (first, second))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nt-xent", math.log(9)),
        ("dcl", math.log(8)),
        ("dclw", math.log(8)),
        ("debiased", math.log(9)),
        ("additive-margin", math.log(1 + 8 * math.exp(0.1 / 0.2))),
        ("supcon", math.log(9)),
    ],
)
def test_collapsed_rows_cost_the_logarithm_of_the_number_of_rows(name: str, expected: float) -> None:
    rows = torch.tensor([[1.0, -2.0, 0.5]]).expand(5, 3).clone().requires_grad_()
    value = OBJECTIVES[name](rows, rows, temperature=0.2)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert rows.grad is not None and torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_autocast_are_computed_in_float32(name: str) -> None:
    first, second = random_rows(6).bfloat16(), random_rows(7).bfloat16()
    expected = OBJECTIVES[name](first.float(), second.float(), temperature=0.01).item()
    assert math.isfinite(expected)
    value = OBJECTIVES[name](first, second, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        cast = OBJECTIVES[name](first.float(), second.float(), temperature=0.01)
    assert value.dtype == cast.dtype == torch.float32
    assert (value.item(), cast.item()) == (expected, expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name: str) -> None:
    never_waits(OBJECTIVES[name], random_rows(0), random_rows(1), temperature=0.2, groups=torch.tensor(GROUPS))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one(name: str, two_ranks: TwoRanks) -> None:
    two_ranks(OBJECTIVES[name], random_rows(8), random_rows(9), temperature=0.2)
    two_ranks(OBJECTIVES[name], random_rows(8), random_rows(9), temperature=0.2, groups=torch.tensor(GROUPS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"second": torch.ones(3, 4)}, r"needs \(N, D\) batches of one shape, got \(4, 4\), \(3, 4\)"),
        ({"first": torch.ones(4), "second": torch.ones(4)}, r"needs \(N, D\) batches"),
        ({"first": torch.ones(1, 4), "second": torch.ones(1, 4)}, "at least 2 samples in the global batch, got 1"),
        ({"temperature": 0.0}, "temperature above 0, got 0"),
        ({"groups": torch.zeros(3, dtype=torch.int64)}, "one integer group for each of 4 samples"),
        ({"groups": torch.zeros(4)}, "one integer group for each of 4 samples"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_unusable_batches_are_named(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OBJECTIVES[name](**{"first": torch.ones(4, 4), "second": torch.ones(4, 4), "temperature": 0.1, **change})


def test_unusable_settings_are_named() -> None:
    rows = random_rows(0)
    with pytest.raises(ValueError, match="sigma above 0, got -1"):
        dclw(rows, rows, temperature=0.1, sigma=-1)
    with pytest.raises(ValueError, match=r"tau_plus in \[0, 1\), got 1"):
        debiased(rows, rows, temperature=0.1, tau_plus=1)


@pytest.mark.parametrize("name", WITH_NEGATIVES_LEFT_OUT)
def test_samples_of_one_volume_do_not_repel_each_other(name: str) -> None:
    """Samples 0 and 1 share a volume and sample 2 is orthogonal to both: nothing is gained by moving 0 off 1."""
    rows = torch.tensor([[1.0, 0.1, 0], [1.0, -0.1, 0], [0, 0, 1.0]])
    grown = []
    for groups in (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])):
        moved = rows.clone().requires_grad_()
        OBJECTIVES[name](moved, moved, temperature=0.2, groups=groups).backward()
        assert moved.grad is not None
        grown.append(-moved.grad[0, 1].item())
    assert grown[0] == pytest.approx(0, abs=1e-6)
    assert grown[1] > 0.01


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", WITH_NEGATIVES_LEFT_OUT)
def test_a_batch_of_one_volume_costs_nothing_and_gives_no_gradient(name: str) -> None:
    first, second = random_rows(0).requires_grad_(), random_rows(1)
    with torch.autograd.detect_anomaly():  # no NaN on the way either
        value = OBJECTIVES[name](first, second, temperature=0.1, groups=torch.zeros(6, dtype=torch.int64))
        value.backward()
    assert value.item() == 0
    assert first.grad is not None and first.grad.abs().max() == 0


def test_neutral_settings_give_the_plain_loss() -> None:
    first, second = random_rows(10), random_rows(11)
    plain = nt_xent(first, second, temperature=0.2).item()
    assert debiased(first, second, temperature=0.2, tau_plus=0).item() == pytest.approx(plain, rel=1e-5)
    assert debiased(first, second, temperature=0.2, tau_plus=1e-9).item() == pytest.approx(plain, rel=1e-5)
    assert additive_margin(first, second, temperature=0.2, margin=0).item() == pytest.approx(plain, rel=1e-5)
    assert OBJECTIVES["supcon"](first, second, temperature=0.2).item() == pytest.approx(plain, rel=1e-5)
    decoupled = dcl(first, second, temperature=0.2).item()
    assert dclw(first, second, temperature=0.2, sigma=1e6).item() == pytest.approx(decoupled, rel=1e-5)


@pytest.mark.parametrize("tau_plus", [0.5, 0.999 / math.e], ids=["nothing left", "less left than the floor"])
def test_debiased_negatives_never_fall_below_their_floor(tau_plus: float) -> None:
    first = torch.eye(2).requires_grad_()
    value = debiased(first, torch.eye(2), temperature=1.0, tau_plus=tau_plus)
    assert value.item() == pytest.approx(math.log1p(2 * math.exp(-2)), rel=1e-6)
    value.backward()
    assert first.grad is not None and torch.isfinite(first.grad).all()


def test_positives_that_are_less_alike_pull_harder_with_dclw() -> None:
    first = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    second = torch.tensor([[1.0, 0, 0.1], [0, 0.2, 1.0]])
    pulls = []
    for sigma in (0.5, 1e6):
        moved = second.clone().requires_grad_()
        dclw(first, moved, temperature=0.5, sigma=sigma).backward()
        assert moved.grad is not None
        pulls.append(moved.grad.norm(dim=1))
    assert pulls[0][1] > pulls[1][1]
    assert pulls[0][0] < pulls[1][0]
