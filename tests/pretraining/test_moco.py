"""MoCo with a queue."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.data.batch import View, Views
from medssl.pretraining.moco import MoCo, MoCoSettings
from medssl.training.method import Step
from medssl.training.queue import NO_VOLUME
from tests.pretraining.joint_cases import (
    STEP,
    freeze_features,
    health_of,
    method_of,
    of_volumes,
    total,
    train,
    views_of,
)


def constructed(queries: Tensor, keys: Tensor, volumes: list[int], **settings: object) -> tuple[MoCo, Views]:
    """A method whose networks give these rows, two views with volumes; shape of each: (2, N, 8)."""
    method = method_of(MoCo, **{"queue": 3, **settings})
    views = [of_volumes(*volumes), of_volumes(*volumes)]

    def rows(of: Tensor, view: View) -> Tensor:
        return of[0] if view is views[0] else of[1]

    method.project = lambda view: rows(queries, view)  # type: ignore[method-assign]
    method.key = lambda view: rows(keys, view)  # type: ignore[method-assign]
    return method, views


def unit(*shape: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def slow_contrast(query: Tensor, key: Tensor, volumes: list[int], queue: list[tuple[Tensor, int]], own: bool) -> float:
    """InfoNCE at 0.2 in plain loops; `own` counts other crops of one's volume as negatives."""
    losses = []
    for i, row in enumerate(query):
        positive = math.exp(float(row @ key[i]) / 0.2)
        others = [(key[j], volumes[j]) for j in range(len(key)) if j != i] + queue
        negatives = [math.exp(float(row @ other) / 0.2) for other, volume in others if own or volume != volumes[i]]
        losses.append(-math.log(positive / (positive + sum(negatives))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_negatives_are_the_queue_and_the_batch_without_ones_own_volume(own: bool, symmetric: bool) -> None:
    queries, keys, volumes = unit(2, 3, 8, seed=1), unit(2, 3, 8, seed=2), [0, 1, 1]
    method, views = constructed(
        queries, keys, volumes, same_volume="negative" if own else "left-out", symmetric=symmetric
    )
    entries = unit(2, 8, seed=3)
    method.queue.offer(entries, torch.tensor([1, 7]))
    method.queue.take_in()
    queue = [(entries[0], 1), (entries[1], 7)]
    ways = [slow_contrast(queries[0], keys[1], volumes, queue, own)]
    if symmetric:
        ways.append(slow_contrast(queries[1], keys[0], volumes, queue, own))
    expected = sum(ways) / len(ways)
    assert method.losses(views, STEP)["contrast"].item() == pytest.approx(expected, rel=1e-5)


def test_what_is_in_the_places_of_an_unfilled_queue_does_not_count() -> None:
    method = method_of(MoCo, queue=6)
    views = views_of(method)
    loss = total(method.losses(views, STEP)).item()
    method.queue.rows.copy_(unit(6, 8))
    assert total(method.losses(views, STEP)).item() == loss


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_queue_takes_the_teachers_keys_with_their_volumes_after_the_step(symmetric: bool) -> None:
    method = method_of(MoCo, queue=20, symmetric=symmetric)
    views = views_of(method, volumes=[4, 5, 5, 6])
    keys = torch.cat([method.key(view) for view in (views[::-1] if symmetric else views[1:])])
    method.losses(views, STEP)
    assert not method.queue.filled.any()
    method.after_step(STEP)
    assert torch.equal(method.queue.rows[method.queue.filled], keys)
    assert method.queue.volumes[: len(keys)].tolist() == [4, 5, 5, 6] * (len(keys) // 4)
    assert method.queue.volumes[len(keys) :].unique().tolist() == [NO_VOLUME]


def test_the_queue_need_not_be_a_multiple_of_the_batch() -> None:
    method = method_of(MoCo, queue=7)
    views = views_of(method)
    train(method, views, 3)
    assert method.queue.full and math.isfinite(total(method.losses(views, STEP)).item())


def test_the_teacher_follows_and_gives_keys_without_gradient() -> None:
    method = method_of(MoCo, teacher={"momentum": 0.0, "final": 0.0})
    views = views_of(method)
    assert not method.key(views[0]).requires_grad
    assert health_of(method, views)["teacher_lag"] == 0
    train(method, views, 2)
    assert health_of(method, views)["teacher_lag"] == 0
    method = method_of(MoCo)
    train(method, views, 2)
    assert health_of(method, views)["teacher_lag"] > 0
    assert (MoCoSettings().teacher.at(Step(0, 9)), MoCoSettings().teacher.at(Step(9, 9))) == pytest.approx(
        (0.99, 0.999)
    )


def test_health_tells_how_full_the_queue_is_and_when_its_keys_are_all_one() -> None:
    method = method_of(MoCo, queue=16)
    views = views_of(method)
    assert health_of(method, views)["queue_filled"] == 0
    train(method, views, 1)
    healthy = health_of(method, views)
    assert healthy["queue_filled"] == 0.5 and healthy["queue_std"] > 1e-3 and healthy["queue_similarity"] < 0.9999
    freeze_features(method)
    method.key = lambda view: F.normalize(method.projector(method.features(view)), dim=1)  # type: ignore[method-assign]
    for _ in range(2):
        method.losses(views, STEP)
        method.queue.take_in()
    broken = health_of(method, views)
    assert broken["queue_filled"] == 1
    assert broken["queue_std"] == pytest.approx(0, abs=1e-6)
    assert broken["queue_similarity"] == pytest.approx(1, rel=1e-5)
    assert broken["retrieval"] == pytest.approx(1 / 4)
