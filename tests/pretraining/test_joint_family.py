"""What every method keeps to that embeds two views and compares the vectors of a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from medssl.pretraining.barlow_twins import BarlowTwins
from medssl.pretraining.joint import JointEmbedding
from medssl.pretraining.moco import MoCo
from medssl.pretraining.moco_v3 import MoCoV3
from medssl.pretraining.simclr import SimCLR
from medssl.pretraining.swav import SwAV
from medssl.pretraining.vicreg import VICReg
from tests.pretraining.joint_cases import (
    STEP,
    chosen,
    freeze_features,
    health_of,
    method_of,
    total,
    train,
    views_of,
)

SWAV = {"prototypes": 6, "queue": 5}
CASES: dict[str, tuple[type[JointEmbedding], dict[str, Any]]] = {
    "simclr": (SimCLR, {}),
    "simclr-supcon": (SimCLR, {"objective": "supcon"}),
    "moco": (MoCo, {"queue": 5}),
    "moco-one-way": (MoCo, {"queue": 5, "symmetric": False}),
    "moco-v3": (MoCoV3, {"predictor_hidden": 12}),
    "barlow-twins": (BarlowTwins, {}),
    "barlow-twins-mixed": (BarlowTwins, {"mixing": 5.0}),
    "vicreg": (VICReg, {}),
    "swav": (SwAV, SWAV),
    "swav-no-queue": (SwAV, {"prototypes": 6, "queue": 0}),
}
of_each = pytest.mark.parametrize("name", CASES)


def case(name: str, **more: Any) -> JointEmbedding:
    kind, settings = CASES[name]
    return method_of(kind, **settings, **more)


@of_each
def test_gradients_reach_every_trained_weight_and_none_reaches_a_teacher(name: str) -> None:
    method = case(name, channels=2)
    views = views_of(method, channels=2)
    # nnU-Net starts the last norm of each residual block at zero: only the second step reaches what lies before it.
    train(method, views, 1, start=8)
    method.zero_grad()
    total(method.losses(views, STEP)).backward()
    for key, weight in method.named_parameters():
        if key.startswith(("network.decoder.", "teacher.")):
            assert not weight.requires_grad and weight.grad is None, key
        else:
            assert weight.grad is not None and weight.grad.abs().sum() > 0, key


@of_each
def test_the_loss_is_finite_and_a_function_of_views_and_weights(name: str) -> None:
    method = case(name)
    views = views_of(method)
    train(method, views, 2)
    first, second = (total(method.losses(views, STEP)).item() for _ in range(2))
    assert first == second and math.isfinite(first)


@pytest.mark.parametrize("name", [name for name in CASES if name != "barlow-twins-mixed"])
def test_the_order_of_samples_does_not_matter(name: str) -> None:
    method = case(name)
    views = views_of(method, volumes=[0, 1, 1, 2])
    train(method, views, 2)
    loss = total(method.losses(views, STEP)).item()
    assert total(method.losses(chosen(views, [2, 0, 3, 1]), STEP)).item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", ["moco", "swav"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(name: str) -> None:
    whole, resumed = case(name), case(name, seed=1)
    views = views_of(whole)
    train(whole, views, 2)
    resumed.load_state_dict(whole.state_dict())
    for method in (whole, resumed):
        train(method, views, 1, start=2)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@of_each
def test_a_look_leaves_no_trace(name: str) -> None:
    method = case(name)
    views = views_of(method)
    train(method, views, 1)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.eval()
    with torch.no_grad():
        method.losses(views, STEP)
    method.train()
    health_of(method, views)
    if (queue := getattr(method, "queue", None)) is not None:
        queue.take_in()
    for key, value in method.state_dict().items():
        assert torch.equal(before[key], value), key


@of_each
def test_one_feature_for_all_samples_shows_in_the_health_figures(name: str) -> None:
    method = case(name)
    views = views_of(method)
    train(method, views, 1)
    healthy = health_of(method, views)
    assert all(math.isfinite(value) for value in healthy.values())
    assert healthy["feature_std"] > 1e-3 and healthy["negative_similarity"] < 0.999
    freeze_features(method)
    broken = health_of(method, views)
    assert broken["feature_std"] == pytest.approx(0, abs=1e-6)
    assert broken["projection_std"] == pytest.approx(0, abs=1e-6)
    assert broken["effective_rank"] == pytest.approx(1, abs=1e-3)


@of_each
def test_the_heads_are_beside_the_network_and_not_in_it(name: str) -> None:
    method = case(name)
    network = set(method.network.state_dict())
    named = {key.removeprefix("network.") for key in method.state_dict() if key.startswith("network.")}
    assert named == network
    own = {key.partition(".")[0] for key in method.state_dict()} - {"network"}
    assert own <= {"projector", "predictor", "teacher", "queue", "prototypes"}
