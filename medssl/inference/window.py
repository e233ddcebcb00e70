"""nnU-Net's sliding window as a stream: logits leave row by row, so no volume of logits is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medssl.errors import InputRefused, MedsslError
from medssl.inference.model import SegmentationModel, precision
from medssl.inference.workspace import Workspace

Array = npt.NDArray[Any]


class Observer(Protocol):
    """Sees what the window averages before it is averaged."""

    def add(self, logits: Tensor) -> None:
        """Take the logits of one fold and mirroring of the present tile, turned back. Shape: (heads, *tile)."""

    def finish_tile(self, weights: Tensor) -> None:
        """Close the present tile; the weights of its voxels are 0 in the padding. Shape: (*tile,)."""


class SlidingWindow:
    """Tiles of one volume, weighted by a Gaussian and averaged in float16 exactly as nnU-Net does.

    nnU-Net visits the tiles with axis 0 outermost. Rows below the next tile's start along axis 0 are therefore
    finished: they are divided by their weights and handed on, and only a window of one tile's rows stays in memory:
    (heads + 1) x tile rows x Y x X float16 values per fold.

    Args:
        model: Networks and plans.
        shape: Shape (Z, Y, X) of the volume.
        step_size: Distance of the tiles in tile sizes.
        mirroring_axes: Spatial axes along which predictions are averaged with their mirror image.
        observer: Shown each single prediction; None costs nothing.
    """

    def __init__(
        self,
        model: SegmentationModel,
        shape: Sequence[int],
        step_size: float,
        mirroring_axes: tuple[int, ...],
        observer: Observer | None = None,
    ) -> None:
        from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

        self.model = model
        self.flat = len(model.patch_size) == 2
        self.tile: tuple[int, int, int] = (1, *model.patch_size) if self.flat else model.patch_size  # type: ignore[assignment]
        self.shape = tuple(int(side) for side in shape)
        self.padded = tuple(max(side, tile) for side, tile in zip(self.shape, self.tile, strict=True))
        # pad_nd_image of acvl_utils centres the volume; of an odd amount the larger part lies above.
        self.below = tuple((padded - side) // 2 for padded, side in zip(self.padded, self.shape, strict=True))
        steps = compute_steps_for_sliding_window(self.padded[-len(model.patch_size) :], model.patch_size, step_size)
        self.steps: list[list[int]] = [list(range(self.padded[0])), *steps] if self.flat else steps
        self.mirroring_axes = mirroring_axes
        self.observer = observer

    @property
    def tiles(self) -> int:
        """Number of tiles, each of which passes every fold once per mirroring."""
        return len(self.steps[0]) * len(self.steps[1]) * len(self.steps[2])

    def rows(self, data: Array, workspace: Workspace, advance: Callable[[], object]) -> Iterator[Array]:
        """Yield logits in order along axis 0.

        Args:
            data: Shape: (C, Z, Y, X), float32.
            workspace: Gives the accumulators where they do not stay on the device.
            advance: Called after each tile.

        Yields:
            Shape: (heads, rows, Y, X), float16; the rows of all add up to Z.
        """
        device = self.model.device
        plane = self.padded[1] * self.padded[2]
        window = (self.model.heads, self.tile[0], *self.padded[1:])
        size = 2 * len(self.model.networks) * (self.model.heads + 1) * self.tile[0] * plane
        on_device = device.type == "cuda" and size < 0.5 * torch.cuda.mem_get_info(device)[0]
        where = device if on_device else torch.device("cpu")
        made: list[Array] = []

        def zeros(shape: tuple[int, ...]) -> Tensor:
            if on_device:
                return torch.zeros(shape, dtype=torch.half, device=device)
            made.append(workspace.zeros(shape, np.float16))
            return torch.from_numpy(made[-1])

        logits = [zeros(window) for _ in self.model.networks]
        weights = zeros(window[1:])
        gaussian = self._gaussian(where)
        starts = self.steps[0]
        for position, start in enumerate(starts):
            for y in self.steps[1]:
                for x in self.steps[2]:
                    tile = self._tile(data, start, y, x).to(device)
                    area = (slice(None), slice(None), slice(y, y + self.tile[1]), slice(x, x + self.tile[2]))
                    for sums, network in zip(logits, self.model.networks, strict=True):
                        sums[area] += self._predict(network, tile).to(where) * gaussian
                    weights[area[1:]] += gaussian
                    if self.observer is not None:
                        self.observer.finish_tile(gaussian * self._inside(start, y, x).to(where))
                    advance()
            last = position + 1 == len(starts)
            done = self.tile[0] if last else starts[position + 1] - start
            workspace.relax()
            finished = self._finish(logits, weights, done, start)
            if finished.shape[1]:
                yield finished
            if not last:
                for sums in (*logits, weights[None]):
                    _shift(sums, done)
        for array in made:
            workspace.release(array)

    def _finish(self, logits: list[Tensor], weights: Tensor, done: int, start: int) -> Array:
        """Divide the first `done` rows of the window by their weights, average the folds and cut the padding off."""
        total: Tensor | None = None
        for sums in logits:
            mean = torch.div(sums[:, :done], weights[:done])
            if not torch.isfinite(mean).all():
                raise InputRefused(
                    "output_not_finite", "a logit is not finite, or beyond float16 in which nnU-Net sums its tiles"
                )
            total = mean.cpu() if total is None else total.add_(mean.cpu())
        assert total is not None
        if len(logits) > 1:
            total /= len(logits)
        low = max(self.below[0] - start, 0)
        high = min(self.below[0] + self.shape[0] - start, done)
        inside = [slice(below, below + side) for below, side in zip(self.below[1:], self.shape[1:], strict=True)]
        return total[:, low : max(low, high), inside[0], inside[1]].numpy()

    def _tile(self, data: Array, *starts: int) -> Tensor:
        """Cut one tile out of the volume, zero outside it. Shape: (1, C, *patch_size)."""
        tile = np.zeros((data.shape[0], *self.tile), np.float32)
        source, target = [slice(None)], [slice(None)]
        for start, below, side, length in zip(starts, self.below, self.shape, self.tile, strict=True):
            low, high = max(start - below, 0), min(start - below + length, side)
            source.append(slice(low, high))
            target.append(slice(low - start + below, high - start + below))
        tile[tuple(target)] = data[tuple(source)]
        tensor = torch.from_numpy(tile)[None]
        return tensor[:, :, 0] if self.flat else tensor

    def _inside(self, *starts: int) -> Tensor:
        """Tell which voxels of a tile are no padding. Shape: (*tile,), bool."""
        inside = torch.zeros(self.tile, dtype=torch.bool)
        where = []
        for start, below, side, length in zip(starts, self.below, self.shape, self.tile, strict=True):
            where.append(slice(max(below - start, 0), max(min(below + side - start, length), 0)))
        inside[tuple(where)] = True
        return inside

    def _predict(self, network: torch.nn.Module, tile: Tensor) -> Tensor:
        """Return the logits of one tile, averaged over mirrorings. Shape: (heads, *tile)."""
        from itertools import combinations

        with precision(self.model.device):
            try:
                prediction = network(tile)
                self._show(prediction)
                axes = [axis + 2 for axis in self.mirroring_axes]
                flips = [flip for count in range(1, len(axes) + 1) for flip in combinations(axes, count)]
                for flip in flips:
                    mirrored = torch.flip(network(torch.flip(tile, flip)), flip)
                    self._show(mirrored)
                    prediction += mirrored
                if flips:
                    prediction /= len(flips) + 1
            except torch.OutOfMemoryError as error:
                raise MedsslError(
                    f"The device has too little memory for one tile of {self.model.patch_size} voxels. "
                    "Free memory on it, or use --device cpu."
                ) from error
        return prediction[0][:, None] if self.flat else prediction[0]

    def _show(self, prediction: Tensor) -> None:
        if self.observer is not None:
            self.observer.add(prediction[0][:, None] if self.flat else prediction[0])

    def _gaussian(self, device: torch.device) -> Tensor:
        from nnunetv2.inference.sliding_window_prediction import compute_gaussian

        weights = compute_gaussian(self.model.patch_size, sigma_scale=1.0 / 8, value_scaling_factor=10, device=device)
        return weights[None] if self.flat else weights


def _shift(window: Tensor, rows: int) -> None:
    """Move a window's rows up by `rows` in place and clear the freed ones; row by row, so that no copy is made."""
    kept = window.shape[1] - rows
    for row in range(kept):
        window[:, row] = window[:, row + rows]
    window[:, kept:] = 0
