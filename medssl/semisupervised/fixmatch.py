"""FixMatch: what is sure of a weak view is the label of a strong one."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.losses.consistency import confident_cross_entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.mean_teacher import TeacherStudent, TeacherStudentSettings
from medssl.training.method import Step


class FixMatchSettings(TeacherStudentSettings):
    """Settings of FixMatch.

    Args:
        threshold: Least probability of the likeliest class on the weak view for a place to be learnt from.
        labels_from: Whose prediction of the weak view is the label. The paper's is the student's, and its average over
            steps only predicts after training.
    """

    threshold: float = Field(default=0.95, ge=0, le=1)
    labels_from: Literal["student", "teacher"] = "student"


class FixMatch(TeacherStudent):
    """FixMatch (Sohn et al., NeurIPS 2020).

    In segmentation both views show the same voxels and differ in intensity; in classification each has a geometry of
    its own. Places below the threshold are ignored, by probabilities as the network gives them. The field's code for
    segmentation stretches them to [0, 1] first and then makes each unsure voxel background, which is not FixMatch.
    Deliberate deviation: the average forgets faster than the paper's 0.999, which is for a million steps.
    """

    settings: FixMatchSettings

    def unlabelled_views(self, batch: Batch, draw: Draw) -> list[SemiView]:
        """Return the weak view and the strong one."""
        if self.task.is_dense:
            return self.weak_and_strong(batch, draw)
        views = [self.of_purpose(purpose).view(batch, draw.child(purpose)) for purpose in ("weak", "strong")]
        return [SemiView(**vars(view)) for view in views]

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `pseudo_label`."""
        weak, strong = views
        where, count = self.counted(weak)
        guess = self.taught(weak.image) if self.settings.labels_from == "teacher" else self.guessed(weak.image)
        logits = self.networks[0](strong.image)
        return {"pseudo_label": confident_cross_entropy(logits, guess, self.settings.threshold, where, count=count)}

    @torch.no_grad()
    def guessed(self, image: Tensor) -> Tensor:
        """Return the student's probabilities, without gradient. Shape: (B, K, *rest)."""
        logits: Tensor = self.networks[0](image)
        return logits.float().softmax(dim=1)
