"""What methods share that decorrelate the features of projections: their head, and what they watch."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import Views
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product
from medssl.pretraining.heads import ProjectorSettings
from medssl.pretraining.joint import JointEmbedding, JointSettings, joint_health
from medssl.training.distributed import gather

EPS = 1e-5


class DeepProjectorSettings(ProjectorSettings):
    """The projector of the papers of Barlow Twins and VICReg; see `ProjectorSettings`.

    Three layers, and 512 wide where they have 8192: the correlation of N samples has a rank of N - 1 at most.
    """

    hidden: int = Field(default=512, ge=1)
    width: int = Field(default=512, ge=1)
    layers: int = Field(default=3, ge=0)


class DecorrelationSettings(JointSettings):
    """Settings of every method that decorrelates features.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose features are decorrelated; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
    """

    projector: DeepProjectorSettings = DeepProjectorSettings()


class Decorrelation(JointEmbedding):
    """Keeps the features of projections apart from each other; a subclass says how.

    The projector's last layer has no bias, as in both papers: to shift a feature changes no correlation, no variance
    and no distance of two views.
    """

    def __init__(self, network: nn.Module, policy: Policy, settings: DecorrelationSettings) -> None:
        super().__init__(network, policy, settings)
        if len(self.projector) and isinstance(last := self.projector[-1], nn.Linear):
            last.register_parameter("bias", None)

    def health(self, views: Views) -> dict[str, float]:
        """Return whether features of the projections vary over the batch and differ from each other.

        Beyond `joint_health` and `correlation_figures`: `variance_std`, the mean standard deviation of a feature in the
        batch over all ranks (0 on collapse).
        """
        features = self.features(views[0])
        first, second = self.projector(features), self.project(views[1])
        figures = joint_health(features, first, second)
        first, second = gather(at_least_float32(first)), gather(second)
        variance = {"variance_std": float(first.std(dim=0, correction=0).mean())}
        return figures | correlation_figures(first, second) | variance


def correlation_figures(first: Tensor, second: Tensor) -> dict[str, float]:
    """Return how near the cross-correlation of two views is to the identity; waits for the device.

    Args:
        first: Projections of one view, of the whole batch. Shape: (N, D).
        second: Projections of the other. Shape: (N, D).

    Returns:
        `correlation_diagonal`, the mean correlation of a feature with itself in the other view (1 at best, 0 where
        features are constant), and `correlation_off_diagonal`, the root mean square of that of different features (0
        at best; about 1 / sqrt(N) for independent features, 1 where all features are one).
    """
    first, second = _standardised(first), _standardised(second)
    correlation = product(first.T, second) / len(first)
    diagonal, width = correlation.diagonal(), len(correlation)
    others = (correlation.square().sum() - diagonal.square().sum()) / max(width * (width - 1), 1)
    values = torch.stack([diagonal.mean(), others.clamp(min=0).sqrt()]).tolist()
    return dict(zip(("correlation_diagonal", "correlation_off_diagonal"), values, strict=True))


def _standardised(rows: Tensor) -> Tensor:
    rows = at_least_float32(rows)
    rows = rows - rows.mean(dim=0)
    return rows * torch.rsqrt(rows.square().mean(dim=0) + EPS)
