"""The encoder of a U-Net as methods use it: features per stage, and one vector per sample."""

from __future__ import annotations

from torch import Tensor, nn


class Encoder(nn.Module):
    """Gives access to the features of a U-Net's encoder without owning its weights.

    The U-Net is kept by reference and not as a sub-module: a method that holds both has each weight once in its
    parameters and its state dict, under the U-Net's names, which are nnU-Net's.

    Args:
        unet: A U-Net of dynamic-network-architectures.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_unet", unet)
        encoder = unet.encoder
        # The first weight is that of the first convolution, (out, in, *kernel), whatever the stem is called.
        self.in_channels = int(next(iter(encoder.parameters())).shape[1])  # type: ignore[union-attr]
        self.widths: tuple[int, ...] = tuple(int(width) for width in encoder.output_channels)  # type: ignore[union-attr]
        self.strides: tuple[tuple[int, ...], ...] = _running_product(encoder.strides)  # type: ignore[union-attr, arg-type]

    @property
    def pooled_width(self) -> int:
        """Length of the vector that `pooled` returns."""
        return self.widths[-1]

    @property
    def unet(self) -> nn.Module:
        """The network whose encoder this is."""
        return self._unet  # type: ignore[return-value]

    def stages(self, image: Tensor) -> list[Tensor]:
        """Return the features of each stage, fine to coarse.

        Args:
            image: Input. Shape: (B, C, Z, Y, X) or (B, C, Y, X).

        Returns:
            Stage s has `widths[s]` channels on a grid that is `strides[s]` times coarser than the input's.
        """
        return list(self.unet.encoder(image))  # type: ignore[operator]

    def pooled(self, image: Tensor) -> Tensor:
        """Return the mean of the last stage over space. Shape: (B, pooled_width)."""
        return self.stages(image)[-1].flatten(2).mean(dim=2)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return `stages(image)`."""
        return self.stages(image)


def _running_product(strides: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    totals: list[tuple[int, ...]] = []
    for stride in strides:
        before = totals[-1] if totals else (1,) * len(stride)
        totals.append(tuple(done * int(step) for done, step in zip(before, stride, strict=True)))
    return tuple(totals)
