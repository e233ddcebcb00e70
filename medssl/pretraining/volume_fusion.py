"""Volume Fusion: mix two crops by a map of boxes and find the share of each voxel.

Wang et al., "MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale Unannotated
Dataset", 2023. Boxes are laid over a crop, later ones over earlier ones, each with one of K shares 0, 1 / (K - 1), ...,
1. The input shows that share of the crop (foreground) and the rest of another one (background); what no box covers is
background alone. The whole U-Net says for every voxel which share it was: a segmentation, with Dice and cross-entropy,
whose labels cost nothing. Encoder and decoder transfer; the decoder learns what it is for.

A sample's background is another sample of its batch, of another volume where there is one, see
`medssl.pretraining.partners`: it depends on its batch by definition. Anatomy that is turned alike in all volumes makes
the mixture plausible.

Deviations: every sample of a batch is the foreground once, and its background is drawn from the same batch, where the
original reads as many samples again. Voxels outside one of the two volumes, which padding and rotation bring in, do
not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from medssl.augmentation.mixing import draw_volume_fusion, volume_fusion
from medssl.augmentation.policy import Policy
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.segmentation import dice_sums, masked_cross_entropy, soft_dice
from medssl.networks.encoder import Encoder
from medssl.pretraining.health import effective_rank, feature_std, rows
from medssl.pretraining.partners import of_partners, partner_rows
from medssl.training.distributed import gather, mean_across_ranks
from medssl.training.method import Method, Needs, Step


class BoxSettings(Settings):
    """The boxes of the map.

    Args:
        count: Fewest and most boxes of a sample.
        smallest: Shortest edge in voxels; None takes 8, or on small patches a tenth of the patch.
        largest: Longest edge as part of the patch's.
    """

    count: tuple[int, int] = (10, 39)
    smallest: int | None = Field(default=None, ge=1)
    largest: float = Field(default=0.625, gt=0, le=1)

    @field_validator("count")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"count is an ordered range of positive numbers, got {value}")
        return value


class VolumeFusionSettings(Settings):
    """Settings of Volume Fusion.

    Args:
        classes: Number of shares, from background alone to foreground alone.
        boxes: The boxes of the map.
    """

    classes: int = Field(default=5, ge=2, le=256)
    boxes: BoxSettings = BoxSettings()

    def resolved(self, patch_size: Sequence[int]) -> Self:
        """Return the settings with the shortest edge that the patch size asks for where none is given."""
        if self.boxes.smallest is not None:
            return self
        smallest = max(1, min(8, round(sum(patch_size) / len(patch_size) / 10)))
        return self.model_copy(update={"boxes": self.boxes.model_copy(update={"smallest": smallest})})


class VolumeFusion(Method):
    """Mixes two crops and says how much of which each voxel shows.

    Args:
        network: U-Net with as many output channels as classes, without deep supervision.
        policy: Augmentation for fine-tuning: foreground and background are augmented apart.
        settings: What is mixed.
    """

    needs: ClassVar[Needs] = Needs(views=1, policy="fine-tuning", least_batch=2, least_volumes=2)
    trains_decoder: ClassVar[bool] = True

    def __init__(self, network: nn.Module, policy: Policy, settings: VolumeFusionSettings) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.policy = policy
        self.settings = settings

    @classmethod
    def output_channels(cls, in_channels: int, settings: Settings) -> int:
        """Return one output for each class."""
        assert isinstance(settings, VolumeFusionSettings)
        return settings.classes

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Augment, and mix each sample with another; the view's label is the class of each voxel.

        Raises:
            ValueError: If there is no other sample.
        """
        view = self.policy.view(batch, draw.child("view"))
        size = view.image.shape[2:]
        partner = partner_rows(batch, draw.child("partner"), self.policy)
        boxes = self.settings.resolved(size).boxes
        assert boxes.smallest is not None
        drawn = draw_volume_fusion(
            draw.child("fusion"), size, self.settings.classes, boxes.count, boxes.smallest, boxes.largest
        )
        view.image, view.label = volume_fusion(view.image, of_partners(view.image, partner), drawn)
        view.inside = view.inside & of_partners(view.inside, partner)
        view.target = None
        view.parameters["volume_fusion"] = drawn
        return [view]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return one minus the Dice over all classes and samples of all ranks, and the cross-entropy."""
        (view,) = views
        logits, label = self.network(view.image), self._label(view)
        return {
            "dice": soft_dice(gather(dice_sums(logits, label, view.inside))),
            "cross_entropy": masked_cross_entropy(
                logits, label, view.inside, count=mean_across_ranks(view.inside.sum().float())
            ),
        }

    def health(self, views: Views) -> dict[str, float]:
        """Return how many voxels are named right, and whether features differ.

        `accuracy` is the part of the voxels whose class is named; `chance` is the part that whoever always names the
        most frequent class gets right: a healthy run rises above it. Where both crops show the same, as in air, nobody
        can tell the class, and 1 is out of reach.
        """
        (view,) = views
        label, where = self._label(view), view.inside[:, 0]
        count = where.sum().clamp(min=1)
        right = (self.network(view.image).argmax(dim=1) == label) & where
        frequencies = torch.stack([((label == number) & where).sum() for number in range(self.settings.classes)])
        features = rows(self.encoder.stages(view.image)[-1])
        figures = {
            "accuracy": right.sum() / count,
            "chance": frequencies.amax() / count,
            "feature_std": feature_std(features),
            "effective_rank": effective_rank(features),
        }
        return {name: float(value) for name, value in figures.items()}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return the mixed crop, the share of the foreground and the share that the network names.

        Shares are drawn from two standard deviations below the crop's mean to two above, since all pictures of a grid
        have one window.
        """
        (view,) = views
        image = view.image.float()
        axes = tuple(range(1, image.ndim))
        mean, std = image.mean(dim=axes, keepdim=True), image.std(dim=axes, keepdim=True)

        def share(classes: Tensor) -> Tensor:
            return mean + std * (4 * classes[:, None].float() / (self.settings.classes - 1) - 2)

        return {
            "input": view.image,
            "share": share(self._label(view)),
            "output": share(self.network(view.image).argmax(dim=1)),
        }

    def _label(self, view: View) -> Tensor:
        if view.label is None:
            raise ValueError("The view has no map of classes: make it with VolumeFusion.views")
        return view.label
