"""ICT: what is predicted of a blend of two images must be the blend of what is predicted of each."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from medssl.augmentation.mixing import draw_mixup
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.losses.consistency import squared_difference
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.mean_teacher import TeacherStudent, TeacherStudentSettings
from medssl.semisupervised.mixing import blend, mixed_up
from medssl.training.method import Step


class InterpolationSettings(TeacherStudentSettings):
    """Settings of ICT.

    Args:
        alpha: Of Beta(alpha, alpha), from which each sample's part in its blend is drawn.
    """

    alpha: float = Field(default=0.2, gt=0)


class Interpolation(TeacherStudent):
    """Interpolation consistency training (Verma et al., IJCAI 2019) with the squared difference of probabilities.

    Each unlabelled sample is blended with another of the batch, with a part of its own; the teacher sees both unmixed.
    Deliberate deviations: the field's code for segmentation makes one blend a batch of exactly two images; and the
    weight is by default that of mean teacher (that code uses 0.1, published code for classification 10 to 100).
    """

    settings: InterpolationSettings

    def unlabelled_views(self, batch: Batch, draw: Draw) -> list[SemiView]:
        """Return the blended view and the unmixed one."""
        (plain,) = super().unlabelled_views(batch, draw)
        drawn = draw_mixup(draw.child("mixup"), self.settings.alpha, batch.modality)
        return [mixed_up(plain, drawn), plain]

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `consistency`."""
        mixed, plain = views
        where, count = self.counted(mixed)
        probabilities = self.networks[0](mixed.image).float().softmax(dim=1)
        target = blend(self.taught(plain.image), mixed)
        return {"consistency": squared_difference(probabilities, target, where, count=count)}
