"""Reads what a pretraining looks at now and then, once and before its first step, and looks at it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from medssl.augmentation.policy import Policy
from medssl.data.batch import Batch, stack
from medssl.data.draw import Draw
from medssl.data.label_split import with_validation
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings, Split
from medssl.data.target_files import read_targets
from medssl.data.targets import Targets, draw_labelled
from medssl.errors import DataError, UsageError
from medssl.networks.encoder import Encoder
from medssl.preprocessing.store import Store
from medssl.preprocessing.store_files import STORE_FILE
from medssl.pretraining.looks import LabelledCrops, LabelledImages, LabelledLook, QualityLook, VoxelLook, drawn_points
from medssl.pretraining.probe_settings import VIEWED
from medssl.pretraining.recipe import PretrainingSettings
from medssl.training.engine import Engine

logger = logging.getLogger(__name__)

#: Validation volumes from which on quality is that of validation crops: few volumes show little of how features spread.
LEAST_VALIDATION = 8
#: What one kind of samples may take of the memory; of crops that are too large there are fewer.
MEMORY = 2**29
#: Voxels of a crop that the segmentation probe learns from.
POINTS = 2048


class Reader(Protocol):
    """Reads a labelled data set as images of a recipe's patch: `medssl.transfer.probe_images.read_labelled`."""

    def __call__(self, dataset: Path, settings: PretrainingSettings, store: Store) -> LabelledImages: ...


class Look(Protocol):
    """Looks at an encoder."""

    def figures(self, encoder: Encoder, device: torch.device) -> dict[str, float]: ...


class OnlineProbes:
    """What the loop calls: figures of all looks, without gradients and in evaluation mode.

    Args:
        looks: What is looked at; only the first process looks.
    """

    def __init__(self, looks: Sequence[Look]) -> None:
        self.looks = list(looks)

    def __call__(self, engine: Engine, step: int) -> dict[str, float]:
        """Return figures by name; none in a process that does not look."""
        found: dict[str, float] = {}
        for look in self.looks:
            figures: Callable[[], dict[str, float]] = partial(look.figures, engine.method.encoder, engine.fabric.device)
            found |= engine.watch(figures)
        return found


def read_probes(
    settings: PretrainingSettings, store: Store, policy: Policy, channels: int, read_labelled: Reader | None
) -> OnlineProbes:
    """Read all samples of the probes of a recipe.

    Args:
        settings: The resolved recipe.
        store: What is pretrained on.
        policy: Of the method's first purpose.
        channels: Of the crops.
        read_labelled: Reads a labelled data set that is not the store.

    Raises:
        UsageError: If the labels are of a data set and nothing reads one, or their images do not fit the encoder.
        DataError: If labels or masks cannot be used.
    """
    probes = settings.probes
    looks: list[Look] = []
    if not probes.every:
        return OnlineProbes(looks)
    if probes.crops:
        quality = _quality(settings, store, policy)
        if quality is not None:
            looks.append(quality)
    kinds = tuple(name for name in probes.kinds if name != "segmentation")
    if probes.labels is not None and kinds:
        labelled = _labelled(probes.labels, settings, store, read_labelled)
        looks.append(_labelled_look(labelled, kinds, channels))
    if "segmentation" in probes.kinds:
        looks.append(_voxels(settings, store))
    return OnlineProbes(looks)


def fewer(targets: Targets, most: int) -> Targets:
    """Keep at most so many training and so many validation cases, drawn as `--labelled` draws them; always the same.

    Cases of the split `test` are left alone.
    """
    kept = []
    for split in ("train", "validation"):
        part = targets.with_cases(dataclasses.replace(case, split="train") for case in targets.of(split))
        if len(part.cases) > most:
            part = draw_labelled(part, max(most, len(targets.classes)), 0)
        kept += [dataclasses.replace(case, split=split) for case in part.cases]
    return targets.with_cases(kept)


def most_images(settings: PretrainingSettings, store: Store) -> int:
    """Return how many labelled images of the patch's size are kept of each split: `probes.cases`, or what fits."""
    channels = max(int(row["shape"][0]) for row in store.info["volumes"])
    return min(settings.probes.cases, max(4, MEMORY // (4 * math.prod(settings.patch_size) * channels)))


def _quality(settings: PretrainingSettings, store: Store, policy: Policy) -> QualityLook | None:
    split: Split = "validation" if len(store.ids_of("validation")) >= LEAST_VALIDATION else "train"
    viewer = policy.sibling("contrastive")
    batch = _crops(settings, store, split, settings.probes.crops, read_size=viewer.read_size)
    if len(batch) < 2:
        logger.warning("probes.crops %d: quality needs two crops and is left away.", settings.probes.crops)
        return None
    few = _rows(batch, range(min(VIEWED, len(batch))))
    draw = Draw(settings.seed, few.sample_index).child("quality")
    with torch.no_grad():
        first, second = viewer.two(few, draw)
    return QualityLook(_middle(batch.image, settings.patch_size), (first.image, second.image))


def _labelled(
    labels: Path, settings: PretrainingSettings, store: Store, read_labelled: Reader | None
) -> LabelledImages:
    if _names_volumes(labels):
        if not (store.folder / STORE_FILE).is_file():
            raise UsageError(
                "probes.labels: volumes of an nnU-Net folder cannot be named by volume_id. Give a store of `medssl "
                "preprocess`, or a CSV of paths."
            )
        targets = fewer(
            read_targets(store.folder, labels=labels, ignore_unlabelled=True),
            most_images(settings, store),
        )
        images = [_centre(store, str(case.volume_id), settings.patch_size) for case in targets.cases]
        if len({image.shape[0] for image in images}) > 1:
            raise DataError("probes.labels: the labelled volumes differ in their number of channels.")
        return LabelledImages(torch.stack(images), targets)
    if read_labelled is None:
        raise UsageError(
            f"probes.labels {labels}: only a CSV with the columns volume_id and label, for volumes of the store, can "
            "be read here. From Python, give pretrain read_labelled=medssl.transfer.probe_images.read_labelled."
        )
    return read_labelled(labels, settings, store)


def _labelled_look(labelled: LabelledImages, kinds: tuple[str, ...], channels: int) -> LabelledLook:
    targets = labelled.targets
    if labelled.images.shape[1] != channels:
        raise UsageError(
            f"probes.labels: the images have {labelled.images.shape[1]} channels, the encoder takes {channels}."
        )
    if not targets.of("train") or not targets.of("validation"):
        raise DataError("probes.labels: a probe needs training and validation cases; see the column split.")
    if targets.kind == "multilabel" and "prototypes" in kinds:
        logger.warning("Nearest prototypes need one class per case: they are left out.")
        kinds = tuple(name for name in kinds if name != "prototypes")
    return LabelledLook(labelled, kinds)


def _voxels(settings: PretrainingSettings, store: Store) -> VoxelLook:
    masked = with_validation(store)
    parts = []
    for split in ("train", "validation"):
        if not any(masked.has_label(name) for name in masked.ids_of(split)):
            raise DataError(
                "probes.kinds names segmentation, and the store has no mask of two or more patients: preprocess a data "
                "set with masks, or take segmentation out."
            )
        batch = _crops(settings, masked, split, settings.probes.masks, labels=True)
        assert batch.label is not None
        parts.append(LabelledCrops(batch.image, batch.label))
    learn, judge = parts
    values = sorted(set(learn.masks.unique().tolist()) | {0})
    if len(values) < 2:
        raise DataError(
            "probes: the masks of the drawn crops are empty. Raise probes.masks, or leave segmentation out."
        )
    # Values may have gaps; one that no training crop shows cannot be learned and counts as background.
    number = torch.zeros(max(values[-1], int(judge.masks.max())) + 1, dtype=torch.int64)
    number[values] = torch.arange(len(values))
    learn, judge = (LabelledCrops(part.images, number[part.masks]) for part in (learn, judge))
    return VoxelLook(learn, judge, drawn_points(learn.masks, len(values), POINTS), len(values))


def _crops(
    settings: PretrainingSettings,
    store: Store,
    split: Split,
    count: int,
    *,
    read_size: Sequence[int] | None = None,
    labels: bool = False,
) -> Batch:
    """Return the first crops of the endless stream of a split, on the CPU."""
    size = tuple(read_size or settings.patch_size)
    crops = CropSettings(
        patch_size=settings.patch_size,
        batch_size=1,
        read_size=size,
        foreground_probability=0.5 if labels else settings.sampling.foreground_probability,
        balance=settings.sampling.balance,
        channels=settings.sampling.channels,
        labels=labels,
    )
    most = max(2, MEMORY // (4 * math.prod(size)))
    with CropLoader(store, crops, seed=settings.seed, split=split) as loader:
        batches = loader.batches()
        return stack([next(batches) for _ in range(min(count, max(2, most // loader.channels)))])


def _rows(batch: Batch, rows: range) -> Batch:
    changes: dict[str, Any] = {}
    for item in dataclasses.fields(batch):
        value = getattr(batch, item.name)
        if isinstance(value, Tensor | tuple):
            changes[item.name] = value[rows.start : rows.stop]
    return dataclasses.replace(batch, **changes)


def _middle(image: Tensor, patch: Sequence[int]) -> Tensor:
    # The read window lies around the patch as in `medssl.data.sampling.margin_before`.
    start = [(size - edge) // 2 for size, edge in zip(image.shape[2:], patch, strict=True)]
    for axis, (low, edge) in enumerate(zip(start, patch, strict=True), start=2):
        image = image.narrow(axis, low, edge)
    return image.contiguous()


def _centre(store: Store, name: str, patch: Sequence[int]) -> Tensor:
    """Return the middle of a volume at the size of the patch, filled up with its background. Shape: (C, *patch)."""
    entry = store.entry(name)
    size = (1,) * (3 - len(patch)) + tuple(patch)
    start = [(edge - want) // 2 for edge, want in zip(entry.shape[1:], size, strict=True)]
    low = [max(first, 0) for first in start]
    high = [min(first + want, edge) for first, want, edge in zip(start, size, entry.shape[1:], strict=True)]
    image = np.full((entry.shape[0], *size), entry.background, np.float32)
    inside = tuple(slice(a - first, b - first) for a, b, first in zip(low, high, start, strict=True))
    image[(slice(None), *inside)] = store.read(name, low, high)
    return torch.from_numpy(image[:, 0] if len(patch) == 2 else image)


def _names_volumes(labels: Path) -> bool:
    if labels.suffix.lower() != ".csv" or not labels.is_file():
        return False
    with labels.open("rb") as handle:
        return b"volume_id" in handle.readline(65_536).lower()
