"""Which boxes of a volume are shown to an encoder, the same ones always."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Part of a box by which a volume may be larger along an axis than the boxes laid side by side; half of it each side.
MARGIN = 0.2
Triple = tuple[int, int, int]
Reader = Callable[[Triple, Triple], NDArray[np.float32]]


@dataclass(frozen=True)
class Tile:
    """A box of a volume.

    Args:
        start: First voxel (z, y, x); negative where the box begins before the volume.
        size: Edges (z, y, x).
    """

    start: Triple
    size: Triple


def tile_volume(shape: Sequence[int], size: Triple, most: int, margin: float = MARGIN) -> list[Tile]:
    """Return boxes that cover a volume with the least overlap; of more than `most`, so many evenly spaced ones.

    Along an axis that is shorter than the box, one box lies centred over it and the rest is padding. Where boxes side
    by side fall short of the axis by at most a fifth of a box, they lie centred and its two ends are not looked at.

    Args:
        shape: Of the volume (z, y, x).
        size: Of the boxes.
        most: Number of boxes that are kept at most, at least 1.
        margin: That fifth, or 0 to cover every voxel.
    """
    starts = [_starts(edge, box, margin) for edge, box in zip(shape, size, strict=True)]
    places: list[Triple] = [(z, y, x) for z, y, x in itertools.product(*starts)]
    if len(places) > most:
        # The middle of each of `most` equal stretches of the list.
        index = ((np.arange(most) + 0.5) * len(places) / most).astype(int)
        places = [places[number] for number in index]
    return [Tile(place, size) for place in places]


def centre_tile(shape: Sequence[int], size: Triple) -> Tile:
    """Return the box in the middle of a volume."""
    z, y, x = ((edge - box) // 2 for edge, box in zip(shape, size, strict=True))
    return Tile((z, y, x), size)


def read_tile(read: Reader, tile: Tile, shape: Sequence[int], channels: int, background: float) -> NDArray[np.float32]:
    """Return the voxels of a box; what lies outside of the volume has its background. Shape: (C, z, y, x), float32.

    Args:
        read: Returns the voxels from a first to behind a last one.
        tile: The box.
        shape: Of the volume (z, y, x).
        channels: Number of channels.
        background: Value of padding.
    """
    low = tuple(max(start, 0) for start in tile.start)
    high = tuple(min(s + n, edge) for s, n, edge in zip(tile.start, tile.size, shape, strict=True))
    block = read(low, high)  # type: ignore[arg-type]
    if block.shape[1:] == tile.size:
        return np.ascontiguousarray(block, dtype=np.float32)
    filled = np.full((channels, *tile.size), background, np.float32)
    where = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, tile.start, strict=True))
    filled[(slice(None), *where)] = block
    return filled


def _starts(edge: int, box: int, margin: float) -> list[int]:
    # Without the allowance a volume a voxel larger than the box along each axis would need eight almost equal boxes.
    count = max(math.ceil(edge / box - margin), 1)
    if count * box >= edge and count > 1:
        return [round(number * (edge - box) / (count - 1)) for number in range(count)]
    return [(edge - count * box) // 2 + number * box for number in range(count)]
