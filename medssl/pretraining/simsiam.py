"""SimSiam: guess from one view what the network itself says of the other (Chen and He, CVPR 2021).

BYOL without a teacher: what keeps all samples from getting one vector is that the gradient stops at the target, and the
predictor with its bottleneck.

Deviations: heads have a quarter of the paper's widths (2048, bottleneck 512), since encoders are smaller than a
ResNet-50; the predictor's learning rate follows the schedule like all others, where the paper keeps it constant and
finds that somewhat better. With `schedule.name=constant` all weights have the rate of the paper's predictor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import Views
from medssl.losses.cosine import simsiam
from medssl.losses.precision import at_least_float32
from medssl.pretraining.distillation import predictor_gain
from medssl.pretraining.embedding_norm import balanced_gradient
from medssl.pretraining.heads import ProjectorSettings, predictor
from medssl.pretraining.joint import JointEmbedding, JointSettings, joint_health
from medssl.training.distributed import gather
from medssl.training.method import Step


class SimSiamProjectorSettings(ProjectorSettings):
    """The paper's projector: three layers, the output normalised too; see `ProjectorSettings`."""

    width: int = Field(default=512, ge=1)
    layers: int = Field(default=3, ge=0)
    last_norm: bool = True


class SimSiamSettings(JointSettings):
    """Settings of SimSiam.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output the predictor has to guess; it is thrown away.
        embedding_norm: How the length of predictions is controlled.
        predictor_hidden: Width of the predictor's hidden layer, a bottleneck.
    """

    projector: SimSiamProjectorSettings = SimSiamProjectorSettings()
    predictor_hidden: int = Field(default=128, ge=1)


class SimSiam(JointEmbedding):
    """Guesses the projection of one view from that of the other, and stops the gradient at what is guessed.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `SimSiamSettings`.
    """

    settings: SimSiamSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: SimSiamSettings) -> None:
        super().__init__(network, policy, settings)
        self.predictor: nn.Module = predictor(self.projector.width, settings.predictor_hidden, settings.projector.norm)

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the negative cosine of the predictions of both views with the projections of the other."""
        projections = [at_least_float32(self.projector(self.features(view))) for view in views]
        first, second = (gather(self.predict(rows)) for rows in projections)
        return {"similarity": simsiam(first, second, *(gather(rows.detach()) for rows in projections))}

    def predict(self, projection: Tensor) -> Tensor:
        """Return the guess at the other view's projection. Shape: (B, D), float32."""
        return balanced_gradient(self.settings.embedding_norm, at_least_float32(self.predictor(projection)))

    def health(self, views: Views) -> dict[str, float]:
        """Return whether features and projections differ between samples, and whether the predictor does its part.

        See `joint_health`. `direction_std` is the paper's measure, the deviation of z / |z| over samples, times the
        root of its width: 1 where directions spread evenly, 0 on collapse. `predictor_gain` is 0 where there is no
        predictor.
        """
        features = self.features(views[0])
        first, second = self.projector(features), self.projector(self.features(views[1]))
        return joint_health(features, first, second) | {
            "direction_std": float(direction_std(first)),
            "predictor_gain": float(predictor_gain(first, self.predictor(first), second)),
        }


def direction_std(rows: Tensor) -> Tensor:
    """Return the deviation over samples of rows of length 1, mean over their features, times the root of the width.

    Args:
        rows: Shape: (N, D), N >= 2.
    """
    directions = F.normalize(at_least_float32(rows), dim=1)
    spread: Tensor = torch.std(directions, dim=0, correction=0).mean() * rows.shape[1] ** 0.5
    return spread
