"""AMAES: a masked autoencoder without skip connections that also undoes artefacts.

Munk et al., "AMAES: Augmented Masked Autoencoder Pretraining on Public Brain MRI Data for 3D-Native Segmentation",
2024. The input is degraded (noise, blur, bias field, artefacts of its modality) and has blocks hidden; the target is
the crop before both. A light decoder restores it from the coarsest features alone, so that what is needed must pass
the bottleneck. The decoder is thrown away and the encoder transfers.

Deviation: voxels outside the volume, which padding and rotation bring in, do not count.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from pydantic import Field
from torch import Tensor, nn

from medssl.augmentation.policy import Policy
from medssl.data.batch import View, Views
from medssl.losses.reconstruction import masked_mean, masked_reconstruction
from medssl.pretraining.mae import MaskedAutoencoder, MaskedAutoencoderSettings, MaskSettings
from medssl.training.method import Needs


class AMAESMaskSettings(MaskSettings):
    """Which blocks are hidden, and what takes their place.

    Args:
        block: Edge of a hidden block in voxels, one number or one per axis; None takes about a tenth of the patch.
        ratio: Part of the blocks that is hidden, the same number of blocks in every sample.
        fill: What hidden voxels are replaced by: a learned `token` per channel, `zero`, or the `mean` of the sample's
            visible voxels.
    """

    block: int | tuple[int, ...] | None = 4
    ratio: float = Field(default=0.6, gt=0, lt=1)


class AMAESSettings(MaskedAutoencoderSettings):
    """Settings of AMAES.

    Args:
        mask: What is hidden.
        error: How the error of a voxel counts.
        voxels: Whether the error counts on `all` voxels inside the volume, which asks for artefacts to be undone where
            the input is visible, or on `hidden` ones only.
    """

    mask: AMAESMaskSettings = AMAESMaskSettings()
    voxels: Literal["all", "hidden"] = "all"


class LightDecoder(nn.Sequential):
    """Goes from the coarsest features to the image: upsample and convolve once per stage, no skips.

    Args:
        encoder: Encoder of dynamic-network-architectures, whose widths, kernels and layers it mirrors.
        out_channels: Channels of the image.
    """

    def __init__(self, encoder: nn.Module, out_channels: int) -> None:
        convolution, widths, strides = encoder.conv_op, encoder.output_channels, encoder.strides
        upsample = get_matching_convtransp(conv_op=convolution)
        layers: list[nn.Module] = []
        for stage in reversed(range(1, len(widths))):  # type: ignore[arg-type]
            stride, width = strides[stage], widths[stage - 1]  # type: ignore[index]
            layers += [
                upsample(widths[stage], width, stride, stride, bias=encoder.conv_bias),  # type: ignore[index]
                ConvDropoutNormReLU(
                    convolution, width, width, encoder.kernel_sizes[stage - 1], 1, encoder.conv_bias,  # type: ignore[index]
                    encoder.norm_op, encoder.norm_op_kwargs, None, None, encoder.nonlin, encoder.nonlin_kwargs,
                ),
            ]  # fmt: skip
        super().__init__(*layers, convolution(widths[0], out_channels, 1))  # type: ignore[index, operator]
        self.apply(InitWeights_He(1e-2))


class AMAES(MaskedAutoencoder):
    """Hides blocks of a degraded crop and restores the clean one through the bottleneck.

    Args:
        network: U-Net; only its encoder learns.
        policy: Augmentation for restoration: its views' target is the image before changes of intensity.
        settings: What is hidden, and how the error counts.
    """

    needs: ClassVar[Needs] = Needs(views=1, policy="restoration")
    trains_decoder: ClassVar[bool] = False
    settings: AMAESSettings

    def __init__(self, network: nn.Module, policy: Policy, settings: AMAESSettings) -> None:
        super().__init__(network, policy, settings)
        self.decoder = LightDecoder(network.encoder, self.encoder.in_channels)  # type: ignore[arg-type]

    def restore(self, view: View) -> Tensor:
        """Return the image that the coarsest features of the blanked view make. Shape: (B, C, *spatial)."""
        restored: Tensor = self.decoder(self.encoder.stages(self.blank(view))[-1])
        return restored

    def counted(self, view: View) -> Tensor:
        """Return where the error counts. Shape: (B, 1, *spatial), bool."""
        return view.inside if self.settings.voxels == "all" else super().counted(view)

    def health(self, views: Views) -> dict[str, float]:
        """Return the figures of the masked autoencoder, and how the visible voxels fare.

        `visible_error` and `input_error` are the squared errors, on visible voxels, of the restored image and of the
        degraded input as it is, both relative to filling in the sample's mean. Artefacts are undone where the first
        falls below the second.
        """
        (view,) = views
        target, visible = self._target(view), view.inside & ~self._hidden(view)
        mean = masked_mean(target, visible).expand_as(target)
        unit = masked_reconstruction(mean, target, visible).clamp(min=1e-12)
        return super().health(views) | {
            "visible_error": float(masked_reconstruction(self.restore(view), target, visible) / unit),
            "input_error": float(masked_reconstruction(view.image, target, visible) / unit),
        }
