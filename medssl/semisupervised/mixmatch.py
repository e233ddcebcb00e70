"""MixMatch: labelled images and guessed ones are blended with each other, and so are their labels."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from medssl.augmentation.mixing import draw_mixup
from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.losses.consistency import sharpened, squared_difference
from medssl.semisupervised.batch import PairedBatch, SemiView
from medssl.semisupervised.mean_teacher import TeacherStudent, TeacherStudentSettings
from medssl.semisupervised.method import unlabelled_draw
from medssl.semisupervised.mixing import blend, joined, mixed_up, pool_draw, soft_labels
from medssl.semisupervised.ramp import RampSettings
from medssl.training.distributed import mean_across_ranks
from medssl.training.method import Step


class MixMatchSettings(TeacherStudentSettings):
    """Settings of MixMatch.

    Args:
        unlabelled: The weight is what was published for knee radiographs; the paper's, for natural images, are 75 and
            100.
        guesses: Views that a label is guessed from; each of them is learnt from.
        temperature: Of sharpening the mean of the guesses.
        alpha: Of Beta(alpha, alpha), from which each sample's part in its blend is drawn; at least half is its own.
    """

    unlabelled: RampSettings = RampSettings(weight=10.0)
    guesses: int = Field(default=2, ge=1)
    temperature: float = Field(default=0.5, gt=0)
    alpha: float = Field(default=0.75, gt=0)


class MixMatch(TeacherStudent):
    """MixMatch (Berthelot et al., NeurIPS 2019); the running average predicts after training.

    In segmentation label maps are blended voxel by voxel as images are, and the views of a guess show the same voxels
    in intensities of their own, those of `fine-tuning`; a voxel counts where it counts in both images of a blend. Soft
    Dice, which takes part in the supervised error, rewards the larger part of a blended label alone; cross-entropy
    asks for both. Deliberate deviations: no sample is blended with itself; the rise of the weight is that of all
    methods here; and with a weight of 0 labelled images are blended with each other only, so that unlabelled ones
    have no influence.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation", "classification")
    settings: MixMatchSettings

    def views(self, batch: PairedBatch, draw: Draw) -> Views:  # type: ignore[override]
        """Return the labelled view, all samples blended, labelled first, and the views that labels are guessed from."""
        assert batch.unlabelled is not None
        labelled = self.labelled_view(batch.labelled, draw.child("labelled"))
        plain = self.unlabelled_views(batch.unlabelled, unlabelled_draw(draw, batch.unlabelled))
        pool = joined([labelled, *plain])
        counts = self.task.where(labelled)
        where = torch.cat([labelled.inside if counts is None else counts, *(view.inside for view in plain)])
        parts = [batch.labelled, *[batch.unlabelled] * len(plain)]
        # Nothing crosses over where nothing is to be learnt from unlabelled images.
        apart = self.settings.unlabelled.weight == 0
        groups = [(apart and number > 0, modality) for number, part in enumerate(parts) for modality in part.modality]
        drawn = draw_mixup(pool_draw(draw, parts, "mixup"), self.settings.alpha, groups, own_majority=True)
        return [labelled, mixed_up(pool, drawn, where=where), *plain]

    def unlabelled_views(self, batch: Batch, draw: Draw) -> list[SemiView]:
        """Return the views that labels are guessed from."""
        streams = [draw.child(f"guess {number}") for number in range(self.settings.guesses)]
        if self.task.is_dense:
            policy = self.of_purpose("fine-tuning")
            # A stream goes on where it was left: each view needs that of the place from its start.
            views = [policy.view(batch, stream, place=draw.child("place")) for stream in streams]
        else:
            views = [self.of_purpose("weak").view(batch, stream) for stream in streams]
        return [SemiView(**vars(view)) for view in views]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the supervised terms on blended labels, and `consistency` with blended guesses times its weight."""
        labelled, mixed, *plain = views
        assert isinstance(labelled, SemiView) and isinstance(mixed, SemiView)
        own = len(labelled.image)
        guess = self.guessed([view.image for view in plain])
        known = soft_labels(labelled, self.task.classes).to(guess.dtype)
        target = blend(torch.cat([known, *[guess] * len(plain)]), mixed)
        where = self.task.where(mixed)
        of_labelled, of_rest = (None, None) if where is None else (where[:own], where[own:])
        count = None if of_rest is None else mean_across_ranks(of_rest.sum().float())
        terms = self.task.supervised_on(self.networks[0](mixed.image[:own]), target[:own], of_labelled)
        probabilities = self.networks[0](mixed.image[own:]).float().softmax(dim=1)
        consistency = squared_difference(probabilities, target[own:], of_rest, count=count)
        return terms | {"consistency": self.settings.unlabelled.at(step) * consistency}

    @torch.no_grad()
    def guessed(self, images: list[Tensor]) -> Tensor:
        """Return the sharpened mean of the student's probabilities over views of the same samples."""
        total = torch.stack([self.networks[0](image).float().softmax(dim=1) for image in images])
        return sharpened(total.mean(dim=0), self.settings.temperature)
