"""What methods share in which a student learns from a teacher that is a slow copy of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medssl.losses.precision import at_least_float32
from medssl.losses.similarity import product, unit_rows
from medssl.networks.encoder import Encoder
from medssl.pretraining.teacher import Teacher


def teacher_lag(teacher: Teacher, student: Encoder) -> Tensor:
    """Return how far the teacher's encoder is behind its student's, relative to the length of the student's weights.

    0 where the teacher is the student (a momentum of 0), and growing through the run where it stands still (a momentum
    of 1). Scalar, float32 or wider.
    """
    theirs, ours = (list(encoder.unet.encoder.parameters()) for encoder in (teacher.encoder, student))  # type: ignore[union-attr]
    behind = torch.stack([(mine - yours).square().sum() for mine, yours in zip(ours, theirs, strict=True)]).sum()
    length = torch.stack([weight.square().sum() for weight in ours]).sum()
    return (behind / length.clamp(min=1e-12)).sqrt()


def predictor_gain(projection: Tensor, prediction: Tensor, target: Tensor) -> Tensor:
    """Return how much nearer to its target, in mean cosine, a student comes by its predictor.

    0 where there is no predictor: then nothing keeps student and teacher from agreeing on one vector for all samples.

    Args:
        projection: What the predictor is given. Shape: (B, D).
        prediction: What it makes of it. Shape: (B, D).
        target: What the teacher says. Shape: (B, D).
    """
    projection, prediction, target = (at_least_float32(rows) for rows in (projection, prediction, target))
    gain = F.cosine_similarity(prediction, target, dim=1) - F.cosine_similarity(projection, target, dim=1)
    return gain.mean()


class Prototypes(nn.Module):
    """Directions that vectors are compared with: the last layer of DINO with weight norm, all lengths fixed at 1.

    Computed in float32 whatever the network computes in: the scores are divided by temperatures of some hundredths.

    Args:
        width: Length of a vector.
        count: How many directions.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width) / width**0.5)

    def forward(self, rows: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the cosine of each vector with each direction.

        Args:
            rows: Shape: (N, D).
            weight: Takes the place of the layer's own, for one whose gradient is scaled. Shape: (K, D).

        Returns:
            Shape: (N, K), float32 or wider, within [-1, 1].
        """
        directions = unit_rows(self.weight if weight is None else weight)
        return product(unit_rows(at_least_float32(rows)), directions.T)
