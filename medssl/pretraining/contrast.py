"""What methods share that tell each sample from the others: which pairs may be told apart, and how well it is done."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medssl.config import Settings
from medssl.data.batch import View, Views
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product
from medssl.pretraining.joint import JointEmbedding, JointSettings, joint_health
from medssl.training.distributed import gather
from medssl.training.method import Needs


class ContrastSettings(JointSettings):
    """Settings of every method that contrasts a sample with others.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output is contrasted; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
        same_volume: What different crops of one volume are to each other: `left-out`, since they may show the same
            tissue, or `negative`.
    """

    same_volume: Literal["left-out", "negative"] = "left-out"


class InstanceContrast(JointEmbedding):
    """Tells the views of a sample from those of other samples; a subclass says with which loss."""

    settings: ContrastSettings

    @classmethod
    def needs_of(cls, settings: Settings) -> Needs:
        """Return the needs; where crops of one volume are left out, one volume leaves nothing to tell apart."""
        assert isinstance(settings, ContrastSettings)
        return dataclasses.replace(cls.needs, least_volumes=2 if settings.same_volume == "left-out" else 1)

    def volumes(self, view: View) -> Tensor:
        """Return the number of the volume of each sample of all ranks. Shape: (N,), int64.

        Raises:
            ValueError: If the view does not know it.
        """
        if view.sample_id is None:
            raise ValueError("The view has no sample_id, so that crops of one volume cannot be told: use Policy.view")
        return gather(view.sample_id)

    def groups(self, view: View) -> Tensor | None:
        """Return what samples must differ in to be told apart, or None where each is told from each. Shape: (N,)."""
        return self.volumes(view) if self.settings.same_volume == "left-out" else None

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of `joint_health` and `retrieval`; see there."""
        features = self.features(views[0])
        first, second = self.projector(features), self.project(views[1])
        return joint_health(features, first, second) | {"retrieval": float(retrieval(first, second))}


def retrieval(first: Tensor, second: Tensor) -> Tensor:
    """Return the part of samples whose second view is the nearest of all to their first; 1 / B by chance.

    Args:
        first: Shape: (B, D).
        second: Shape: (B, D).
    """
    first, second = (F.normalize(at_least_float32(rows), dim=1) for rows in (first, second))
    return (product(first, second.T).argmax(dim=1) == torch.arange(len(first), device=first.device)).float().mean()
