"""The contract between a learning method and the loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from medssl.config import Settings
from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.networks.encoder import Encoder


@dataclass(frozen=True)
class Needs:
    """What a method asks of the sampler and of the policy.

    Args:
        views: Views of each crop.
        policy: Purpose of the augmentation: `reconstruction`, `contrastive`, `weak`, `strong` or `fine-tuning`.
        crops_per_volume: Crops that must come from one volume in a batch.
        labels: Whether the batch must carry labels.
        least_batch: Samples that one step over all devices must hold for the loss to mean something.
        least_volumes: Volumes that the store must hold for training.
        whole_patch: Whether the patch must fit into every volume: padding would answer, or spoil, a question about
            position.
    """

    views: int = 1
    policy: str = "reconstruction"
    crops_per_volume: int = 1
    labels: bool = False
    least_batch: int = 1
    least_volumes: int = 1
    whole_patch: bool = False


@dataclass(frozen=True)
class Step:
    """Where a run is.

    Args:
        index: The step that is being computed, from 0.
        total: Steps of the whole run.
    """

    index: int
    total: int

    @property
    def fraction(self) -> float:
        """Part of the run that lies behind, in [0, 1)."""
        return self.index / max(self.total, 1)


class Method(nn.Module):
    """What a learning method sees, minimises and exports. One file each.

    A method does not know about files, devices, precision, logging or the optimiser's plumbing. It is built as
    `method(network, policy, settings)`: the U-Net, the augmentation that `needs.policy` asked for, and its settings.

    Attributes:
        needs: What the sampler and the policy must deliver.
        network: The whole U-Net with nnU-Net's weight names; its state dict is what a checkpoint exports.
        encoder: Access to the features of `network`'s encoder.
        trains_decoder: Whether the decoder is worth transferring too.
        look_ahead: Virtual steps on a step's batch before it: weights and the optimiser's state are put back after
            them, and what `after_step` has learnt of them stays.
    """

    needs: ClassVar[Needs]
    network: nn.Module
    encoder: Encoder
    trains_decoder: ClassVar[bool] = False
    look_ahead: int = 0

    @classmethod
    def output_channels(cls, in_channels: int, settings: Settings) -> int:
        """Return how many channels the network must put out; a reconstruction has those of the image."""
        return in_channels

    @classmethod
    def needs_of(cls, settings: Settings) -> Needs:
        """Return what must be delivered for these settings; `needs`, unless the settings choose."""
        return cls.needs

    @classmethod
    def purposes(cls, settings: Settings) -> tuple[str, ...]:
        """Return the policies that views are made by; the crops that are read are large enough for each of them."""
        return (cls.needs_of(settings).policy,)

    @classmethod
    def decoder_is_trained(cls, settings: Settings) -> bool:
        """Tell whether the decoder learns with these settings; else its weights are frozen and not transferred."""
        return cls.trains_decoder

    @classmethod
    def output_is_used(cls, settings: Settings) -> bool:
        """Tell whether the network's output layer takes part, so that `output_channels` binds."""
        return cls.decoder_is_trained(settings)

    @classmethod
    def misfit(cls, settings: Settings, patch_size: Sequence[int], shapes: Sequence[Sequence[int]]) -> str | None:
        """Return why the method cannot learn from volumes of these sizes, beyond what `needs` says, or None.

        Args:
            settings: The method's own.
            patch_size: What the network sees.
            shapes: Size (Z, Y, X) of each training volume.

        Returns:
            A sentence that names the value and what would mend it.
        """
        return None

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Augment, mask and mix a batch; `draw` gives parameters per sample. Runs without gradients."""
        raise NotImplementedError

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the named terms of the loss, each a scalar; the loop weighs, logs and sums them."""
        raise NotImplementedError

    def after_step(self, step: Step) -> None:
        """Update teachers, queues and prototypes after the optimiser's step."""

    def student_buffers(self) -> list[Tensor]:
        """Return the buffers that are put back with the weights after virtual steps; a teacher's are not among them."""
        return []

    def health(self, views: Views) -> dict[str, float]:
        """Return figures that tell a healthy run from a collapsed one. Called now and then, without gradients.

        One whose name ends in `std` is watched: near zero for several looks in a row, it stops the run.
        """
        return {}

    def exported_heads(self) -> dict[str, Tensor]:
        """Return weights beside the network's that an application needs, by name; small, kept in each checkpoint."""
        return {}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return images worth looking at, by name, each (B, C, Z, Y, X) or (B, C, Y, X). Called now and then."""
        return {}
