"""UniMatch: what is sure of a weak view is the label of two strong ones, and of its features with dropped channels."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from medssl.augmentation.mixing import draw_cutmix
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.losses.consistency import confident_cross_entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.dropping import draw_kept, dropped
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.semisupervised.mixing import cut_mixed, exchange
from medssl.training.method import Step


class UniMatchSettings(SemiSupervisedSettings):
    """Settings of UniMatch.

    Args:
        threshold: Least probability of the likeliest class on the weak view for a voxel to be learnt from.
        strong: Part of the loss that the two strong views share evenly.
        features: Part of the loss of the dropped features.
        dropout: How often a channel of each stage of the encoder is dropped for it.
        alpha: Of Beta(alpha, alpha), from which the volume of the exchanged boxes is drawn.
        cutmix: How often a sample has a box exchanged.
    """

    threshold: float = Field(default=0.95, ge=0, le=1)
    strong: float = Field(default=0.5, ge=0)
    features: float = Field(default=0.5, ge=0)
    dropout: float = Field(default=0.5, ge=0, lt=1)
    alpha: float = Field(default=1.0, gt=0)
    cutmix: float = Field(default=0.5, ge=0, le=1)


class UniMatch(SemiSupervised):
    """UniMatch (Yang et al., CVPR 2023): two strong streams with CutMix of their own, and one of perturbed features.

    The labels of a strong view are cut and pasted as its image is, their certainty too. Deliberate deviations: boxes
    are cuboids of the image's shape, and exchanged with another sample of the batch.
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    settings: UniMatchSettings

    def unlabelled_views(self, batch: Batch, draw: Draw) -> list[SemiView]:
        """Return the weak view and two strong ones of the same voxels, each with boxes of its own exchanged."""
        settings = self.settings
        weak, *strong = self.weak_and_strong(batch, draw, count=2)
        size = weak.image.shape[2:]
        mixed = []
        for number, view in enumerate(strong):
            own = draw.child(f"cutmix {number}")
            drawn = draw_cutmix(own, size, settings.alpha, batch.modality, probability=settings.cutmix)
            mixed.append(cut_mixed(view, drawn))
        kept = draw_kept(draw.child("channels"), sum(self.encoder.widths), settings.dropout)
        return [weak.with_drawn(kept=kept), *mixed]

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return `strong_pseudo_label` and `feature_pseudo_label`, each times its part."""
        weak, *strong = views
        settings, unet = self.settings, self.network
        features = unet.encoder(weak.image)  # type: ignore[operator]
        with torch.no_grad():
            guess = unet.decoder(features).float().softmax(dim=1)  # type: ignore[operator]
        where, count = self.counted(weak)
        logits = unet.decoder(dropped(features, weak.drawn["kept"]))  # type: ignore[operator]
        of_features = confident_cross_entropy(logits, guess, settings.threshold, where, count=count)
        of_views = []
        for view in strong:
            where, count = self.counted(view)
            target = exchange(guess, view)
            logits = self.networks[0](view.image)
            of_views.append(confident_cross_entropy(logits, target, settings.threshold, where, count=count))
        return {
            "strong_pseudo_label": settings.strong * torch.stack(of_views).mean(),
            "feature_pseudo_label": settings.features * of_features,
        }
