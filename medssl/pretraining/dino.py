"""DINO: sort views into prototypes as a slow copy of the network sorts other views (Caron et al., ICCV 2021).

The student sees two crops and some smaller windows of their surroundings, the teacher the two crops; each view of the
student has to be sorted as the teacher sorts each other view. Centring keeps the teacher from putting all samples into
one prototype, its low temperature from spreading each over all of them.

Deviations: 1024 prototypes and not 65536, which a small archive could not fill; small windows are not enlarged, since a
voxel has a size in mm, and are cut at half of the patch by default (an eighth of its volume); heads are narrower and
have batch norm, without which the pooled features of an instance-normalised encoder differ too little from sample to
sample to be sorted; the teacher's temperature stays at 0.04, as by default in the authors' code, since in runs of some
hundred steps one that rose to the paper's 0.07 left all prototypes nearly alike; the centre starts as the mean of the
first step and not as 0, from which the student would learn what all samples share and then have to unlearn it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.errors import UsageError
from medssl.losses.clustering import centred_target, dino, updated_centre
from medssl.losses.precision import at_least_float32
from medssl.networks.encoder import Encoder
from medssl.networks.pooling import pooled_stages
from medssl.pretraining.distillation import Prototypes, teacher_lag
from medssl.pretraining.heads import ProjectorSettings, scaled_gradient
from medssl.pretraining.health import feature_std
from medssl.pretraining.joint import JointEmbedding, JointSettings, joint_health
from medssl.pretraining.teacher import Teacher, TeacherSettings
from medssl.training.distributed import gather
from medssl.training.method import Needs, Step


class DINOProjectorSettings(ProjectorSettings):
    """Three layers before the prototypes; see `ProjectorSettings`."""

    width: int = Field(default=256, ge=1)
    layers: int = Field(default=3, ge=0)


class DINOSettings(JointSettings):
    """Settings of DINO.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both large views show; None draws them apart, within the
            policy's shift.
        projector: The head before the prototypes; both are thrown away.
        embedding_norm: How the length of what comes before the prototypes is controlled.
        prototypes: How many.
        local_crops: Small views, which only the student sees.
        local_size: Their size in voxels, multiples of the network's stride; None takes half of the patch, rounded up
            to a multiple, and two strides at least.
        student_temperature: Divides the student's scores.
        teacher_temperature: Divides the teacher's at the first step.
        final_temperature: Divides them after the warm-up; the paper's long runs rise to 0.07.
        warmup: Part of the run in which the teacher's temperature rises (the paper's 30 of 300 epochs).
        centre_momentum: Part of the centre that stays at each step; less in the first ones, which are averaged.
        hold: Part of the run, from its start on, in which the prototypes stand still (the paper's first of 100
            epochs).
        teacher: How the teacher follows.
    """

    projector: DINOProjectorSettings = DINOProjectorSettings()
    prototypes: int = Field(default=1024, ge=2)
    local_crops: int = Field(default=4, ge=0)
    local_size: tuple[int, ...] | None = None
    student_temperature: float = Field(default=0.1, gt=0)
    teacher_temperature: float = Field(default=0.04, gt=0)
    final_temperature: float = Field(default=0.04, gt=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    centre_momentum: float = Field(default=0.9, ge=0, lt=1)
    hold: float = Field(default=0.01, ge=0, lt=1)
    teacher: TeacherSettings = TeacherSettings()

    def temperature_at(self, step: Step) -> float:
        """Return the teacher's temperature at a step."""
        passed = min(step.fraction / self.warmup, 1.0) if self.warmup else 1.0
        return self.teacher_temperature + (self.final_temperature - self.teacher_temperature) * passed


class DINO(JointEmbedding):
    """Sorts large and small views into prototypes as the teacher sorts the other large views.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `DINOSettings`.

    Raises:
        UsageError: If small views do not fit the patch or the network's stride.
    """

    needs: ClassVar[Needs] = Needs(views=6, policy="contrastive", least_batch=2)
    settings: DINOSettings
    centre: Tensor

    def __init__(self, network: nn.Module, policy: Policy, settings: DINOSettings) -> None:
        super().__init__(network, policy, settings)
        self.prototypes = Prototypes(self.projector.width, settings.prototypes)
        self.teacher = Teacher(
            settings.teacher, encoder=self.encoder, projector=self.projector, prototypes=self.prototypes
        )
        self.register_buffer("centre", torch.zeros(settings.prototypes))
        self._teachers_scores: list[Tensor] = []
        self.small: Policy | None = None
        if settings.local_crops:
            size = local_size(self.encoder, policy.patch_size, settings.local_size)
            self.small = Policy(policy.purpose, policy.by_modality, size, policy.settings)

    @classmethod
    def needs_of(cls, settings: Settings) -> Needs:
        """Return the needs, with as many views as the settings ask for."""
        assert isinstance(settings, DINOSettings)
        return dataclasses.replace(cls.needs, views=2 + settings.local_crops)

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Make two views of the patch's size, then small ones that lie within the middle patch of what was read."""
        views = super().views(batch, draw)
        if self.small is None:
            return views
        room = [whole - part for whole, part in zip(self.policy.patch_size, self.small.patch_size, strict=True)]
        reach = torch.tensor([0] * (3 - len(room)) + [edge // 2 for edge in room])
        for number in range(self.settings.local_crops):
            own = draw.child(f"local {number}")
            shift = torch.floor(own.child("shift").uniform(0, 1, (3,)) * (2 * reach + 1)).long() - reach
            views.append(self.small.view(batch, own, shift=shift))
        return views

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the cross-entropy of the student's sorting of each view with the teacher's of each other."""
        held = step.fraction < self.settings.hold
        weight = scaled_gradient(self.prototypes.weight, 0.0 if held else 1.0)
        student = [gather(self.prototypes(self.project(view), weight)) for view in views]
        teacher = [gather(self.target(view)) for view in views[:2]]
        if self.training:
            # The centre moves after the step, and a validation does not move it.
            self._teachers_scores += teacher
        loss = dino(
            student,
            teacher,
            self.centre,
            student_temperature=self.settings.student_temperature,
            teacher_temperature=self.settings.temperature_at(step),
        )
        return {"cross_entropy": loss}

    @torch.no_grad()
    def after_step(self, step: Step) -> None:
        """Move the centre to the teacher's mean scores of the step, and let the teacher follow."""
        if self._teachers_scores:
            stays = min(self.settings.centre_momentum, step.index / (step.index + 1))
            self.centre.copy_(updated_centre(self.centre, self._teachers_scores, momentum=stays))
            self._teachers_scores.clear()
        self.teacher.follow(step)

    @torch.no_grad()
    def target(self, view: View) -> Tensor:
        """Return the teacher's scores, not centred. Shape: (B, K), float32."""
        scores: Tensor = self.teacher["prototypes"](self.teachers_projection(view))
        return scores

    @torch.no_grad()
    def teachers_projection(self, view: View) -> Tensor:
        """Return what the teacher compares with its prototypes. Shape: (B, D), float32."""
        features = pooled_stages(self.teacher.encoder, view.image, self.settings.stages)
        return at_least_float32(self.teacher["projector"](features))

    def health(self, views: Views) -> dict[str, float]:
        """Return whether samples differ, and how the teacher sorts them at its final temperature.

        See `joint_health` and `sorting_health`; `teacher_lag` is 0 where the teacher is the student.
        """
        features, projection = self.features(views[0]), self.teachers_projection(views[1])
        scores = torch.cat([self.target(views[0]), self.teacher["prototypes"](projection)])
        shares = centred_target(scores, self.centre, temperature=self.settings.final_temperature)
        return (
            joint_health(features, self.projector(features), projection)
            | sorting_health(shares)
            | {"teacher_lag": float(teacher_lag(self.teacher, self.encoder))}
        )


def sorting_health(shares: Tensor) -> dict[str, float]:
    """Return figures that tell whether samples are sorted into prototypes apart.

    Args:
        shares: Share of each prototype in each sample. Shape: (N, K), each row sums to 1.

    Returns:
        `teacher_entropy`: mean entropy of a sample's shares, in units of ln K: 0 for one prototype, 1 for all alike.
        `kl_to_uniform`: of the mean shares, in units of ln K: 1 where all samples lie in one prototype, which is what
        happens without centring; among N samples that each have a prototype it is at least 1 - ln N / ln K.
        `prototypes_used`: exponential of the entropy of the mean shares. `sorting_std`: see
        `medssl.pretraining.health.feature_std`; 0 where all samples are sorted alike, in whichever way.
    """
    shares = at_least_float32(shares)
    largest = torch.log(torch.tensor(float(shares.shape[1]), device=shares.device))
    entropy, together = _entropy(shares).mean(), _entropy(shares.mean(dim=0))
    figures = {
        "teacher_entropy": entropy / largest,
        "kl_to_uniform": 1 - together / largest,
        "prototypes_used": together.exp(),
        "sorting_std": feature_std(shares),
    }
    return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))


def local_size(encoder: Encoder, patch_size: Sequence[int], wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Return the size of small views.

    Args:
        encoder: The encoder, which says what a size must be a multiple of.
        patch_size: Size of the large views.
        wanted: What the settings say; None takes half of the patch, rounded up, and two strides at least, since an
            instance norm needs more than one position.

    Raises:
        UsageError: If the size does not fit the patch or the network's stride.
    """
    strides = encoder.strides[-1]
    if wanted is None:
        halves = [max(-(-edge // (2 * stride)), 2) for edge, stride in zip(patch_size, strides, strict=True)]
        return tuple(min(half * stride, edge) for half, stride, edge in zip(halves, strides, patch_size, strict=True))
    fits = len(wanted) == len(patch_size) and all(
        0 < size <= edge and size % stride == 0 for size, edge, stride in zip(wanted, patch_size, strides, strict=False)
    )
    if not fits or all(size == stride for size, stride in zip(wanted, strides, strict=False)):
        raise UsageError(
            f"local_size {list(wanted)}: small views need multiples of the network's stride {list(strides)}, at most "
            f"the patch {list(patch_size)}, and more than one stride along some axis. Leave it out for half of the "
            "patch, or set local_crops=0."
        )
    return tuple(int(size) for size in wanted)


def _entropy(shares: Tensor) -> Tensor:
    """Return the entropy of shares along the last axis, in nats."""
    return -torch.xlogy(shares, shares).sum(dim=-1)
