"""UA-MT: a mean teacher that is believed only where it says the same again and again."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.losses.consistency import entropy_of, squared_difference
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.dropping import draw_kept, dropped
from medssl.semisupervised.mean_teacher import MeanTeacherSettings, TeacherStudent, noisy
from medssl.semisupervised.ramp import risen
from medssl.training.distributed import mean_across_ranks
from medssl.training.method import Step


class UncertaintyTeacherSettings(MeanTeacherSettings):
    """Settings of UA-MT.

    Args:
        passes: Predictions of the teacher that uncertainty is measured on.
        dropout: How often a channel of the deepest features is dropped in each of them.
        threshold: Entropy of their mean, as a part of log K, up to which a voxel is learnt from at first.
        threshold_fraction: Part of the run after which every voxel is; the threshold rises as the weight does.
    """

    passes: int = Field(default=8, ge=2)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    threshold: float = Field(default=0.75, ge=0, le=1)
    threshold_fraction: float = Field(default=1.0, ge=0, le=1)

    def largest_entropy(self, step: Step, classes: int) -> float:
        """Return the entropy in nats below which a voxel is learnt from at a step."""
        risen_to = self.threshold + (1 - self.threshold) * risen(step, self.threshold_fraction)
        return risen_to * math.log(classes)


class UncertaintyTeacher(TeacherStudent):
    """Uncertainty-aware mean teacher (Yu et al., MICCAI 2019): squared difference where the teacher is certain.

    The entropy of the mean of several noisy predictions of the teacher says where that is. The loss is the mean over
    certain voxels. Deliberate deviations: the paper's code drops in a V-Net's bottleneck and before its head, by the
    generator of the whole process; here channels of the deepest features are dropped, by a mask that belongs to the
    sample. The teacher's target is one prediction without dropout. The student's image is noisy too, as in
    `MeanTeacher`, and the weight is by default that of `MeanTeacher` (the paper's 0.1 is reached at its last step).
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    settings: UncertaintyTeacherSettings

    def unlabelled_views(self, batch: Batch, draw: Draw) -> list[SemiView]:
        """Return views of the same voxels with noise of their own: student, teacher, and each pass of the teacher."""
        settings = self.settings
        (plain,) = super().unlabelled_views(batch, draw)
        pair = [noisy(plain, draw.child(name), settings.noise) for name in ("student", "teacher")]
        passes = []
        for number in range(settings.passes):
            own = draw.child(f"pass {number}")
            kept = draw_kept(own.child("channels"), self.encoder.widths[-1], settings.dropout)
            passes.append(noisy(plain, own.child("noise"), settings.noise).with_drawn(kept=kept))
        return [*pair, *passes]

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `consistency`, the mean over the certain voxels; 0 where none is."""
        student, teacher, *passes = views
        probabilities = self.networks[0](student.image).float().softmax(dim=1)
        where = self.certain(student, passes, step)
        count = mean_across_ranks(where.sum().float())
        return {"consistency": squared_difference(probabilities, self.taught(teacher.image), where, count=count)}

    @torch.no_grad()
    def certain(self, view: SemiView, passes: list[SemiView], step: Step) -> Tensor:
        """Return where a voxel counts and the teacher is certain of it. Shape: (B, 1, *spatial), bool."""
        where = self.task.where(view)
        assert where is not None
        total = self._stochastic(passes[0])
        for each in passes[1:]:
            total += self._stochastic(each)
        uncertainty = entropy_of(total / len(passes))[:, None]
        return where & (uncertainty < self.settings.largest_entropy(step, self.task.classes))

    def _stochastic(self, view: SemiView) -> Tensor:
        unet = self.teacher["network"]
        *shallow, deepest = unet.encoder(view.image)  # type: ignore[operator]
        logits: Tensor = unet.decoder([*shallow, *dropped([deepest], view.drawn["kept"])])  # type: ignore[operator]
        return logits.float().softmax(dim=1)
