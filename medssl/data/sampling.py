"""Where each sample comes from: volume, channel and window, as a pure function of (seed, sample index).

Samples are numbered 0, 1, 2, ... without end. `crops_per_volume` consecutive samples form a group that shares one
volume. A window is placed for the *patch* that the network will see; what the augmentation wants to read around it is a
margin that does not move the patch, so the choice of an augmentation never changes which anatomy is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from medssl.config import Settings
from medssl.data.generators import generator
from medssl.errors import DataError
from medssl.preprocessing.store import Store, StoreEntry

Split = Literal["train", "validation", "all"]
Triple = tuple[int, int, int]

# The drawn foreground voxel lies in the central half of the patch: seen with its surroundings, yet not always centred.
CENTRAL_PART = 0.5


class CropSettings(Settings):
    """How crops are cut.

    Args:
        patch_size: What the network sees, in voxels: (Z, Y, X), or (Y, X) for slices and images.
        batch_size: Samples per step over all ranks.
        read_size: What is read around a patch, for a spatial augmentation to turn and scale in; None reads the patch.
        foreground_probability: How often a crop is placed on a voxel of the foreground instead of anywhere.
        foreground: What that is: `tissue`, or `label`, the classes of the label above 0, each as often as the others.
        crops_per_volume: Consecutive samples that share one volume and, where windows are near, one read.
        spread: How far the other crops of a group lie from its first, in patch sizes along each axis; None places
            each of them on its own. In 2D the crops of a group stay in one slice when a spread is given.
        balance: `volume` shows every volume equally often; `patient` every patient.
        channels: `all` channels of a volume, or a `random` one, for stores whose volumes differ in channels.
        labels: Use only volumes with a label, and deliver it.
    """

    patch_size: tuple[int, ...]
    batch_size: int = Field(default=2, ge=1)
    read_size: tuple[int, ...] | None = None
    foreground_probability: float = Field(default=0.33, ge=0, le=1)
    foreground: Literal["tissue", "label"] = "tissue"
    crops_per_volume: int = Field(default=1, ge=1)
    spread: float | None = Field(default=0.5, ge=0)
    balance: Literal["volume", "patient"] = "volume"
    channels: Literal["all", "random"] = "all"
    labels: bool = False

    @field_validator("patch_size", "read_size")
    @classmethod
    def _two_or_three_positive(cls, size: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if size is not None and (len(size) not in (2, 3) or min(size) < 1):
            raise ValueError("a size has 2 (Y, X) or 3 (Z, Y, X) positive numbers")
        return size

    @model_validator(mode="after")
    def _sizes_agree(self) -> CropSettings:
        if self.read_size is not None:
            if len(self.read_size) != len(self.patch_size):
                raise ValueError(f"read_size {self.read_size} and patch_size {self.patch_size} differ in dimensions")
            if any(read < patch for read, patch in zip(self.read_size, self.patch_size, strict=True)):
                raise ValueError(f"read_size {self.read_size} is smaller than patch_size {self.patch_size}")
        if self.batch_size % self.crops_per_volume:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of crops_per_volume {self.crops_per_volume}"
            )
        return self

    @property
    def patch(self) -> Triple:
        """Patch size with three numbers; one slice in 2D."""
        return _three(self.patch_size)

    @property
    def read(self) -> Triple:
        """Read size with three numbers; one slice in 2D."""
        return _three(self.read_size or self.patch_size)

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.patch_size)


@dataclass(frozen=True)
class Crop:
    """The window of one sample.

    Args:
        sample_index: Index in the endless stream.
        volume: Id of the volume.
        start: First voxel of the read window, (z, y, x); negative where it begins before the volume.
        channel: The one channel to read, or None for all.
    """

    sample_index: int
    volume: str
    start: Triple
    channel: int | None


def margin_before(read: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return how many voxels of the read window lie before the patch along each axis; the rest lies behind it."""
    return tuple((r - p) // 2 for r, p in zip(read, patch, strict=True))


class Sampler:
    """Chooses the window of every sample.

    Args:
        store: Where the volumes are.
        settings: How crops are cut.
        seed: The run's seed.
        split: Which volumes may be used.

    Attributes:
        volumes: Their ids.
        channels: Channels of every crop.

    Raises:
        DataError: If no volume fits the split or carries the label asked for, or the channels differ.
    """

    def __init__(self, store: Store, settings: CropSettings, *, seed: int, split: Split) -> None:
        self.store = store
        self.settings = settings
        self.seed = seed
        rows = _eligible(store, settings, split)
        self.volumes = [str(row["id"]) for row in rows]
        self.channels = 1 if settings.channels == "random" else int(rows[0]["shape"][0])
        # A volume of its own is its name, not a list of one: 100,000 lists cost memory and a fifth of a second.
        self._units: Sequence[str | list[str]] = _by_patient(rows) if settings.balance == "patient" else self.volumes
        self._order = lru_cache(maxsize=2)(self._order_of_pass)

    def group(self, number: int) -> list[Crop]:
        """Return the windows of the samples `number * crops_per_volume` onward, all of one volume."""
        settings = self.settings
        rng = generator(self.seed, number, "crop")
        volume = self._volume(number, rng)
        entry = self.store.entry(volume)
        channel = int(rng.integers(entry.shape[0])) if settings.channels == "random" else None
        crops: list[Crop] = []
        first: Triple | None = None
        for member in range(settings.crops_per_volume):
            if first is None or settings.spread is None:
                place = self._place(entry, rng)
                first = place
            else:
                place = self._near(first, entry, rng)
            before = margin_before(settings.read, settings.patch)
            start = (place[0] - before[0], place[1] - before[1], place[2] - before[2])
            crops.append(Crop(number * settings.crops_per_volume + member, volume, start, channel))
        return crops

    def _volume(self, number: int, rng: np.random.Generator) -> str:
        # Every pass over the units is one permutation: no volume waits long, none is seen twice before the others once.
        passed, position = divmod(number, len(self._units))
        unit = self._units[self._order(passed)[position]]
        if isinstance(unit, str):
            return unit
        return unit[0] if len(unit) == 1 else unit[int(rng.integers(len(unit)))]

    def _order_of_pass(self, number: int) -> np.ndarray:
        return generator(self.seed, number, "order of volumes").permutation(len(self._units))

    def _place(self, entry: StoreEntry, rng: np.random.Generator) -> Triple:
        patch = np.array(self.settings.patch)
        shape = np.array(entry.shape[1:])
        # Both are always drawn, so that the probability does not shift the numbers drawn after.
        on_tissue = rng.random() < self.settings.foreground_probability
        anywhere = np.floor(rng.random(3) * np.maximum(shape - patch + 1, 1)).astype(int)
        place_in_patch = (1 - CENTRAL_PART) / 2 + CENTRAL_PART * rng.random(3)
        which = rng.random()
        voxels = entry.foreground if self.settings.foreground == "tissue" else self.store.label_voxels(entry.id)
        if not on_tissue or len(voxels) == 0:
            return _inside(anywhere, patch, shape)
        voxel = np.asarray(voxels)[int(which * len(voxels))]
        return _inside(voxel - np.floor(place_in_patch * patch).astype(int), patch, shape)

    def _near(self, first: Triple, entry: StoreEntry, rng: np.random.Generator) -> Triple:
        patch = np.array(self.settings.patch)
        reach = np.floor((self.settings.spread or 0) * patch).astype(int)
        if self.settings.dimensions == 2:
            reach[0] = 0
        return _inside(np.array(first) + rng.integers(-reach, reach + 1), patch, np.array(entry.shape[1:]))


def plan_reads(windows: Sequence[tuple[Triple, Triple]]) -> list[tuple[Triple, Triple, list[int]]]:
    """Join windows of one volume into few reads: two are joined where their common box is no larger than both.

    Args:
        windows: Start and stop of each window, inside the volume.

    Returns:
        Start and stop of each read, and the windows it serves.
    """
    reads: list[tuple[Triple, Triple, list[int]]] = []
    for number, (start, stop) in enumerate(windows):
        for position, (other_start, other_stop, members) in enumerate(reads):
            joint = _box_of([(start, stop), (other_start, other_stop)])
            if _voxels(*joint) <= _voxels(start, stop) + _voxels(other_start, other_stop):
                reads[position] = (*joint, [*members, number])
                break
        else:
            reads.append((start, stop, [number]))
    return reads


def _eligible(store: Store, settings: CropSettings, split: Split) -> list[dict[str, Any]]:
    """Return the rows of the store's table that may be used, without reading the facts of each volume."""
    rows = sorted(store.info["volumes"], key=lambda row: str(row["id"]))
    if not rows:
        raise DataError("The store holds no volume. Look at its refusals, then run `medssl preprocess` again.")
    of_split = [row for row in rows if split in ("all", row["split"])]
    if not of_split:
        found = ", ".join(sorted({str(row["split"]) for row in rows}))
        raise DataError(
            f"None of the {len(rows)} volumes of the store is in the split '{split}' (found: {found}). Use split='all'."
        )
    usable = [row for row in of_split if row["has_label"]] if settings.labels else of_split
    if not usable:
        raise DataError(
            f"None of the {len(of_split)} volumes of the split '{split}' has a label. "
            "Preprocess a data set with labelsTr."
        )
    counts = {int(row["shape"][0]) for row in usable}
    if settings.channels == "all" and len(counts) > 1:
        raise DataError(
            f"The volumes have {sorted(counts)} channels; a batch needs one number. Use channels: random "
            "(one channel per crop) or select volumes of one kind with --select."
        )
    return usable


def _by_patient(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    patients: dict[str, list[str]] = {}
    for row in rows:
        # A volume without a patient stands for itself.
        patients.setdefault(str(row.get("patient_key") or f"volume {row['id']}"), []).append(str(row["id"]))
    return [patients[patient] for patient in sorted(patients)]


def _inside(place: np.ndarray, patch: np.ndarray, shape: np.ndarray) -> Triple:
    """Keep a patch within the volume; centre it along axes where it is the larger of the two."""
    centred = -((patch - shape) // 2)
    placed = np.where(patch >= shape, centred, np.clip(place, 0, np.maximum(shape - patch, 0)))
    return int(placed[0]), int(placed[1]), int(placed[2])


def _three(size: Sequence[int]) -> Triple:
    z, y, x = (1, *size) if len(size) == 2 else size
    return z, y, x


def _box_of(windows: Sequence[tuple[Triple, Triple]]) -> tuple[Triple, Triple]:
    starts, stops = zip(*windows, strict=True)
    low, high = np.min(starts, axis=0), np.max(stops, axis=0)
    return (int(low[0]), int(low[1]), int(low[2])), (int(high[0]), int(high[1]), int(high[2]))


def _voxels(start: Triple, stop: Triple) -> int:
    return math.prod(max(b - a, 0) for a, b in zip(start, stop, strict=True))
