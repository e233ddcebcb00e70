"""MoCo v3: a predictor's guesses are told from the teacher's keys of the same batch (Chen et al., ICCV 2021).

Like SimCLR it lives on the size of the batch; unlike MoCo it keeps no queue.

Deviations: crops of one volume are no negatives of each other, since they may show the same tissue; heads are 512 wide
and not 4096, since encoders are smaller than a ResNet-50; batch norms have no running statistics.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import View, Views
from medssl.losses.key_contrast import symmetric_key_contrast
from medssl.losses.precision import at_least_float32
from medssl.networks.pooling import pooled_stages
from medssl.pretraining.contrast import ContrastSettings, InstanceContrast, retrieval
from medssl.pretraining.distillation import predictor_gain, teacher_lag
from medssl.pretraining.embedding_norm import balanced_gradient
from medssl.pretraining.heads import ProjectorSettings, predictor
from medssl.pretraining.joint import joint_health
from medssl.pretraining.teacher import Teacher, TeacherSettings
from medssl.training.distributed import gather
from medssl.training.method import Step


class MoCoV3ProjectorSettings(ProjectorSettings):
    """The projector, whose output is normalised too, as in the paper; see `ProjectorSettings`."""

    last_norm: bool = True


class MoCoV3Settings(ContrastSettings):
    """Settings of MoCo v3.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose output the predictor guesses; it is thrown away.
        embedding_norm: How the length of predictions is controlled.
        same_volume: What different crops of one volume are to each other, `left-out` or `negative`.
        temperature: Cosines are divided by it.
        predictor_hidden: Width of the predictor's hidden layer.
        teacher: How the teacher follows.
    """

    projector: MoCoV3ProjectorSettings = MoCoV3ProjectorSettings()
    temperature: float = Field(default=0.2, gt=0)
    predictor_hidden: int = Field(default=512, ge=1)
    teacher: TeacherSettings = TeacherSettings()


class MoCoV3(InstanceContrast):
    """Tells a prediction of the teacher's key from the keys of all other samples of the batch.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `MoCoV3Settings`.
    """

    settings: MoCoV3Settings

    def __init__(self, network: nn.Module, policy: Policy, settings: MoCoV3Settings) -> None:
        super().__init__(network, policy, settings)
        self.predictor: nn.Module = predictor(self.projector.width, settings.predictor_hidden, settings.projector.norm)
        self.teacher = Teacher(settings.teacher, encoder=self.encoder, projector=self.projector)

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the contrast of each view's predictions with the other's keys, as `contrast`."""
        queries = [gather(self.predict(view)) for view in views]
        keys = [gather(self.key(view)) for view in views]
        loss = symmetric_key_contrast(
            *queries, *keys, temperature=self.settings.temperature, groups=self.groups(views[0])
        )
        return {"contrast": loss}

    def after_step(self, step: Step) -> None:
        """Let the teacher follow."""
        self.teacher.follow(step)

    def predict(self, view: View) -> Tensor:
        """Return the student's guess at the teacher's key. Shape: (B, D), float32."""
        guess = at_least_float32(self.predictor(self.projector(self.features(view))))
        return balanced_gradient(self.settings.embedding_norm, guess)

    @torch.no_grad()
    def key(self, view: View) -> Tensor:
        """Return the teacher's projection. Shape: (B, D), float32."""
        features = pooled_stages(self.teacher.encoder, view.image, self.settings.stages)
        return at_least_float32(self.teacher["projector"](features))

    def health(self, views: Views) -> dict[str, float]:
        """Return whether predictions tell their keys from others.

        Beyond `joint_health`, whose second projections are here the teacher's: `retrieval` of keys by predictions,
        `predictor_gain` and `teacher_lag`, which are 0 where the predictor or the slowness of the teacher is missing.
        """
        features, key = self.features(views[0]), self.key(views[1])
        projection = self.projector(features)
        guess = self.predictor(projection)
        figures = {
            "retrieval": retrieval(guess, key),
            "predictor_gain": predictor_gain(projection, guess, key),
            "teacher_lag": teacher_lag(self.teacher, self.encoder),
        }
        return joint_health(features, projection, key) | {name: float(value) for name, value in figures.items()}
