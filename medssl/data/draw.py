"""Random numbers as a function of (seed, sample index, name): no hidden state, the same after a crash."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.generators import stream_key

# Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: odd step, and finaliser in
# Stafford's variant 13. Counter-based: a batch's numbers are made at once and a sample's do not depend on the others.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Draw:
    """Draws parameters per sample.

    A sample's numbers depend on the seed, on its index in the endless stream and on the path of names that led here,
    and on nothing else: not on the batch it travels in, the worker that read it, or what was drawn before under
    another name. Each call below one path consumes a running number of that path, so that two calls differ.

    Args:
        seed: The run's seed.
        sample_index: One index per sample of the batch.
        path: Names that separate the streams of views and transforms.
    """

    def __init__(self, seed: int, sample_index: Tensor | Sequence[int], path: tuple[str, ...] = ()) -> None:
        self.seed = int(seed)
        self.sample_index = [int(index) for index in sample_index]
        self.path = path
        self._calls = 0

    def __len__(self) -> int:
        return len(self.sample_index)

    def child(self, name: str | int) -> Draw:
        """Return the stream of a view or a transform; the same name gives the same stream."""
        return Draw(self.seed, self.sample_index, (*self.path, str(name)))

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 numbers in [low, high). Shape: (B, *shape)."""
        numbers = torch.from_numpy(low + (high - low) * self._fractions(shape)).float()
        # Rounding to float32 may reach the upper end, which is excluded.
        return numbers.clamp_(max=float(np.nextafter(np.float32(high), np.float32(low)))) if low < high else numbers

    def normal(self, mean: float, std: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 normal numbers (Box and Muller, 1958). Shape: (B, *shape)."""
        u = self._fractions((2, *shape))
        radius = np.sqrt(-2 * np.log1p(-u[:, 0]))
        return torch.from_numpy(mean + std * radius * np.cos(2 * math.pi * u[:, 1])).float()

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return int64 numbers in [low, high). Shape: (B, *shape)."""
        # The remainder of 64 bits is even to one part in 2^64 / (high - low).
        return torch.from_numpy((self._bits(shape) % np.uint64(high - low)).astype(np.int64) + low)

    def happens(self, probability: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return True with the given probability. Shape: (B, *shape), bool."""
        return torch.from_numpy(np.asarray(self._fractions(shape) < probability))

    def permutation(self, count: int) -> Tensor:
        """Return one permutation of 0..count-1 per sample. Shape: (B, count), int64."""
        return torch.from_numpy(np.argsort(self._bits((count,)), axis=1, kind="stable").astype(np.int64))

    def noise_like(self, image: Tensor) -> Tensor:
        """Return standard normal noise of an image's shape, dtype and device, each sample from its own generator.

        The numbers are made on the image's device and so differ between CPU and CUDA.
        """
        if len(image) != len(self):
            raise ValueError(f"The image has {len(image)} samples, the draw has {len(self)}")
        noise = torch.empty_like(image)
        for row, seed in zip(noise, (self._bits(()) >> np.uint64(1)).tolist(), strict=True):
            row.normal_(generator=torch.Generator(device=image.device).manual_seed(seed))
        return noise

    def _fractions(self, shape: tuple[int, ...]) -> NDArray[np.float64]:
        """Return numbers in [0, 1) with 53 bits. Shape: (B, *shape)."""
        return (self._bits(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def _bits(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        """Return 64 random bits for each number. Shape: (B, *shape)."""
        name = "/".join((*self.path, str(self._calls)))
        self._calls += 1
        stream = np.frombuffer(stream_key(self.seed, 0, name), dtype="<u8").astype(np.uint64)
        index = np.array(self.sample_index, dtype=np.int64).astype(np.uint64)
        keys = _mixed(_mixed(index * _STEP + stream[0]) ^ stream[1])
        count = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        return _mixed(keys[:, None] + count * _STEP).reshape(len(self), *shape)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX[0]
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX[1]
    return bits ^ (bits >> np.uint64(31))
