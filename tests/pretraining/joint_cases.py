"""Small methods that embed two views, and what they are shown, for the tests of each of them."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.config import check_settings
from medssl.data.batch import View, Views
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_decoder, freeze_unused_outputs
from medssl.pretraining.joint import JointEmbedding
from medssl.training.method import Step
from tests.pretraining.test_mae import batch_of

Kind = TypeVar("Kind", bound=JointEmbedding)
STEP = Step(5, 10)
SMALL = {"projector": {"hidden": 12, "width": 8}}


def method_of(
    kind: type[Kind], size: tuple[int, ...] = (16, 16), *, channels: int = 1, seed: int = 0, **settings: Any
) -> Kind:
    """Build a method on the smallest U-Net with a small head."""
    network = build_network("resenc-xs", dimensions=len(size), in_channels=channels, out_channels=channels, seed=seed)
    freeze_unused_outputs(network)
    freeze_decoder(network)
    policy = policy_for(kind.needs.policy, {"MR"}, size, AugmentationSettings())
    torch.manual_seed(seed)
    model = get_type_hints(kind)["settings"]
    values = {**SMALL, **settings}
    return kind(network, policy, check_settings(model, values, "test"))


def views_of(method: JointEmbedding, count: int = 4, *, channels: int = 1, volumes: list[int] | None = None) -> Views:
    """Let a method make its views of random crops."""
    batch = batch_of(method, count, channels)  # type: ignore[arg-type]
    if volumes is not None:
        batch.sample_id = torch.tensor(volumes)
    with torch.no_grad():
        return method.views(batch, Draw(0, batch.sample_index))


def chosen(views: Views, rows: Tensor | list[int]) -> Views:
    """Return some samples of each view."""
    index = torch.as_tensor(rows)
    return [
        dataclasses.replace(
            view,
            image=view.image[index],
            inside=view.inside[index],
            to_source_mm=view.to_source_mm[index],
            sample_id=None if view.sample_id is None else view.sample_id[index],
        )
        for view in views
    ]


def of_volumes(*volumes: int) -> View:
    """Return a view of which only the volumes matter."""
    count = len(volumes)
    return View(
        image=torch.zeros(count, 1, 16, 16),
        inside=torch.ones(count, 1, 16, 16, dtype=torch.bool),
        to_source_mm=torch.zeros(count, 3, 4),
        sample_id=torch.tensor(volumes),
    )


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def train(method: JointEmbedding, views: Views, steps: int, rate: float = 0.05, start: int = 0, of: int = 10) -> None:
    """Take some steps on the same views."""
    optimiser = torch.optim.SGD([weight for weight in method.parameters() if weight.requires_grad], lr=rate)
    for index in range(start, start + steps):
        optimiser.zero_grad()
        total(method.losses(views, Step(index, of))).backward()
        optimiser.step()
        method.after_step(Step(index, of))


def freeze_features(method: JointEmbedding, value: float = 1.0) -> None:
    """Break the encoder on purpose: one feature for all samples."""

    def constant(view: View) -> Tensor:
        width = method.projector[0].in_features
        return torch.full((len(view.image), int(width)), value)  # type: ignore[arg-type]

    method.features = constant  # type: ignore[method-assign]


def keep_features(method: JointEmbedding, views: Views) -> None:
    """Let the heads learn alone, on the features that the encoder has now."""
    with torch.no_grad():
        kept = {id(view): method.features(view) for view in views}
    method.features = lambda view: kept[id(view)]  # type: ignore[method-assign]


def health_of(method: JointEmbedding, views: Views) -> dict[str, float]:
    """Look at a method's health as the loop does."""
    method.eval()
    with torch.no_grad():
        figures = method.health(views)
    method.train()
    return figures
