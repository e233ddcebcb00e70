"""Features of whole volumes from a frozen encoder: what probes, quality, out-of-distribution scores and maps look at.

A volume is covered by boxes of the encoder's own patch size with the least overlap, since features of a normalised
network depend on how much it sees at once. Boxes without tissue are left out where the store knows its tissue. The
pooled features of the boxes are averaged, and of largest values the largest is taken. Nothing is drawn: a volume has
one embedding, the same up to rounding whatever is embedded beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medssl.errors import DataError, UsageError
from medssl.inference.frozen import Frozen, load_frozen
from medssl.inference.tiles import Tile, Triple, centre_tile, read_tile, tile_volume
from medssl.inference.volumes import Volume, volumes_of_store
from medssl.networks.pooling import Pooling, Stages, chosen_stages, pooled_stages
from medssl.preprocessing.store import Store
from medssl.progress import progress

logger = logging.getLogger(__name__)

Boxes = Literal["cover", "centre"]
Change = Callable[[NDArray[np.float32], Volume, Tile], NDArray[np.float32]]
MOST_BOXES = 64
BATCH = 8


@dataclass(frozen=True)
class Embeddings:
    """A feature per volume.

    Args:
        ids: Names of the volumes.
        features: Shape: (N, W), float32.
        patient_keys: Pseudonym of each volume's patient.
        splits: Split of each volume.
        modalities: Modality of each volume.
        names: What each of the W numbers is.
        facts: Which encoder, stages, pooling and boxes; names no path.
        labels: Label of each volume as text, `|` between several, where they are known.
    """

    ids: tuple[str, ...]
    features: NDArray[np.float32]
    patient_keys: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def of(self, rows: Sequence[int] | NDArray[np.int64]) -> Embeddings:
        """Return some of the rows."""
        index = np.asarray(rows, dtype=np.int64)

        def part(values: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(values[row] for row in index) if values else ()

        return Embeddings(
            part(self.ids),
            self.features[index],
            part(self.patient_keys),
            part(self.splits),
            part(self.modalities),
            self.names,
            self.facts,
            part(self.labels),
        )

    def require_finite(self) -> None:
        """Refuse features that are not numbers.

        Raises:
            DataError: Naming volumes.
        """
        bad = np.flatnonzero(~np.isfinite(self.features).all(axis=1))
        if bad.size:
            named = ", ".join(self.ids[row] for row in bad[:5])
            cause = (
                "All of them: the encoder's weights are probably not finite."
                if bad.size == len(self)
                else "Look at their intensities, for example with `medssl preview`."
            )
            raise DataError(f"{bad.size} of {len(self)} volumes have features that are not numbers: {named}. {cause}")


def embed(
    encoder: Frozen | Path,
    source: Store | Sequence[Volume],
    *,
    stages: Stages = "all",
    pooling: Pooling = "mean",
    boxes: Boxes = "cover",
    most_boxes: int = MOST_BOXES,
    quiet: bool = True,
    change: Change | None = None,
) -> Embeddings:
    """Return a feature of each volume.

    Args:
        encoder: An encoder of `load_frozen` or `freeze`, or the checkpoint that `load_frozen` is to read.
        source: What to look at: a store, or volumes of `medssl.inference.volumes`.
        stages: `all`, `last`, or numbers.
        pooling: `mean` over space, or `mean+max`.
        boxes: `cover` the volume, or the `centre` box only.
        most_boxes: Of more than so many, so many evenly spaced ones are used.
        quiet: Show no progress.
        change: Applied to each box before the encoder sees it, for example an augmentation.

    Raises:
        UsageError: If the volumes' channels do not fit the encoder, or there are none.
        DataError: If a volume cannot be read.
    """
    frozen = encoder if isinstance(encoder, Frozen) else load_frozen(encoder)
    volumes = volumes_of_store(source) if isinstance(source, Store) else source
    if not volumes:
        raise UsageError("There is no volume to embed: the source or the chosen split is empty.")
    if boxes not in ("cover", "centre") or most_boxes < 1:
        raise UsageError(f"--boxes takes cover or centre and at least one box, got {boxes} and {most_boxes}.")
    channels = frozen.encoder.in_channels
    chosen = chosen_stages(frozen.encoder, stages)
    names = frozen.names(chosen, pooling)
    means = len(names) // len(pooling.split("+"))
    sums = np.zeros((len(volumes), means))
    largest = np.full((len(volumes), len(names) - means), -np.inf)
    counts = np.zeros(len(volumes))
    _warn_of_spacing(frozen, volumes)
    with progress("Embedding", len(volumes), quiet=quiet) as advance:
        for rows, images in _batches(frozen, volumes, boxes, most_boxes, channels, change):
            with torch.inference_mode():
                found = pooled_stages(frozen.encoder, images.to(frozen.device), chosen, pooling)
            values = found.cpu().numpy().astype(np.float64)
            for row, value in zip(rows, values, strict=True):
                sums[row] += value[:means]
                counts[row] += 1
                largest[row] = np.maximum(largest[row], value[means:])
            advance(len(set(rows)))
    features = np.concatenate([sums / counts[:, None], largest], axis=1).astype(np.float32)
    facts = {
        "encoder": frozen.facts,
        "stages": list(chosen),
        "pooling": pooling,
        "boxes": boxes,
        "most_boxes": most_boxes,
        "patch_size": list(frozen.patch_size),
    }
    return Embeddings(
        tuple(volume.id for volume in volumes),
        features,
        tuple(volume.patient_key for volume in volumes),
        tuple(volume.split for volume in volumes),
        tuple(volume.modality for volume in volumes),
        tuple(names),
        facts,
    )


def boxes_of(frozen: Frozen, volume: Volume, boxes: Boxes, most: int) -> list[Tile]:
    """Return the boxes of a volume that are looked at; in 2D boxes of one slice."""
    size: Triple = (1, *frozen.patch_size)[-3:]  # type: ignore[assignment]
    if boxes == "centre":
        return [centre_tile(volume.shape[1:], size)]
    found = tile_volume(volume.shape[1:], size, most)
    if volume.tissue is None or not len(volume.tissue):
        return found
    return [tile for tile in found if _holds(tile, volume.tissue)] or found


def _batches(
    frozen: Frozen,
    volumes: Sequence[Volume],
    boxes: Boxes,
    most: int,
    channels: int,
    change: Change | None,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield the volumes' rows and the images (B, C, *patch) of boxes in order."""
    rows: list[int] = []
    images: list[NDArray[np.float32]] = []
    for row, volume in enumerate(volumes):
        if volume.shape[0] != channels and channels != 1:
            raise UsageError(
                f"{volume.id} has {volume.shape[0]} channels, the encoder takes {channels}. Use a store of the "
                "channels it was trained on, or an encoder of one channel, which sees each channel by itself."
            )
        for tile in boxes_of(frozen, volume, boxes, most):
            image = read_tile(volume.read, tile, volume.shape[1:], volume.shape[0], volume.background)
            image = change(image, volume, tile) if change is not None else image
            image = image[:, 0] if frozen.dimensions == 2 else image
            for part in image[None] if volume.shape[0] == channels else image[:, None]:
                rows.append(row)
                images.append(part)
                if len(images) == BATCH:
                    yield rows, torch.from_numpy(np.stack(images))
                    rows, images = [], []
    if images:
        yield rows, torch.from_numpy(np.stack(images))


def _holds(tile: Tile, points: NDArray[np.int64]) -> bool:
    start = np.asarray(tile.start)
    return bool(((points >= start) & (points < start + np.asarray(tile.size))).all(axis=1).any())


def _warn_of_spacing(frozen: Frozen, volumes: Sequence[Volume]) -> None:
    known = [volume.spacing_mm for volume in volumes if volume.spacing_mm is not None]
    if frozen.spacing_mm is None or not known:
        return
    axes = slice(-frozen.dimensions, None)
    median = np.median(np.asarray(known), axis=0)[axes]
    ratio = median / np.asarray(frozen.spacing_mm)[axes]
    if (ratio > 1.25).any() or (ratio < 0.8).any():
        logger.warning(
            "The volumes have voxels of %s mm, the encoder was trained at %s mm: preprocess them at its --spacing.",
            " x ".join(f"{edge:.2g}" for edge in median),
            " x ".join(f"{edge:.2g}" for edge in frozen.spacing_mm[axes]),
        )
