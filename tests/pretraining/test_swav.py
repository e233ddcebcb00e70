"""SwAV."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.losses.clustering import swav
from medssl.pretraining.swav import SwAV, SwAVSettings, usage_figures
from medssl.training.method import Step
from tests.pretraining.joint_cases import STEP, freeze_features, health_of, keep_features, method_of, train, views_of


def small(**settings: Any) -> SwAV:
    return method_of(SwAV, **{"prototypes": 6, "queue": 10, **settings})


def lengths(method: SwAV) -> Tensor:
    return method.prototypes.weight.detach().norm(dim=1)


def rows_of(method: SwAV, count: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, method.projector.width, generator=generator) for _ in range(2)]


def scores_of(method: SwAV, rows: list[Tensor]) -> list[Tensor]:
    return [F.normalize(of_view, dim=1) @ method.prototypes.weight.detach().T for of_view in rows]


def test_prototypes_have_length_one_from_the_start_and_after_every_step() -> None:
    method = small()
    torch.testing.assert_close(lengths(method), torch.ones(6))
    assert method.prototypes.bias is None
    before = method.prototypes.weight.detach().clone()
    train(method, views_of(method), 2, start=3)
    assert not torch.allclose(method.prototypes.weight, before)
    torch.testing.assert_close(lengths(method), torch.ones(6))


def test_prototypes_stand_still_in_the_first_part_of_the_run() -> None:
    method = small(hold=0.5)
    views = views_of(method)
    before = method.prototypes.weight.detach().clone()
    projector = method.projector[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    train(method, views, 5)
    torch.testing.assert_close(method.prototypes.weight.detach(), before)
    assert not torch.allclose(method.projector[0].weight, projector)  # type: ignore[arg-type]
    assert method.prototypes.weight.grad is not None, "DDP waits for the gradient of every weight"
    train(method, views, 1, start=5)
    assert not torch.allclose(method.prototypes.weight.detach(), before)


def test_the_loss_is_swapped_prediction_of_cosines() -> None:
    method = small(queue=0)
    rows = rows_of(method)
    expected = swav(*scores_of(method, rows), temperature=0.1, epsilon=0.05, iterations=3)
    loss = method.objective(rows, [], STEP)["assignment"].item()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    longer = [7 * of_view for of_view in rows]
    assert method.objective(longer, [], STEP)["assignment"].item() == pytest.approx(loss, rel=1e-5)


def test_codes_are_spread_over_the_queue_too_but_only_once_it_is_full() -> None:
    method = small(queue=8)
    rows = rows_of(method)
    alone = swav(*scores_of(method, rows), temperature=0.1, epsilon=0.05, iterations=3).item()
    earlier = [rows_of(method, seed=seed) for seed in (1, 2)]
    for batch in earlier:
        assert method.objective(rows, [], STEP)["assignment"].item() == pytest.approx(alone, rel=1e-5)
        assert method.queue is not None
        method.queue.take_in()
        # Only these rows and no others: what the look above offered is written over.
        method.queue.position.zero_() if batch is earlier[0] else method.queue.position.fill_(4)
        method.queue.offer(torch.cat([F.normalize(of_view, dim=1) for of_view in batch], dim=1))
        method.queue.take_in()
        method.queue.count.fill_(4 if batch is earlier[0] else 8)
    queues = scores_of(method, [torch.cat([batch[view] for batch in earlier]) for view in range(2)])
    helped = swav(
        *scores_of(method, rows), temperature=0.1, epsilon=0.05, iterations=3, queue_a=queues[0], queue_b=queues[1]
    ).item()
    assert method.objective(rows, [], STEP)["assignment"].item() == pytest.approx(helped, rel=1e-5)
    assert helped != pytest.approx(alone, rel=1e-3)


def test_the_queue_takes_both_views_of_each_sample() -> None:
    method = small(queue=5)
    rows = rows_of(method)
    method.objective(rows, [], STEP)
    method.after_step(STEP)
    assert method.queue is not None and method.queue.filled.tolist() == [True] * 4 + [False]
    both = torch.cat([F.normalize(of_view, dim=1) for of_view in rows], dim=1)
    torch.testing.assert_close(method.queue.rows[:4], both)


def test_there_are_fewer_prototypes_than_the_queue_holds_samples() -> None:
    assert SwAVSettings().prototypes < SwAVSettings().queue


def test_without_sinkhorn_samples_fall_into_few_prototypes_and_health_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = {}
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(
                "medssl.losses.clustering.sinkhorn",
                lambda scores, *, epsilon, iterations: (scores / epsilon).softmax(1),
            )
        method = small(queue=0, hold=0.0)
        views = views_of(method, 12)
        keep_features(method, views)
        train(method, views, 60, rate=0.2, of=60)
        figures[broken] = health_of(method, views)
    assert figures[False]["prototype_entropy"] > 0.85 and figures[False]["prototypes_used"] > 0.8
    assert figures[True]["prototype_entropy"] < 0.7 and figures[True]["prototypes_used"] < 0.7


def test_health_shows_one_cluster_for_all_and_how_full_the_queue_is() -> None:
    method = small()
    views = views_of(method)
    assert health_of(method, views)["queue_filled"] == 0
    train(method, views, 1)
    assert health_of(method, views)["queue_filled"] == pytest.approx(0.4)
    method = small(queue=0)
    assert health_of(method, views)["prototypes_used"] > 1 / 6
    freeze_features(method)
    broken = health_of(method, views)
    assert broken["prototypes_used"] == pytest.approx(1 / 6)
    assert broken["prototype_entropy"] == pytest.approx(broken["prediction_entropy"], rel=1e-4)


def test_usage_figures_have_their_values_at_the_ends() -> None:
    one = usage_figures(torch.tensor([1.0, 0.0, 0.0]).expand(5, 3), 0.01)
    assert one == pytest.approx({"prototypes_used": 1 / 3, "prototype_entropy": 0, "prediction_entropy": 0}, abs=1e-6)
    even = usage_figures(torch.eye(3), 0.01)
    assert even == pytest.approx({"prototypes_used": 1, "prototype_entropy": 1, "prediction_entropy": 0}, abs=1e-6)
    undecided = usage_figures(torch.zeros(4, 3), 0.1)
    assert undecided["prediction_entropy"] == pytest.approx(1, rel=1e-6)
    assert math.isfinite(undecided["prototype_entropy"])


def test_the_prototypes_move_from_the_step_on_at_which_they_are_let_go() -> None:
    method = small(queue=0, hold=0.3)
    rows = rows_of(method)
    moved = []
    for index in range(6):
        method.zero_grad()
        method.objective(rows, [], Step(index, 10))["assignment"].backward()
        assert method.prototypes.weight.grad is not None
        moved.append(method.prototypes.weight.grad.abs().sum().item() > 0)
    assert moved == [False] * 3 + [True] * 3
