"""Soft assignments to prototypes: Sinkhorn-Knopp, SwAV and DINO."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.losses.clustering import centred_target, dino, sinkhorn, swapped_prediction, swav, updated_centre
from tests.losses.conftest import TwoRanks
from tests.losses.references import Rows, dino_of_two, mean, never_waits, random_rows, softmax, unit

Shapes = list[tuple[int, ...]]
CENTRE = torch.tensor([0.1, -0.2, 0.3, 0.0])


def scores(seed: int, count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines with four prototypes: each row has length 1."""
    return torch.tensor(unit(random_rows(seed, count)), dtype=dtype)


def slow_sinkhorn(values: Tensor, epsilon: float, iterations: int) -> Rows:
    """Exponentials whose columns, then rows, are divided by their sums."""
    table = [[math.exp(value / epsilon) for value in row] for row in values.tolist()]
    for _ in range(iterations):
        sums = [sum(column) for column in zip(*table, strict=True)]
        table = [[value / total for value, total in zip(row, sums, strict=True)] for row in table]
        table = [[value / sum(row) for value in row] for row in table]
    return table


def slow_cross_entropy(targets: Rows, guesses: Tensor, temperature: float) -> float:
    return mean(
        -sum(t * math.log(g) for t, g in zip(target, softmax(guess, temperature), strict=True))
        for target, guess in zip(targets, guesses.tolist(), strict=True)
    )


def test_codes_of_two_samples_are_what_a_hand_computes() -> None:
    """exp gives [[2, 1], [1, 1]]: columns become [2/3, 1/3] and [1/2, 1/2], then the rows sum to 1."""
    values = torch.tensor([[math.log(2), 0.0], [0.0, 0.0]])
    expected = torch.tensor([[4 / 7, 3 / 7], [2 / 5, 3 / 5]])
    torch.testing.assert_close(sinkhorn(values, epsilon=1.0, iterations=1), expected)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.5, 1)])
def test_codes_equal_their_definition(epsilon: float, iterations: int) -> None:
    values = scores(0, 9)
    expected = torch.tensor(slow_sinkhorn(values, epsilon, iterations))
    codes = sinkhorn(values, epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(codes, expected, rtol=1e-4, atol=1e-6)


def test_codes_spread_samples_over_prototypes_that_all_prefer_one() -> None:
    values = scores(1, 12) / 5 + torch.tensor([1.0, 0.0, 0.0, 0.0])
    codes = sinkhorn(values, iterations=50)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(12))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((4,), 3.0), rtol=0.05, atol=0)


def test_codes_of_equal_scores_are_uniform_and_have_no_gradient() -> None:
    values = torch.tensor([[0.9, 0.1, -0.5]]).expand(5, 3).clone().requires_grad_()
    codes = sinkhorn(values)
    torch.testing.assert_close(codes, torch.full((5, 3), 1 / 3))
    assert not codes.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_of_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    codes = sinkhorn(scores(2).to(dtype), epsilon=0.001)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(6))


@pytest.mark.parametrize("queued", [False, True])
def test_swav_equals_its_definition(queued: bool) -> None:
    a, b = scores(0), scores(1)
    queues: dict[str, Any] = {"queue_a": scores(2, 8), "queue_b": scores(3, 7)} if queued else {}
    both = [torch.cat([a, scores(2, 8)]), torch.cat([b, scores(3, 7)])] if queued else [a, b]
    codes_a, codes_b = (slow_sinkhorn(values, 0.05, 3)[:6] for values in both)
    expected = (slow_cross_entropy(codes_b, a, 0.1) + slow_cross_entropy(codes_a, b, 0.1)) / 2
    assert swav(a, b, **queues).item() == pytest.approx(expected, rel=1e-4)


def test_a_hard_code_costs_what_a_hand_computes() -> None:
    value = swapped_prediction(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), temperature=0.5)
    assert value.item() == pytest.approx(math.log(1 + math.exp(2)), rel=1e-6)


def test_order_of_samples_views_and_prototypes_does_not_matter_to_swav() -> None:
    a, b, order = scores(0), scores(1), torch.tensor([3, 1, 5, 0, 2, 4])
    value = swav(a, b).item()
    for x, y in [(a[order], b[order]), (b, a), (a.flip(1), b.flip(1))]:
        assert swav(x, y).item() == pytest.approx(value, rel=1e-5)


def test_gradients_of_scores_match_finite_differences_while_codes_stand_still() -> None:
    a, b = (scores(seed, dtype=torch.float64).requires_grad_() for seed in (0, 1))
    codes_a, codes_b = sinkhorn(a), sinkhorn(b)

    def frozen(x: Tensor, y: Tensor) -> Tensor:
        return (swapped_prediction(x, codes_b) + swapped_prediction(y, codes_a)) / 2

    assert torch.autograd.gradcheck(frozen, (a, b))
    for ours, expected in zip(
        torch.autograd.grad(swav(a, b), (a, b)), torch.autograd.grad(frozen(a, b), (a, b)), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_given_codes_get_no_gradient() -> None:
    values, codes = scores(0).requires_grad_(), torch.full((6, 4), 0.25).requires_grad_()
    swapped_prediction(values, codes).backward()
    assert values.grad is not None and codes.grad is None


def test_equal_scores_cost_the_logarithm_of_the_number_of_prototypes() -> None:
    assert swav(torch.zeros(6, 5), torch.zeros(6, 5)).item() == pytest.approx(math.log(5), rel=1e-6)


def test_swav_of_two_ranks_equals_one_and_waits_for_nothing(two_ranks: TwoRanks) -> None:
    queues = {"queue_a": scores(2, 8), "queue_b": scores(3, 8)}
    two_ranks(swav, scores(0), scores(1), **queues)
    never_waits(swav, scores(0), scores(1), **queues)


def test_swav_of_half_precision_is_computed_in_float32() -> None:
    a, b = scores(0).bfloat16(), scores(1).bfloat16()
    value = swav(a, b, queue_a=scores(2), queue_b=scores(3))
    with torch.autocast("cpu", torch.bfloat16):
        cast = swav(a.float(), b.float(), queue_a=scores(2), queue_b=scores(3))
    assert value.dtype == torch.float32
    assert math.isfinite(value.item())
    assert value.item() == cast.item()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores_b": torch.zeros(5, 4)}, "SwAV needs .* of one shape"),
        ({"scores_a": torch.zeros(4)}, r"Sinkhorn needs \(N, D\)"),
        ({"temperature": 0.0}, "SwAV needs temperature above 0"),
        ({"epsilon": 0.0}, "Sinkhorn needs epsilon above 0"),
        ({"iterations": 0}, "iterations above 0, got 0"),
        ({"queue_a": torch.zeros(8, 3)}, r"queue of that width, got \(8, 3\)"),
    ],
)
def test_unusable_scores_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swav(**{"scores_a": torch.zeros(6, 4), "scores_b": torch.zeros(6, 4), **change})


def test_dino_costs_what_a_hand_computes() -> None:
    """Student a = [0, ln 3] against the target of view b, and b, uniform, against the target of a."""
    student = [torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)]
    teacher = [torch.tensor([[5.0, 1.0]]), torch.tensor([[1.0, 0.0]])]
    value = dino(student, teacher, torch.tensor([1.0, 0.0]), student_temperature=1.0, teacher_temperature=1.0)
    from_b = -(math.log(0.25) + math.log(0.75)) / 2
    assert value.item() == pytest.approx((from_b + math.log(2)) / 2, rel=1e-6)


@pytest.mark.parametrize(("students", "teachers"), [(2, 2), (5, 2), (2, 1)])
def test_dino_equals_its_definition_and_skips_the_same_view(students: int, teachers: int) -> None:
    student = [random_rows(seed) for seed in range(students)]
    teacher = [random_rows(10 + seed) for seed in range(teachers)]
    errors = []
    for i in range(teachers):
        centred = [[x - c for x, c in zip(row, CENTRE.tolist(), strict=True)] for row in teacher[i].tolist()]
        target = [softmax(row, 0.04) for row in centred]
        errors += [slow_cross_entropy(target, student[j], 0.1) for j in range(students) if j != i]
    assert len(errors) == students * teachers - teachers
    assert dino(student, teacher, CENTRE).item() == pytest.approx(mean(errors), rel=1e-4)


def test_order_of_samples_views_and_prototypes_does_not_matter_to_dino() -> None:
    student, teacher = [random_rows(seed) for seed in range(3)], [random_rows(10), random_rows(11)]
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    value = dino(student, teacher, CENTRE).item()
    moved = dino([row[order] for row in student], [row[order] for row in teacher], CENTRE).item()
    swapped = dino([student[1], student[0], student[2]], teacher[::-1], CENTRE).item()
    flipped = dino([row.flip(1) for row in student], [row.flip(1) for row in teacher], CENTRE.flip(0)).item()
    assert (moved, swapped, flipped) == pytest.approx((value, value, value), rel=1e-5)


def test_gradients_reach_the_student_alone_and_match_finite_differences() -> None:
    first, second = (random_rows(seed, 3, 4, torch.float64).requires_grad_() for seed in (0, 1))
    teacher = [random_rows(seed, 3, 4, torch.float64).requires_grad_() for seed in (2, 3)]
    assert torch.autograd.gradcheck(lambda a, b: dino([a, b], [t.detach() for t in teacher], CENTRE), (first, second))
    centre = CENTRE.clone().requires_grad_()
    dino([first, second], teacher, centre).backward()
    assert first.grad is not None and teacher[0].grad is None and teacher[1].grad is None and centre.grad is None


def test_uniform_outputs_cost_the_logarithm_of_the_number_of_outputs() -> None:
    rows = torch.full((6, 5), 0.7)
    assert dino([rows, rows], [rows, rows], torch.zeros(5)).item() == pytest.approx(math.log(5), rel=1e-6)


def test_a_centre_at_the_mean_takes_away_what_all_samples_share() -> None:
    common = torch.tensor([3.0, 0.0, 0.0, 0.0])
    rows = random_rows(0) / 10
    torch.testing.assert_close(centred_target(rows + common, common), centred_target(rows, torch.zeros(4)))
    assert centred_target(rows + common, torch.zeros(4))[:, 0].min() > 0.99


def test_dino_of_half_precision_is_computed_in_float32() -> None:
    student, teacher = [random_rows(0).bfloat16(), random_rows(1).bfloat16()], [random_rows(2).bfloat16()]
    value = dino(student, teacher, CENTRE)
    with torch.autocast("cpu", torch.bfloat16):
        cast = dino([row.float() for row in student], [row.float() for row in teacher], CENTRE)
    assert value.dtype == torch.float32
    assert math.isfinite(value.item())
    assert value.item() == cast.item()


def test_dino_of_two_ranks_equals_one_and_waits_for_nothing(two_ranks: TwoRanks) -> None:
    keywords = {"teacher_a": random_rows(2), "teacher_b": random_rows(3), "centre": CENTRE}
    two_ranks(dino_of_two, random_rows(0), random_rows(1), **keywords)
    never_waits(dino_of_two, random_rows(0), random_rows(1), **keywords)


@pytest.mark.parametrize(
    ("students", "teachers", "centre", "message"),
    [
        ([(6, 4)], [(6, 4)], (4,), "got 1 views of the student and 1 of the teacher"),
        ([(6, 4)] * 2, [], (4,), "got 2 views of the student and 0 of the teacher"),
        ([(6, 4)] * 2, [(6, 4)] * 3, (4,), "got 2 views of the student and 3 of the teacher"),
        ([(6, 4), (5, 4)], [(6, 4)], (4,), "DINO needs .* of one shape"),
        ([(6, 4)] * 2, [(6, 4)], (3,), r"centre of shape \(4,\), got \(3,\)"),
    ],
)
def test_unusable_views_are_named(students: Shapes, teachers: Shapes, centre: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dino([torch.zeros(s) for s in students], [torch.zeros(t) for t in teachers], torch.zeros(centre))


@pytest.mark.parametrize("name", ["student_temperature", "teacher_temperature"])
def test_unusable_temperatures_are_named(name: str) -> None:
    rows = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=f"{name} above 0"):
        dino([rows, rows], [rows], CENTRE, **{name: 0.0})


def test_the_centre_moves_towards_the_mean_of_all_views() -> None:
    teacher = [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[4.0, 2.0], [4.0, 2.0]])]
    centre = torch.tensor([10.0, 1.0])
    torch.testing.assert_close(updated_centre(centre, teacher, momentum=0.9), torch.tensor([9.3, 1.0]))
    assert updated_centre(centre, teacher, momentum=1.0).tolist() == [10.0, 1.0]
    assert updated_centre(centre, teacher, momentum=0.0).tolist() == [3.0, 1.0]
    assert centre.tolist() == [10.0, 1.0]


def test_the_centre_keeps_its_precision_and_takes_no_gradient() -> None:
    output = random_rows(0).bfloat16().requires_grad_()
    moved = updated_centre(CENTRE, [output])
    assert moved.dtype == torch.float32
    assert not moved.requires_grad
    never_waits(lambda rows, centre: rows.sum() + updated_centre(centre, [rows]).sum(), random_rows(0), centre=CENTRE)


def test_unusable_centres_are_named() -> None:
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\], got 1.5"):
        updated_centre(CENTRE, [random_rows(0)], momentum=1.5)
    with pytest.raises(ValueError, match="needs outputs"):
        updated_centre(CENTRE, [])
    with pytest.raises(ValueError, match="needs outputs"):
        updated_centre(CENTRE, [torch.zeros(6, 3)])
