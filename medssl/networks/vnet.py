"""The V-Net that the semi-supervised literature compares methods on, in the shape of an nnU-Net network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Convolutions of each stage of the encoder, fine to coarse, and of the decoder, coarse to fine.
ENCODER_BLOCKS = (1, 2, 3, 3, 3)
DECODER_BLOCKS = (3, 3, 2, 1)


class VNet(nn.Module):
    """V-Net after Milletari et al. (3DV 2016), as used for the left atrium since UA-MT (Yu et al., MICCAI 2019).

    Five stages with 16 to 256 channels; between them convolutions of stride 2 down and transposed ones up; features of
    the encoder are added to those of the decoder. Where that literature differs from the paper, this network follows
    the literature: kernels of 3 voxels instead of 5, ReLU instead of PReLU, batch normalisation, no residual connection
    within a stage, dropout of channels after the coarsest stage and before the output. Two classes have 9,448,866
    weights; they start by He's rule (ICCV 2015).

    Its parts bear the names that medssl's methods know of nnU-Net's U-Nets (`encoder.output_channels`,
    `decoder.transpconvs`, `decoder.stages`, `decoder.seg_layers`), so that each of them runs on it. Batch normalisation
    sees the samples of one call, and labelled and unlabelled samples have calls of their own.

    Dropout draws from torch's own generator. The loop seeds it and keeps its state in every checkpoint
    (`medssl.training.state`), so that a resumed run is the same to the bit. But each call of the network moves it on: a
    method whose weight is 0 drops other channels than a supervised run from the second step on.

    Args:
        in_channels: Channels of the input.
        classes: Channels of the output.
        filters: Channels of the first stage; each next one has twice as many.
        dropout: How often a channel is dropped in training.
        seed: Draw the weights from this seed and leave torch's own generator as it was.
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 2,
        *,
        filters: int = 16,
        dropout: float = 0.5,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.encoder = VNetEncoder(in_channels, filters, dropout)
            self.decoder = VNetDecoder(self.encoder, classes, dropout)
            for layer in self.modules():
                if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d):
                    nn.init.kaiming_normal_(layer.weight)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor) -> Tensor:
        """Return logits. Shape: (B, classes, Z, Y, X).

        Args:
            image: Edges are multiples of 16. Shape: (B, C, Z, Y, X).
        """
        logits: Tensor = self.decoder(self.encoder(image))
        return logits


class VNetEncoder(nn.Module):
    """Stages of convolutions with a convolution of stride 2 before each but the first.

    Args:
        in_channels: Channels of the input.
        filters: Channels of the first stage.
        dropout: How often a channel of the last stage is dropped in training.
    """

    def __init__(self, in_channels: int, filters: int, dropout: float) -> None:
        super().__init__()
        self.output_channels = [filters * 2**stage for stage in range(len(ENCODER_BLOCKS))]
        self.strides = [[1] * 3, *([2] * 3 for _ in ENCODER_BLOCKS[1:])]
        self.stages = nn.ModuleList()
        for stage, (count, width) in enumerate(zip(ENCODER_BLOCKS, self.output_channels, strict=True)):
            down = [] if stage == 0 else [_normalised(nn.Conv3d(width // 2, width, 2, stride=2), width)]
            self.stages.append(nn.Sequential(*down, _convolutions(in_channels if stage == 0 else width, width, count)))
        self.dropout = nn.Dropout3d(dropout)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return the features of each stage, fine to coarse."""
        features, found = image, []
        for stage in self.stages:
            features = stage(features)
            found.append(features)
        return [*found[:-1], self.dropout(found[-1])]


class VNetDecoder(nn.Module):
    """Transposed convolutions and stages in turn, then the output.

    Args:
        encoder: Whose features it gets.
        classes: Channels of the output.
        dropout: How often a channel of the last features is dropped in training.
    """

    def __init__(self, encoder: VNetEncoder, classes: int, dropout: float) -> None:
        super().__init__()
        widths = encoder.output_channels[::-1]
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(coarse, fine, 2, stride=2) for coarse, fine in itertools.pairwise(widths)
        )
        drops = [0.0] * (len(DECODER_BLOCKS) - 1) + [dropout]
        self.stages = nn.ModuleList(
            _Joining(width, count, drop) for width, count, drop in zip(widths[1:], DECODER_BLOCKS, drops, strict=True)
        )
        self.seg_layers = nn.ModuleList([nn.Conv3d(widths[-1], classes, 1)])

    def forward(self, skips: Sequence[Tensor]) -> Tensor:
        """Return logits.

        Args:
            skips: Features of the encoder, fine to coarse.
        """
        *finer, features = skips
        for raise_up, stage, skip in zip(self.transpconvs, self.stages, finer[::-1], strict=True):
            features = stage.joined(raise_up(features), skip)  # type: ignore[operator]
        logits: Tensor = self.seg_layers[-1](features)
        return logits


class _Joining(nn.Module):
    """Normalises what comes from below, adds the encoder's features, and convolves.

    Called as a stage of an nnU-Net decoder, with both side by side along the channels, it takes them apart first.
    """

    def __init__(self, width: int, count: int, dropout: float) -> None:
        super().__init__()
        self.raised = nn.Sequential(nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.convolutions = _convolutions(width, width, count)
        self.dropout = nn.Dropout3d(dropout)

    def joined(self, raised: Tensor, skip: Tensor) -> Tensor:
        features: Tensor = self.dropout(self.convolutions(self.raised(raised) + skip))
        return features

    def forward(self, both: Tensor) -> Tensor:
        return self.joined(*both.chunk(2, dim=1))


def _convolutions(channels: int, width: int, count: int) -> nn.Sequential:
    return nn.Sequential(
        *(_normalised(nn.Conv3d(width if done else channels, width, 3, padding=1), width) for done in range(count))
    )


def _normalised(convolution: nn.Module, width: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm3d(width), nn.ReLU(inplace=True))
