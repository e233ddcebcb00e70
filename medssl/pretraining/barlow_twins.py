"""Barlow Twins: each feature agrees between two views and differs from all other features (Zbontar et al., ICML 2021).

With `mixing` it is Mixed Barlow Twins (Bandara et al., "Guarding Barlow Twins against overfitting with mixed samples",
WACV 2025): a third image, between view a of a sample and view b of another, must have the features in between. Its
U-Net recipe for small sets is BT-UNet (Punn and Agarwal, 2022; pipelines/bt_unet.yaml).

Deviations: the projector is 512 wide and not 8192. Where the authors draw one share for the batch, each sample draws
its own from its own stream; the regulariser is linear in what is mixed and stays what it was. On several ranks the
partner of a sample is of its rank, so that no image travels: a run with `mixing` does not equal one on another number
of ranks, though each is as good as the other.
"""

from __future__ import annotations

import dataclasses

import torch
from pydantic import Field
from torch import Tensor

from medssl.augmentation.mixing import draw_mixup
from medssl.augmentation.transform import to_device
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.decorrelation import barlow_twins, mixed_barlow
from medssl.pretraining.decorrelation import Decorrelation, DecorrelationSettings
from medssl.training.distributed import gather, rank, world_size
from medssl.training.method import Step


class BarlowTwinsSettings(DecorrelationSettings):
    """Settings of Barlow Twins and of Mixed Barlow Twins.

    Args:
        stages: Which stages of the encoder are pooled, `all` or the `last` one.
        overlap: Smallest and largest part of a crop that both views show; None draws them apart, within the policy's
            shift.
        projector: The head whose features are correlated; it is thrown away.
        embedding_norm: How the length of embeddings is controlled.
        off_diagonal_weight: Weight of correlations between different features (the paper's lambda).
        mixing: Weight of the regulariser with mixed images, times `off_diagonal_weight`; 0 leaves them out, the
            authors' default is 5. It needs two samples per device and takes a third forward.
    """

    off_diagonal_weight: float = Field(default=0.005, gt=0)
    mixing: float = Field(default=0.0, ge=0)


class BarlowTwins(Decorrelation):
    """Brings the cross-correlation of two views' features near the identity.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for contrastive views.
        settings: See `BarlowTwinsSettings`.
    """

    settings: BarlowTwinsSettings

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Make two views of each crop and, with `mixing`, the mixed images."""
        views = super().views(batch, draw)
        return [*views, self._mix(batch, views, draw.child("mixing"))] if self.settings.mixing else views

    def objective(self, projections: list[Tensor], views: Views, step: Step) -> dict[str, Tensor]:
        """Return `correlation`, its distance from the identity, and with `mixing` what mixed images add to it."""
        first, second, *mixed = projections
        weight = self.settings.off_diagonal_weight
        terms = {"correlation": barlow_twins(first, second, off_diagonal_weight=weight)}
        for rows in mixed:
            drawn = views[2].parameters["mixing"]
            # Ranks are interleaved: sample i of rank r is row i * world + r of what was gathered.
            partner = second[gather(drawn["partner"] * world_size() + rank())]
            regulariser = mixed_barlow(rows, first, second, partner, share=gather(drawn["weight"]))
            terms["mixing"] = self.settings.mixing * weight * regulariser
        return terms

    def _mix(self, batch: Batch, views: Views, draw: Draw) -> View:
        """Return share x_a + (1 - share) x_b[partner], the share drawn from Beta(1, 1).

        The partner is another sample of the modality; a sample that has none is mixed with its own other view.
        """
        first, second = views
        drawn = {
            name: to_device(values, first.image.device)
            for name, values in draw_mixup(draw, 1.0, groups=batch.modality).items()
        }
        share = drawn["weight"].to(first.image.dtype).view(-1, *(1,) * (first.image.ndim - 1))
        return dataclasses.replace(
            first,
            image=torch.lerp(second.image[drawn["partner"]], first.image, share),
            inside=first.inside & second.inside[drawn["partner"]],
            parameters={"mixing": drawn},
        )
