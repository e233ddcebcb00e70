"""Random numbers as a function of (seed, sample index, name): no hidden state, the same after a crash."""

from __future__ import annotations

import copy
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
_TO_24 = np.uint64(40)
_AT_ONCE = 32
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Draw:
    """Draws parameters per sample.

    A sample's numbers depend on the seed, on its index in the endless stream and on the path of names that led here,
    and on nothing else: not on the batch it travels in, the worker that read it, or what was drawn before under
    another name. Each number below one path is the next of its sequence, so that two calls differ.

    Args:
        seed: The run's seed.
        sample_index: One index per sample of the batch.
        path: Names that separate the streams of views and transforms.
    """

    def __init__(self, seed: int, sample_index: Tensor | Sequence[int], path: tuple[str, ...] = ()) -> None:
        self.seed = int(seed)
        listed = sample_index.tolist() if isinstance(sample_index, Tensor) else list(sample_index)
        self.sample_index = [int(index) for index in listed]
        self.path = path
        index = np.array(self.sample_index, dtype=np.int64).astype(np.uint64)
        self._hashed_index = _mixed(index * _STEP + np.uint64(self.seed % 2**64))
        self._used = 0
        self._keys: NDArray[np.uint64] | None = None
        self._first: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.sample_index)

    def child(self, name: str | int) -> Draw:
        """Return the stream of a view or a transform; the same name gives the same stream."""
        child = copy.copy(self)
        child.path = (*self.path, str(name))
        child._used, child._keys, child._first = 0, None, None
        return child

    def uniform(self, low: float, high: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 numbers in [low, high). Shape: (B, *shape)."""
        if low == 0 and high == 1:
            return torch.from_numpy((self._bits(shape) >> _TO_24).astype(np.float32) * np.float32(2.0**-24))
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
        start, self._used = self._used, self._used + math.prod(shape)
        if self._used > _AT_ONCE:
            return self._sequence(start, self._used).reshape(len(self), *shape)
        if self._first is None:
            # Making one number costs as much as making some dozens: the first are made together.
            self._first = self._sequence(0, _AT_ONCE)
        return self._first[:, start : self._used].reshape(len(self), *shape)

    def _sequence(self, start: int, stop: int) -> NDArray[np.uint64]:
        if self._keys is None:
            stream = np.frombuffer(stream_key(self.seed, 0, "/".join(self.path)), dtype="<u8")
            self._keys = _mixed((self._hashed_index ^ stream[0]) + stream[1])[:, None]
        return _mixed(self._keys + np.arange(start + 1, stop + 1, dtype=np.uint64) * _STEP)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX[0]
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX[1]
    return bits ^ (bits >> np.uint64(31))
