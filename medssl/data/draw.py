"""Random numbers as a function of (seed, sample index, name): no hidden state, the same after a crash."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medssl.data.generators import generator_of, stream_key


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
        return self._stack([rng.uniform(low, high, shape) for rng in self._generators()], torch.float32)

    def normal(self, mean: float, std: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return float32 normal numbers. Shape: (B, *shape)."""
        return self._stack([rng.normal(mean, std, shape) for rng in self._generators()], torch.float32)

    def integers(self, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Return int64 numbers in [low, high). Shape: (B, *shape)."""
        return self._stack([rng.integers(low, high, shape) for rng in self._generators()], torch.int64)

    def happens(self, probability: float, shape: tuple[int, ...] = ()) -> Tensor:
        """Return True with the given probability. Shape: (B, *shape), bool."""
        return self._stack([rng.random(shape) < probability for rng in self._generators()], torch.bool)

    def permutation(self, count: int) -> Tensor:
        """Return one permutation of 0..count-1 per sample. Shape: (B, count), int64."""
        return self._stack([rng.permutation(count) for rng in self._generators()], torch.int64)

    def noise_like(self, image: Tensor) -> Tensor:
        """Return standard normal noise of an image's shape, dtype and device, each sample from its own generator.

        The numbers are made on the image's device and so differ between CPU and CUDA.
        """
        if len(image) != len(self):
            raise ValueError(f"The image has {len(image)} samples, the draw has {len(self)}")
        noise = torch.empty_like(image)
        for row, key in zip(noise, self._keys(), strict=True):
            generator = torch.Generator(device=image.device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
            row.normal_(generator=generator)
        return noise

    def _keys(self) -> list[bytes]:
        name = "/".join((*self.path, str(self._calls)))
        self._calls += 1
        return [stream_key(self.seed, index, name) for index in self.sample_index]

    def _generators(self) -> list[np.random.Generator]:
        return [generator_of(key) for key in self._keys()]

    @staticmethod
    def _stack(values: list[object], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.stack([np.asarray(value) for value in values]), dtype=dtype)
