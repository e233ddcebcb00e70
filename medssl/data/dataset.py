"""Volumes of a store to the arrays of a batch; torch-free, so that reader processes start fast."""

from __future__ import annotations

from typing import Any

import numpy as np

from medssl.data.sampling import Crop, CropSettings, Sampler, Split, Triple, plan_reads
from medssl.errors import UsageError
from medssl.preprocessing.store import Store

# What is known of each sample, as numbers; `volume` is the position in `Sampler.volumes`.
FACTS = np.dtype(
    [
        ("sample_index", np.int64),
        ("volume", np.int64),
        ("sample_id", np.int64),
        ("origin_mm", np.float32, 3),
        ("spacing_mm", np.float32, 3),
        ("valid", np.int64, (3, 2)),
        ("background", np.float32),
        ("rescale", np.float32, 2),
        ("extent_mm", np.float32, 3),
    ]
)


class BatchArrays:
    """The arrays of one batch on one rank, laid out in one piece of memory that processes can share.

    Args:
        samples: Samples on this rank.
        channels: Channels of each crop.
        size: Read window (Z, Y, X).
        labels: Whether there are labels.
        memory: Writable buffer of at least `bytes_needed`, or None for own memory.
    """

    def __init__(self, samples: int, channels: int, size: Triple, labels: bool, memory: Any = None) -> None:
        if memory is None:
            memory = bytearray(self.bytes_needed(samples, channels, size, labels))
        voxels = samples * size[0] * size[1] * size[2]
        self.facts = np.frombuffer(memory, FACTS, samples)
        offset = _aligned(FACTS.itemsize * samples)
        self.image = np.frombuffer(memory, np.float32, voxels * channels, offset).reshape(samples, channels, *size)
        offset += _aligned(4 * voxels * channels)
        self.label = np.frombuffer(memory, np.int16, voxels, offset).reshape(samples, *size) if labels else None

    @staticmethod
    def bytes_needed(samples: int, channels: int, size: Triple, labels: bool) -> int:
        """Return the size of the memory that holds one batch."""
        voxels = samples * size[0] * size[1] * size[2]
        return (
            _aligned(FACTS.itemsize * samples)
            + _aligned(4 * voxels * channels)
            + (_aligned(2 * voxels) if labels else 0)
        )


class CropReader:
    """Reads the samples of a step.

    Rank r takes every `world`-th group of samples, so that the crops of one volume stay together; with one crop per
    volume these are the samples i with i % world == r. The batch of a step over all ranks does not depend on `world`.

    Args:
        store: Where the volumes are.
        settings: How crops are cut.
        seed: The run's seed.
        split: Which volumes may be used.
        rank: This process among those that train together.
        world: How many train together.

    Raises:
        UsageError: If the batch cannot be divided among the ranks.
    """

    def __init__(self, store: Store, settings: CropSettings, *, seed: int, split: Split, rank: int, world: int) -> None:
        groups = settings.batch_size // settings.crops_per_volume
        if not 0 <= rank < world:
            raise UsageError(f"Rank {rank} does not exist among {world} processes.")
        if groups % world:
            raise UsageError(
                f"batch_size {settings.batch_size} in groups of {settings.crops_per_volume} cannot be divided among "
                f"{world} processes: use a multiple of {world * settings.crops_per_volume}."
            )
        self.store = store
        self.settings = settings
        self.sampler = Sampler(store, settings, seed=seed, split=split)
        self.groups_per_step = groups
        self.rank = rank
        self.world = world
        self._position = {volume: position for position, volume in enumerate(self.sampler.volumes)}

    @property
    def samples(self) -> int:
        """Samples of each step on this rank."""
        return self.settings.batch_size // self.world

    def layout(self) -> tuple[int, int, Triple, bool]:
        """Return the arguments that describe this reader's `BatchArrays`."""
        return self.samples, self.sampler.channels, self.settings.read, self.settings.labels

    def read(self, step: int, into: BatchArrays, *, part: int = 0, parts: int = 1) -> None:
        """Fill the rows of one step.

        Args:
            step: Which step.
            into: Where to.
            part: Which share of the groups to read, for several readers that fill one batch.
            parts: How many readers share the step.
        """
        first = step * self.groups_per_step
        groups = [first + number for number in range(self.groups_per_step) if number % self.world == self.rank]
        size = self.settings.crops_per_volume
        for position in range(part, len(groups), parts):
            self._read_group(self.sampler.group(groups[position]), into, position * size)

    def _read_group(self, crops: list[Crop], into: BatchArrays, row: int) -> None:
        entry = self.store.entry(crops[0].volume)
        shape = entry.shape[1:]
        size = self.settings.read
        windows = [_clipped(crop.start, size, shape) for crop in crops]
        for number, (crop, (start, stop)) in enumerate(zip(crops, windows, strict=True)):
            fact = into.facts[row + number]
            fact["sample_index"] = crop.sample_index
            fact["volume"] = self._position[crop.volume]
            fact["sample_id"] = entry.number
            fact["spacing_mm"] = entry.spacing_mm
            fact["origin_mm"] = np.multiply(crop.start, entry.spacing_mm)
            fact["valid"] = np.stack([np.subtract(start, crop.start), np.subtract(stop, crop.start)], axis=1)
            fact["background"] = entry.background
            fact["rescale"] = entry.rescale
            fact["extent_mm"] = np.multiply(shape, entry.spacing_mm)
        for start, stop, members in plan_reads(windows):
            channels = None if crops[0].channel is None else [crops[0].channel]
            block = self.store.read(entry.id, start, stop, channels)
            label = self.store.read_label(entry.id, start, stop) if into.label is not None else None
            for member in members:
                source = tuple(slice(a - c, b - c) for a, b, c in zip(*windows[member], start, strict=True))
                target = tuple(
                    slice(a - c, b - c) for a, b, c in zip(*windows[member], crops[member].start, strict=True)
                )
                _paste(
                    into.image[row + member], (slice(None), *target), block[(slice(None), *source)], entry.background
                )
                if into.label is not None and label is not None:
                    # nnU-Net marks voxels outside the content with -1; to a method they are background, as padding is.
                    _paste(into.label[row + member], target, np.maximum(label[source], 0), 0)


def _paste(to: np.ndarray, where: tuple[slice, ...], values: np.ndarray, padding: float) -> None:
    if to[where].shape != to.shape:
        to.fill(padding)
    to[where] = values


def _clipped(start: Triple, size: Triple, shape: tuple[int, ...]) -> tuple[Triple, Triple]:
    low = [max(a, 0) for a in start]
    high = [min(a + s, n) for a, s, n in zip(start, size, shape, strict=True)]
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def _aligned(count: int) -> int:
    return -(-count // 4096) * 4096
