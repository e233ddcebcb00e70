"""TraCoCo: two networks teach each other, and each must say the same of a voxel in two different surroundings."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from medssl.augmentation.correspondence import carry, overlap_mask
from medssl.augmentation.mixing import draw_cutmix
from medssl.augmentation.pairs import overlapping_shifts
from medssl.data.batch import Batch
from medssl.data.draw import Draw
from medssl.losses.confident import confident_regional, confident_sums
from medssl.losses.consistency import divergence, entropy
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.cross_pseudo import CoTraining
from medssl.semisupervised.mean_teacher import noisy
from medssl.semisupervised.method import SemiSupervisedSettings
from medssl.semisupervised.mixing import cut_mixed, exchange
from medssl.training.distributed import gather, mean_across_ranks
from medssl.training.method import Step


class TraCoCoSettings(SemiSupervisedSettings):
    """Settings of TraCoCo.

    Args:
        confident: Part of the loss that the confident cross-entropy has. The paper has 0.3 with few labels and 1 with
            more.
        translation: Part of the loss that agreement of the two crops has.
        spread: Part of the loss that undecided predictions reduce: agreement alone is perfect if all voxels are one
            class.
        sure: Least probability of a class for it to be learnt.
        excluded: Probability below which a class is learnt to be absent.
        overlap: Smallest and largest volume that the two crops share, relative to the patch's.
        noise: Standard deviation of the noise on the first network's input; cut at twice this.
        alpha: Of Beta(alpha, alpha), from which the volume of the boxes on the second network's input is drawn.
    """

    confident: float = Field(default=0.3, ge=0)
    translation: float = Field(default=0.3, ge=0)
    spread: float = Field(default=0.1, ge=0)
    sure: float = Field(default=0.65, ge=0, le=1)
    excluded: float = Field(default=0.1, ge=0, le=1)
    overlap: tuple[float, float] = (0.25, 0.9)
    noise: float = Field(default=0.1, ge=0)
    alpha: float = Field(default=4.0, gt=0)


class TraCoCo(CoTraining):
    """Translation consistent co-training (Liu et al., IEEE TMI 2024).

    Two crops of one read window show the same voxels in different surroundings; of both the same turn, scale and
    mirroring is drawn. The first crop is the one that the networks teach each other on: the first network sees it with
    noise, the second one with boxes of another image. Each network's prediction of the second crop must have, over
    classes, the distribution of its own prediction of the first one where both show the same voxel.

    Deliberate deviations. As in the paper, and unlike its code, the divergence is over classes and not over an axis of
    space, logits are not clamped, and the target is detached. Boxes are cuboids and not whole columns; partners come
    from the unlabelled images alone. Noise is normal, cut where the code's uniform noise ends. Labelled images are in
    no term beside the supervised one, so that a weight of 0 leaves two supervised runs. The weight rises over the part
    of the run that all methods have here (160 of 9,000 steps in the code, with 8 labels).
    """

    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    settings: TraCoCoSettings

    def unlabelled_views(self, batch: Batch, draw: Draw) -> list[SemiView]:
        """Return the first crop with noise, with boxes of another image, as it was, and the second crop.

        `shared` in the second one's `drawn` says which of its voxels the first crop shows too.
        """
        first, second = self._crops(batch, draw)
        mixed = draw_cutmix(draw.child("cutmix"), first.image.shape[2:], self.settings.alpha, batch.modality)
        second = second.with_drawn(shared=overlap_mask(second, first))
        return [noisy(first, draw.child("noise"), self.settings.noise), cut_mixed(first, mixed), first, second]

    def unsupervised(self, views: list[SemiView], step: Step) -> dict[str, Tensor]:
        """Return the terms of both networks, `confident`, `translation` and `spread`, each times its part."""
        settings = self.settings
        noise, mixed, first, second = views
        guesses = [self._guessed(number, first) for number in range(2)]
        confident = [
            self._confident(self.networks[0](noise.image), guesses[1], noise),
            self._confident(self.networks[1](mixed.image), exchange(guesses[0], mixed), mixed),
        ]
        translation, spread = [], []
        shared, count = second.drawn["shared"], mean_across_ranks(second.drawn["shared"].sum().float())
        for network, guess in zip(self.networks, guesses, strict=True):
            logits = network(second.image)
            target, _ = carry(guess, first, second)
            translation.append(divergence(logits, target, shared, count=count))
            spread.append(-entropy(logits, shared, count=count) * math.log(logits.shape[1]))
        return {
            "confident": settings.confident * torch.stack(confident).sum(),
            "translation": settings.translation * torch.stack(translation).sum(),
            "spread": settings.spread * torch.stack(spread).sum(),
        }

    def _crops(self, batch: Batch, draw: Draw) -> tuple[SemiView, SemiView]:
        """Return two crops that differ in their place alone."""
        policy = self.of_purpose("weak")
        patch, read = (
            (1,) * (3 - len(size)) + tuple(size) for size in (policy.patch_size, tuple(batch.image.shape[2:]))
        )
        # What was read around the patch for turning and shrinking is enough to shift it in.
        reach = torch.tensor([max(0, more - edge) // 2 for more, edge in zip(read, patch, strict=True)])
        shifts = overlapping_shifts(draw.child("pair"), patch, reach.expand(len(batch), 3), self.settings.overlap)
        # A stream goes on where it was left: each view needs that of the place from its start.
        first, second = (
            policy.view(batch, draw.child("weak"), shift=shift, place=draw.child("place")) for shift in shifts
        )
        return SemiView(**vars(first)), SemiView(**vars(second))

    @torch.no_grad()
    def _guessed(self, number: int, view: SemiView) -> Tensor:
        logits: Tensor = self.networks[number](view.image)
        return logits.float().softmax(dim=1)

    def _confident(self, logits: Tensor, target: Tensor, view: SemiView) -> Tensor:
        settings = self.settings
        sums = confident_sums(
            logits, target, self.task.where(view), sure=settings.sure, excluded=settings.excluded
        )  # fmt: skip
        terms = confident_regional(gather(sums))
        return terms["positive"] + terms["negative"]
