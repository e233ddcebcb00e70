"""What methods share that embed two views of a crop, one vector each, and compare the vectors of a whole batch."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import pooled_stages, pooled_width
from medssl.pretraining.embedding_norm import EmbeddingNormSettings, balanced_gradient, cut_weights
from medssl.pretraining.heads import Projector, ProjectorSettings
from medssl.pretraining.health import effective_rank, feature_std
from medssl.training.distributed import gather
from medssl.training.method import Method, Needs, Step


class JointSettings(Settings):
    """Settings of every method that embeds two views.

    Args:
        stages: Which stages of the encoder are pooled: `all`, side by side, so that each of them learns, or the
            `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output the loss sees; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
    """

    stages: Literal["all", "last"] = "all"
    overlap: tuple[float, float] | None = None
    projector: ProjectorSettings = ProjectorSettings()
    embedding_norm: EmbeddingNormSettings = Field(default_factory=EmbeddingNormSettings)

    @field_validator("overlap")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0 <= value[0] < value[1] <= 1:
            raise ValueError(f"the overlap is a range within 0 to 1, got {value}")
        return value


class JointEmbedding(Method):
    """Embeds two views of each crop; a subclass says what is asked of the embeddings.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `JointSettings`.
    """

    needs: ClassVar[Needs] = Needs(views=2, policy="contrastive", least_batch=2)

    def __init__(self, network: nn.Module, policy: Policy, settings: JointSettings) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.policy = policy
        self.settings = settings
        self.projector = Projector(pooled_width(self.encoder, settings.stages), settings.projector)
        cut_weights(settings.embedding_norm, self.encoder.unet.encoder, self.projector)  # type: ignore[arg-type]

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Make two views of each crop, of a drawn overlap where one is asked for."""
        if self.settings.overlap is None:
            return self.policy.two(batch, draw)
        return self.policy.pair(batch, draw, self.settings.overlap)

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return what `objective` makes of the embeddings of the whole batch."""
        return self.objective([gather(self.project(view)) for view in views], views, step)

    def objective(self, projections: list[Tensor], views: Views, step: Step) -> dict[str, Tensor]:
        """Return the named terms of the loss.

        Args:
            projections: Rows of all ranks for each view, in one order. Shape of each: (N, D).
            views: The views of this rank.
            step: Where the run is.
        """
        raise NotImplementedError

    def features(self, view: View) -> Tensor:
        """Return the pooled features of a view. Shape: (B, W), float32."""
        return pooled_stages(self.encoder, view.image, self.settings.stages)

    def project(self, view: View) -> Tensor:
        """Return what the loss compares. Shape: (B, D), float32."""
        return balanced_gradient(self.settings.embedding_norm, at_least_float32(self.projector(self.features(view))))

    def health(self, views: Views) -> dict[str, float]:
        """Return whether features and projections differ between samples; see `joint_health`."""
        features = self.features(views[0])
        return joint_health(features, self.projector(features), self.project(views[1]))


def joint_health(features: Tensor, first: Tensor, second: Tensor) -> dict[str, float]:
    """Return figures that tell whether embeddings tell samples apart.

    Args:
        features: Pooled features of one view, what transfers. Shape: (B, W).
        first: Projections of that view. Shape: (B, D).
        second: Projections of the other view, or their targets. Shape: (B, D).

    Returns:
        `feature_std` and `projection_std` (0 on collapse), `effective_rank` of the projections, the mean cosine of
        views of one sample (`positive_similarity`) and of different ones (`negative_similarity`; 1 on collapse), and
        the mean length of a projection.
    """
    first, second = at_least_float32(first), at_least_float32(second)
    cosines = product(F.normalize(first, dim=1), F.normalize(second, dim=1).T)
    count = len(first)
    others = (cosines.sum() - cosines.diagonal().sum()) / max(count * (count - 1), 1)
    figures = {
        "feature_std": feature_std(features),
        "projection_std": feature_std(first),
        "effective_rank": effective_rank(first),
        "positive_similarity": cosines.diagonal().mean(),
        "negative_similarity": others,
        "projection_norm": first.norm(dim=1).mean(),
    }
    # One transfer in place of one for each figure.
    return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))
