"""BYOL: guess from one view what a slow copy of the network says of the other (Grill et al., NeurIPS 2020).

No sample is compared with another one, so that small batches do. What keeps all samples from getting one vector is the
predictor, which only the student has, and the teacher, which follows slowly.

Deviations: the momentum starts at 0.99 and not at 0.996, since runs here are shorter than the paper's 1000 epochs;
heads are 512 wide and not 4096, since encoders are smaller than a ResNet-50. Batch norms have no running statistics, so
that the teacher uses those of the batch, as the paper's does. With a `projector.norm` other than `batch` the pooled
features of an instance-normalised encoder differ too little from sample to sample, and the run collapses within steps.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import View, Views
from medssl.losses.cosine import byol
from medssl.losses.precision import at_least_float32
from medssl.networks.pooling import pooled_stages
from medssl.pretraining.distillation import predictor_gain, teacher_lag
from medssl.pretraining.embedding_norm import balanced_gradient
from medssl.pretraining.heads import ProjectorSettings, predictor
from medssl.pretraining.joint import JointEmbedding, JointSettings, joint_health
from medssl.pretraining.teacher import Teacher, TeacherSettings
from medssl.training.distributed import gather
from medssl.training.method import Step


class BYOLSettings(JointSettings):
    """Settings of BYOL.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output the student's predictor has to guess; it is thrown away.
        embedding_norm: How the length of predictions is controlled.
        predictor_hidden: Width of the predictor's hidden layer.
        teacher: How the teacher follows.
    """

    projector: ProjectorSettings = ProjectorSettings(hidden=512, width=128)
    predictor_hidden: int = Field(default=512, ge=1)
    teacher: TeacherSettings = TeacherSettings()


class BYOL(JointEmbedding):
    """Guesses the teacher's projection of one view from the student's of the other.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `BYOLSettings`.
    """

    settings: BYOLSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: BYOLSettings) -> None:
        super().__init__(network, policy, settings)
        self.predictor: nn.Module = predictor(self.projector.width, settings.predictor_hidden, settings.projector.norm)
        self.teacher = Teacher(settings.teacher, encoder=self.encoder, projector=self.projector)

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the distance of the predictions of both views from the teacher's projections of the other."""
        first, second = (gather(self.predict(view)) for view in views)
        first_target, second_target = (gather(self.target(view)) for view in views)
        return {"distance": byol(first, second, first_target, second_target)}

    def after_step(self, step: Step) -> None:
        """Let the teacher follow."""
        self.teacher.follow(step)

    def predict(self, view: View) -> Tensor:
        """Return the student's guess at the teacher's projection. Shape: (B, D), float32."""
        guess = at_least_float32(self.predictor(self.projector(self.features(view))))
        return balanced_gradient(self.settings.embedding_norm, guess)

    @torch.no_grad()
    def target(self, view: View) -> Tensor:
        """Return the teacher's projection. Shape: (B, D), float32."""
        features = pooled_stages(self.teacher.encoder, view.image, self.settings.stages)
        return at_least_float32(self.teacher["projector"](features))

    def health(self, views: Views) -> dict[str, float]:
        """Return whether features and projections differ between samples, and whether predictor and teacher do.

        See `joint_health`, whose similarities are here those of the student's projection with the teacher's of the
        other view; `predictor_gain` and `teacher_lag` are 0 where the predictor or the slowness of the teacher is
        missing.
        """
        features, target = self.features(views[0]), self.target(views[1])
        projection = self.projector(features)
        gain = predictor_gain(projection, self.predictor(projection), target)
        lag = teacher_lag(self.teacher, self.encoder)
        return joint_health(features, projection, target) | {"predictor_gain": float(gain), "teacher_lag": float(lag)}
