"""The loss of VoCo."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from medssl.losses.volume_contrast import SOFTENING, predicted_overlap, volume_contrast
from tests.losses.references import dot, mean, unit


def rows(seed: int, count: int, samples: int = 2, width: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(samples, count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def case(dtype: torch.dtype = torch.float32, samples: int = 2) -> list[Tensor]:
    """Two targets, three bases, and overlaps of which some are 0."""
    overlap = torch.rand(samples, 2, 3, generator=torch.Generator().manual_seed(9), dtype=dtype) / 3
    overlap[0, 0, 1] = 0
    overlap[1, 1] = torch.tensor([0.0, 0.0, 1.0])
    return [*(rows(seed, count, samples, dtype=dtype) for seed, count in enumerate((2, 3, 2, 3))), overlap]


def cosines(left: Tensor, right: Tensor) -> list[list[float]]:
    return [[max(dot(a, b), 0.0) for b in unit(right)] for a in unit(left)]


def slow(target: Tensor, base: Tensor, teacher_target: Tensor, teacher_base: Tensor, overlap: Tensor) -> list[float]:
    """The three terms in plain Python, pair by pair."""
    present, weight, absent, apart = 0.0, 0.0, [], []
    for sample in range(len(target)):
        ours = cosines(target[sample], teacher_base[sample])
        theirs = cosines(teacher_target[sample], base[sample])
        for n, m in product(range(target.shape[1]), range(base.shape[1])):
            guessed, true = (ours[n][m] + theirs[n][m]) / 2, overlap[sample, n, m].item()
            present -= true * math.log(1 - (1 - SOFTENING) * abs(true - guessed))
            weight += true
            absent += [guessed**2] if true == 0 else []
        bases = cosines(base[sample], base[sample])
        apart += [bases[i][j] ** 2 for i, j in product(range(base.shape[1]), repeat=2) if i != j]
    return [present / weight, mean(absent), mean(apart)]


def test_it_equals_its_definition() -> None:
    assert [term.item() for term in volume_contrast(*case()).values()] == pytest.approx(slow(*case()), rel=1e-5)


def test_a_target_that_is_one_base_and_looks_like_another_costs_what_a_hand_computes() -> None:
    base = torch.eye(2)[None]
    target = base[:, :1]
    right = volume_contrast(target, base, target, base, torch.tensor([[[1.0, 0.0]]]))
    wrong = volume_contrast(target, base, target, base, torch.tensor([[[0.0, 1.0]]]))
    assert [term.item() for term in right.values()] == pytest.approx([0, 0, 0], abs=1e-6)
    assert [term.item() for term in wrong.values()] == pytest.approx([-math.log(SOFTENING), 1, 0], rel=1e-5)


def test_half_an_overlap_is_met_by_a_cosine_of_a_half() -> None:
    base = torch.eye(2)[None]
    target = torch.tensor([[[0.5, math.sqrt(0.75)]]])
    terms = volume_contrast(target, base, target, base, torch.tensor([[[0.5, math.sqrt(0.75)]]]))
    assert terms["overlap"].item() == pytest.approx(0, abs=1e-6)


def test_collapsed_embeddings_pay_for_every_base_that_is_not_overlapped() -> None:
    same = torch.ones(1, 3, 4)
    overlap = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]]])
    terms = volume_contrast(same, same, same, same, overlap)
    missed = [-y * math.log(1 - (1 - SOFTENING) * (1 - y)) for y in (1, 0.5, 0.5, 0.25, 0.25, 0.5)]
    assert [term.item() for term in terms.values()] == pytest.approx([sum(missed) / 3, 1, 1], rel=1e-4)


def test_order_of_samples_targets_and_bases_and_lengths_do_not_matter() -> None:
    target, base, teacher_target, teacher_base, overlap = case()
    expected = [term.item() for term in volume_contrast(*case()).values()]
    bases = torch.tensor([2, 0, 1])
    moved = volume_contrast(
        3 * target.flip(0, 1),
        base[:, bases].flip(0),
        teacher_target.flip(0, 1),
        0.1 * teacher_base[:, bases].flip(0),
        overlap[:, :, bases].flip(0, 1),
    )
    assert [term.item() for term in moved.values()] == pytest.approx(expected, rel=1e-5)


def test_student_and_teacher_may_change_places_in_what_is_predicted() -> None:
    target, base, teacher_target, teacher_base, _ = case()
    ours = predicted_overlap(target, base, teacher_target, teacher_base)
    torch.testing.assert_close(ours, predicted_overlap(teacher_target, teacher_base, target, base))
    assert ours.min() >= 0 and ours.max() <= 1


def test_opposite_rows_predict_no_overlap() -> None:
    row = torch.tensor([[[1.0, 2.0]]])
    assert predicted_overlap(row, -row, row, -row).item() == 0


def test_gradients_match_finite_differences() -> None:
    *embeddings, overlap = case(torch.float64)

    def total(*given: Tensor) -> Tensor:
        return torch.stack(list(volume_contrast(*given, overlap).values())).sum()  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(total, [rows.requires_grad_() for rows in embeddings])


def test_a_batch_without_overlap_or_without_absence_costs_nothing_there() -> None:
    *embeddings, overlap = case()
    assert volume_contrast(*embeddings, torch.zeros_like(overlap))["overlap"].item() == 0
    assert volume_contrast(*embeddings, torch.full_like(overlap, 0.3))["absent"].item() == 0


def test_bfloat16_gives_finite_terms_in_float32() -> None:
    terms = volume_contrast(*(values.bfloat16() for values in case()))
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms.values())


def test_zero_rows_give_finite_gradients() -> None:
    *embeddings, overlap = case()
    zeros = [torch.zeros_like(rows).requires_grad_() for rows in embeddings]
    torch.stack(list(volume_contrast(*zeros, overlap).values())).sum().backward()
    assert all(row.grad is not None and torch.isfinite(row.grad).all() for row in zeros)


def test_two_ranks_compute_what_one_does(two_ranks) -> None:
    two_ranks(volume_contrast, *case(samples=4))


def test_unusable_shapes_are_named() -> None:
    target, base, teacher_target, teacher_base, overlap = case()
    with pytest.raises(ValueError, match="bases with M of 2 or more"):
        volume_contrast(target, base[:, :1], teacher_target, teacher_base[:, :1], overlap[:, :, :1])
    with pytest.raises(ValueError, match="overlaps of shape"):
        volume_contrast(target, base, teacher_target, teacher_base, overlap[:, :1])
    with pytest.raises(ValueError, match="of student and teacher"):
        volume_contrast(target, base, teacher_target[:, :1], teacher_base, overlap)
    with pytest.raises(ValueError, match="of student and teacher"):
        volume_contrast(target, base[..., :3], teacher_target, teacher_base[..., :3], overlap)
