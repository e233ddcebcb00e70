"""What methods share that spoil the input and restore it with the whole U-Net: the error, health and pictures."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.reconstruction import Kind, masked_mean, masked_reconstruction
from medssl.networks.encoder import Encoder
from medssl.pretraining.health import effective_rank, feature_std, rows
from medssl.training.distributed import mean_across_ranks
from medssl.training.method import Method, Step


class RestorationSettings(Settings):
    """Settings of every method that restores a spoilt input.

    Args:
        error: How the error of a voxel counts.
    """

    error: Kind = "l2"


class Restoration(Method):
    """Spoils the input and restores the image as it was; a subclass says what is done to the input.

    Args:
        network: U-Net with as many output as input channels, without deep supervision.
        policy: Augmentation, with a target.
        settings: How the error counts.
    """

    trains_decoder: ClassVar[bool] = True

    def __init__(self, network: nn.Module, policy: Policy, settings: RestorationSettings) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.policy = policy
        self.settings = settings

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Augment, keep the image as the target, and spoil the input."""
        view = self.policy.view(batch, draw.child("view"))
        view.target = self.target(view)
        view.image, view.mask = self.spoil(view, batch, draw)
        return [view]

    def spoil(self, view: View, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return the spoilt input, and where it shows nothing of what was there; the view is not modified.

        Args:
            view: What the policy made.
            batch: What it was made of.
            draw: Stream of the batch.

        Returns:
            Shapes: (B, C, *spatial), and (B, 1, *spatial), bool.
        """
        raise NotImplementedError

    def counted(self, view: View) -> Tensor:
        """Return where the error counts: inside the volume. Shape: (B, 1, *spatial), bool."""
        return view.inside

    def restore(self, view: View) -> Tensor:
        """Return the U-Net's image of the spoilt input. Shape: (B, C, *spatial)."""
        restored: Tensor = self.network(view.image)
        return restored

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the error on the voxels that count."""
        (view,) = views
        where = self.counted(view)
        return {
            "reconstruction": masked_reconstruction(
                self.restore(view), self.target(view), where, kind=self.settings.error,
                count=mean_across_ranks(where.sum().float()),
            )
        }  # fmt: skip

    def health(self, views: Views) -> dict[str, float]:
        """Return how much of the damage is undone, how large it is, and whether features differ.

        All errors are squared and over the voxels that count. `error_to_input` is relative to the spoilt input as it
        is, `error_to_mean` to filling in the mean of the sample's visible voxels: a healthy run falls below 1 on both.
        `damage` is the error of the input relative to that mean: near 0 there is nothing to restore.
        """
        (view,) = views
        where, target = self.counted(view), self.target(view)
        mean = masked_mean(target, view.inside & ~self.hidden(view)).expand_as(target)
        error = masked_reconstruction(self.restore(view), target, where)
        unit = masked_reconstruction(mean, target, where).clamp(min=1e-12)
        damage = masked_reconstruction(view.image, target, where)
        features = rows(self.encoder.stages(view.image)[-1])
        figures = {
            "error_to_input": error / damage.clamp(min=1e-12),
            "error_to_mean": error / unit,
            "damage": damage / unit,
            "feature_std": feature_std(features),
            "effective_rank": effective_rank(features),
        }
        return {name: float(value) for name, value in figures.items()}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return target, spoilt input and restored image."""
        (view,) = views
        return {"target": self.target(view), "input": view.image, "output": self.restore(view).float()}

    def hidden(self, view: View) -> Tensor:
        """Return where the input shows nothing of what was there. Shape: (B, 1, *spatial), bool."""
        if view.mask is None:
            raise ValueError(f"The view has no mask: make it with {type(self).__name__}.views")
        return view.mask

    def target(self, view: View) -> Tensor:
        """Return the image that is to be restored. Shape: (B, C, *spatial)."""
        return view.image if view.target is None else view.target


def draw_of(draw: Draw, chosen: Tensor) -> Draw:
    """Return the draw of some samples of a batch: each has the numbers that it would have had in the whole.

    Args:
        draw: Stream of the batch.
        chosen: Rows. Shape: (R,), int64, on the CPU.
    """
    return Draw(draw.seed, torch.tensor(draw.sample_index)[chosen], draw.path)
