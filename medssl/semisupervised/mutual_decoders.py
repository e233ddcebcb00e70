"""MC-Net+: decoders that differ in how they go up to finer grids must agree on what they predict."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import Views
from medssl.losses.consistency import sharpened, squared_difference
from medssl.semisupervised.batch import SemiView
from medssl.semisupervised.method import SemiSupervised, SemiSupervisedSettings
from medssl.semisupervised.task import Task
from medssl.training.distributed import mean_across_ranks
from medssl.training.method import Step


class MutualDecodersSettings(SemiSupervisedSettings):
    """Settings of MC-Net+.

    Args:
        temperature: Of sharpening the predictions that the others have to agree with.
        supervised: Factor of the supervised error of each of the three decoders.
    """

    temperature: float = Field(default=0.1, gt=0)
    supervised: float = Field(default=0.5, gt=0)


class MutualDecoders(SemiSupervised):
    """Mutual consistency of three decoders on one encoder (Wu et al., MC-Net+, Medical Image Analysis 2022).

    The first decoder is the network's own, with transposed convolutions, and the only one that predicts after
    training; the others interpolate linearly and take the nearest value. Each decoder's prediction comes near to the
    sharpened ones of the other two, on labelled and unlabelled images. Deliberate deviations: a sharpened prediction
    is a target and gets no gradient; the supervised error has cross-entropy beside Dice; see `RaisingDecoder` for its
    convolutions. With a weight of 0 there is one decoder, and the run is a supervised one.
    """

    network_count: ClassVar[int] = 3
    tasks: ClassVar[tuple[str, ...]] = ("segmentation",)
    settings: MutualDecodersSettings

    def __init__(
        self, networks: Sequence[nn.Module], task: Task, policy: Policy, settings: MutualDecodersSettings
    ) -> None:
        super().__init__(networks, task, policy, settings)
        # Of the other networks only the decoders are used: they start differently.
        first, *others = networks
        self.networks = nn.ModuleList([first])
        modes = () if settings.unlabelled.weight == 0 else ("linear", "nearest")
        self.decoders = nn.ModuleList(
            RaisingDecoder(other.decoder, mode)  # type: ignore[arg-type]
            for other, mode in zip(others, modes, strict=False)
        )

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        """Return the supervised terms, the sum over decoders times their factor, and `consistency` times its weight."""
        labelled, view = views
        assert isinstance(labelled, SemiView) and isinstance(view, SemiView)
        if not self.decoders:
            return self.supervised(labelled)
        known = self.decoded(labelled.image)
        found = [self.task.supervised(logits, labelled) for logits in known]
        terms = {
            name: self.settings.supervised * torch.stack([each[name] for each in found]).sum() for name in found[0]
        }
        counts = [self.task.where(each) for each in (labelled, view)]
        where = torch.cat([each for each in counts if each is not None])
        logits = [torch.cat(pair) for pair in zip(known, self.decoded(view.image), strict=True)]
        return terms | {"consistency": self.settings.unlabelled.at(step) * self.disagreement(logits, where)}

    def decoded(self, image: Tensor) -> list[Tensor]:
        """Return the logits of each decoder."""
        unet = self.networks[0]
        stages = unet.encoder(image)  # type: ignore[operator]
        return [unet.decoder(stages), *(decoder(stages) for decoder in self.decoders)]  # type: ignore[operator]

    def disagreement(self, logits: list[Tensor], where: Tensor) -> Tensor:
        """Return the squared differences from the sharpened predictions of the others, summed over ordered pairs.

        Args:
            logits: Of each decoder. Shape: (B, K, *spatial).
            where: Voxels that count. Shape: (B, 1, *spatial), bool.
        """
        probabilities = [each.float().softmax(dim=1) for each in logits]
        targets = [sharpened(each.detach(), self.settings.temperature) for each in probabilities]
        count = mean_across_ranks(where.sum().float())
        pairs = itertools.permutations(range(len(logits)), 2)
        return torch.stack(
            [squared_difference(probabilities[own], targets[other], where, count=count) for own, other in pairs]
        ).sum()


class RaisingDecoder(nn.Module):
    """A U-Net's decoder that interpolates where the U-Net's own has transposed convolutions.

    A convolution of one voxel brings the channels to their number before interpolation, which is the same as after it;
    it starts as the mean of the transposed convolution's kernel, in the kernel's size, so that pretrained weights keep
    their meaning. The published code has 3 x 3 x 3 voxels after it, at many times the cost; the block that follows
    looks at neighbours too.

    Args:
        decoder: Whose blocks it takes over.
        mode: `linear` along each axis, or `nearest`.
    """

    def __init__(self, decoder: nn.Module, mode: str) -> None:
        super().__init__()
        blocks, outputs = decoder.stages, decoder.seg_layers
        assert isinstance(blocks, nn.ModuleList) and isinstance(outputs, nn.ModuleList)
        self.narrow = nn.ModuleList(_narrowed(layer) for layer in decoder.transpconvs)  # type: ignore[union-attr]
        self.stages, self.output = blocks, outputs[-1]
        self.mode = mode

    def forward(self, stages: list[Tensor]) -> Tensor:
        """Return logits.

        Args:
            stages: Features of the encoder, fine to coarse.

        Returns:
            Shape: (B, K, *spatial).
        """
        features = stages[-1]
        for narrow, block, finer in zip(self.narrow, self.stages, stages[-2::-1], strict=True):
            raised = self._raised(narrow(features), finer.shape[2:])
            features = block(torch.cat([raised, finer], dim=1))
        logits: Tensor = self.output(features)
        return logits

    def _raised(self, features: Tensor, size: Sequence[int]) -> Tensor:
        if self.mode == "nearest":
            return F.interpolate(features, size=tuple(size), mode="nearest")
        mode = {4: "bilinear", 5: "trilinear"}[features.ndim]
        return F.interpolate(features, size=tuple(size), mode=mode, align_corners=False)


@torch.no_grad()
def _narrowed(transposed: nn.Module) -> nn.Module:
    """Return a convolution of one voxel in place of a transposed one."""
    weight = transposed.weight
    assert isinstance(weight, Tensor)
    kind = {4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim]
    layer = kind(weight.shape[0], weight.shape[1], 1, bias=transposed.bias is not None)
    kernels = weight.transpose(0, 1).flatten(2)
    mean = kernels.mean(dim=2)
    # Independent random kernels cancel each other in the mean.
    size = kernels.square().mean().sqrt() / mean.square().mean().sqrt().clamp(min=1e-12)
    layer.weight.copy_((mean * size).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.copy_(transposed.bias)  # type: ignore[arg-type]
    return layer
