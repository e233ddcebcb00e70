"""Semixup: predictions must agree on an image, on its augmentation, and on blends between images and their outputs."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import ClassVar

import torch
from pydantic import Field
from scipy.special import betainc, betaincinv
from torch import Tensor

from medssl.augmentation.mixing import draw_mixup, with_partner
from medssl.augmentation.transform import Parameters
from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.losses.consistency import squared_difference
from medssl.semisupervised.batch import PairedBatch, SemiView
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings, unlabelled_draw
from medssl.semisupervised.mixing import blend, joined, mixed_up, pool_draw, soft_labels
from medssl.semisupervised.ramp import RampSettings
from medssl.training.method import Step


class SemixupSettings(SemiSupervisedSettings):
    """Settings of Semixup.

    Args:
        unlabelled: Factor of all three terms; as in the paper it is there from the first step.
        alpha: Of Beta(alpha, alpha), from which each image's part in its blend is drawn; at least half is its own.
        least_part: Least part of an image in a blend whose label is not used.
        in_manifold: Weight of the difference between an image and its augmentation.
        interpolation: Weight of the difference between the output of a blend and the blend of two images' logits.
        out_of_manifold: Weight of the differences of a blend from the image and from its augmentation.
    """

    unlabelled: RampSettings = RampSettings(weight=1.0, fraction=0.0)
    alpha: float = Field(default=0.75, gt=0)
    least_part: float = Field(default=0.55, ge=0.5, lt=1)
    in_manifold: float = Field(default=2.0, ge=0)
    interpolation: float = Field(default=4.0, ge=0)
    out_of_manifold: float = Field(default=2.0, ge=0)


class Semixup(SemiSupervised):
    """Semixup (Nguyen et al., IEEE TMI 2020): consistency on and off the manifold of images, for classification.

    All images, the labelled ones too, are in the pool that the three terms are computed on; gradients flow through both
    sides of each difference, as in the paper. Labelled images are blended with each other and learn both classes.
    Deliberate deviations: the image is the weak view and its augmentation the strong one, with a geometry of its own;
    and parts above `least_part` are drawn from the beta distribution given that they are.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    settings: SemixupSettings

    def views(self, batch: PairedBatch, draw: Draw) -> Views:  # type: ignore[override]
        """Return the labelled view, blended and as it was; and of all images the blend, augmentation and image."""
        assert batch.unlabelled is not None
        own = draw.child("labelled")
        labelled = self.labelled_view(batch.labelled, own)
        drawn = draw_mixup(own.child("mixup"), self.settings.alpha, batch.labelled.modality, own_majority=True)
        streams = ((batch.labelled, own.child("pool")), (batch.unlabelled, unlabelled_draw(draw, batch.unlabelled)))
        plain, augmented = (
            joined([self._view(purpose, part, stream) for part, stream in streams]) for purpose in ("weak", "strong")
        )
        parts = [batch.labelled, batch.unlabelled]
        modality = [name for part in parts for name in part.modality]
        blended = draw_blend(pool_draw(draw, parts, "semixup"), self.settings.alpha, self.settings.least_part, modality)
        return [mixed_up(labelled, drawn), labelled, mixed_up(plain, blended), augmented, plain]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return `cross_entropy` on blended labels, and the three terms on all images times their weights."""
        mixed, labelled, *pool = views
        assert isinstance(labelled, SemiView) and isinstance(mixed, SemiView)
        target = blend(soft_labels(labelled, self.task.classes), mixed)
        terms = self.task.supervised_on(self.networks[0](mixed.image), target, None)
        weight = self.settings.unlabelled.at(step)
        return terms | {name: weight * term for name, term in self.unsupervised(pool, step).items()}  # type: ignore[arg-type]

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `in_manifold`, `interpolation` and `out_of_manifold`, each times its weight."""
        mixed, augmented, plain = views
        settings = self.settings
        logits, of_augmented, of_mixed = (self.networks[0](view.image).float() for view in (plain, augmented, mixed))
        p, p_augmented, p_mixed = (each.softmax(dim=1) for each in (logits, of_augmented, of_mixed))
        between = blend(logits, mixed).softmax(dim=1)
        off = squared_difference(p, p_mixed) + squared_difference(p_mixed, p_augmented)
        return {
            "in_manifold": settings.in_manifold * squared_difference(p_augmented, p),
            "interpolation": settings.interpolation * squared_difference(p_mixed, between),
            "out_of_manifold": settings.out_of_manifold * off,
        }

    def _view(self, purpose: str, batch: Batch, draw: Draw) -> SemiView:
        return SemiView(**vars(self.of_purpose(purpose).view(batch, draw.child(purpose))))


def draw_blend(draw: Draw, alpha: float, least: float, groups: Sequence[Hashable]) -> Parameters:
    """Draw `partner` and `weight` (B,): the larger of l and 1 - l with l from Beta(alpha, alpha), given it is >= least.

    Args:
        draw: Stream of the batch.
        alpha: Of the beta distribution.
        least: Smallest weight, in [0.5, 1).
        groups: What partners must share.
    """
    # Above one half, the larger part is distributed as the upper half of the symmetric distribution itself.
    below = betainc(alpha, alpha, least)
    chosen = below + (1 - below) * draw.child("weight").uniform(0, 1).double().numpy()
    weight = torch.from_numpy(betaincinv(alpha, alpha, chosen)).float().clamp_(least, 1)
    return with_partner(draw, {"weight": weight}, groups, 1.0)
