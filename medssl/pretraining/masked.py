"""What methods share that hide blocks of a crop and restore them: settings, mask, error, health and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.masking import block_mask
from medssl.augmentation.policy import Policy
from medssl.config import Settings
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.losses.reconstruction import masked_mean, masked_reconstruction
from medssl.networks.encoder import Encoder
from medssl.pretraining.health import effective_rank, feature_std, local_mean, rows
from medssl.training.distributed import mean_across_ranks
from medssl.training.method import Method, Needs, Step


class BlockSettings(Settings):
    """Which blocks are hidden.

    Args:
        block: Edge of a hidden block in voxels, one number or one per axis; None takes about a tenth of the patch
            (16 on 160, as nnssl).
        ratio: Part of the blocks that is hidden, the same number of blocks in every sample.
    """

    block: int | tuple[int, ...] | None = None
    ratio: float = Field(default=0.75, gt=0, lt=1)


class MaskedSettings(Settings):
    """Settings of every method that restores hidden blocks.

    Args:
        mask: What is hidden.
        error: How the error of a voxel counts.
    """

    mask: BlockSettings = BlockSettings()
    error: Literal["l2", "l1", "huber"] = "l2"

    def resolved(self, patch_size: Sequence[int]) -> Self:
        """Return the settings with the block that the patch size asks for where none is given."""
        if self.mask.block is not None:
            return self
        tenth = sum(patch_size) / len(patch_size) / 10
        block = min((4, 8, 16, 32), key=lambda edge: max(edge / tenth, tenth / edge))
        return self.model_copy(update={"mask": self.mask.model_copy(update={"block": block})})


class MaskedRestoration(Method):
    """Hides blocks of the crop; a subclass says what restores them.

    Args:
        network: U-Net with as many output as input channels, without deep supervision.
        policy: Augmentation, with a target.
        settings: What is hidden, and how the error counts.
    """

    needs: ClassVar[Needs] = Needs(views=1, policy="reconstruction")

    def __init__(self, network: nn.Module, policy: Policy, settings: MaskedSettings) -> None:
        super().__init__()
        self.network = network
        self.encoder = Encoder(network)
        self.policy = policy
        self.settings = settings

    def views(self, batch: Batch, draw: Draw) -> Views:
        """Augment, then choose what to hide; the input is blanked later, where a token has its gradient."""
        view = self.policy.view(batch, draw.child("view"))
        size = view.image.shape[2:]
        mask = self.settings.resolved(size).mask
        assert mask.block is not None
        view.mask = block_mask(draw.child("mask"), size, mask.block, mask.ratio, device=view.image.device)
        return [view]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the error on the voxels that count."""
        (view,) = views
        where = self.counted(view)
        return {
            "reconstruction": masked_reconstruction(
                self.restore(view), self._target(view), where, kind=self.settings.error,
                count=mean_across_ranks(where.sum().float()),
            )
        }  # fmt: skip

    def counted(self, view: View) -> Tensor:
        """Return where the error counts: on hidden voxels inside the volume. Shape: (B, 1, *spatial), bool."""
        return self._hidden(view) & view.inside

    def restore(self, view: View) -> Tensor:
        """Return the image that is made of the visible voxels of a view. Shape: (B, C, *spatial)."""
        raise NotImplementedError

    def health(self, views: Views) -> dict[str, float]:
        """Return how much better than trivial fillings the restored voxels are, and whether features differ.

        `error_to_mean` and `error_to_neighbours` are squared errors relative to filling in the mean of the sample's
        visible voxels, and their mean within two blocks: 1 is no better, and a healthy run falls below 1 on both.
        """
        (view,) = views
        hidden, target = self._hidden(view), self._target(view)
        where, visible = hidden & view.inside, view.inside & ~hidden
        error = masked_reconstruction(self.restore(view), target, where)
        block = self.settings.resolved(target.shape[2:]).mask.block
        reach = 2 * (block if isinstance(block, int) else max(block or (8,)))
        mean = masked_mean(target, visible).expand_as(target)
        to_mean = masked_reconstruction(mean, target, where)
        to_neighbours = masked_reconstruction(local_mean(target, visible, reach), target, where)
        features = self.encoder.stages(view.image)[-1]
        figures = {
            "error_to_mean": error / to_mean.clamp(min=1e-12),
            "error_to_neighbours": error / to_neighbours.clamp(min=1e-12),
            "feature_std": feature_std(rows(features)),
            "effective_rank": effective_rank(rows(features)),
        }
        return {name: float(value) for name, value in figures.items()}

    def pictures(self, views: Views) -> dict[str, Tensor]:
        """Return target, visible part, reconstruction, and the reconstruction of the hidden part in its place."""
        (view,) = views
        restored, target = self.restore(view).float(), self._target(view)
        hidden = self._hidden(view)
        return {
            "target": target,
            "input": view.image.masked_fill(hidden, float("nan")),
            "restored": torch.where(hidden, restored, target),
            "output": restored,
        }

    def _hidden(self, view: View) -> Tensor:
        if view.mask is None:
            raise ValueError(f"The view has no mask: make it with {type(self).__name__}.views")
        return view.mask

    def _target(self, view: View) -> Tensor:
        return view.image if view.target is None else view.target
