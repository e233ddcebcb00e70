"""The two streams of a segmentation: labelled cases with their masks, and unlabelled ones without reach of a mask."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.augmentation.policy import Policy
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.files import write_json
from medssl.preprocessing.nnunet_folder import NnunetStore
from medssl.preprocessing.store import Store
from medssl.semisupervised.batch import PairedLoader
from medssl.semisupervised.method import SemiSupervised
from medssl.semisupervised.recipe import SemiTrainingSettings
from medssl.semisupervised.unlabelled import check_store, dataset_of, is_store, unlabelled_cases
from medssl.transfer.preprocessed import preprocess_cases
from medssl.transfer.raw import RawDataset
from medssl.transfer.selection import Selection

logger = logging.getLogger(__name__)

_LABEL_ENDING = "_seg.b2nd"
LABELLED, UNLABELLED = "labelled", "unlabelled"


@dataclass(frozen=True)
class Streams:
    """Stores of both parts.

    Args:
        labelled: Volumes with labels.
        unlabelled: Volumes without, or None where the method does not look at any.
    """

    labelled: Store
    unlabelled: Store | None


def link_streams(
    raw: RawDataset,
    selection: Selection,
    plans: dict[str, Any],
    configuration: str,
    preprocessed: Path,
    folder: Path,
    unlabelled: Path | None,
    unlabelled_names: Sequence[str] | None = None,
    *,
    wanted: bool,
    workers: int | None,
    quiet: bool,
) -> None:
    """Preprocess what is not there yet and link each part into a folder of its own, for `open_streams`.

    Args:
        raw: The labelled data set.
        selection: Its cases.
        plans: nnU-Net plans.
        configuration: Their configuration.
        preprocessed: Folder of the data set's preprocessed data, which runs may share.
        folder: Folder of the links.
        unlabelled: Folder or STORE of images, or None for the data set's other cases.
        unlabelled_names: Of those only these.
        wanted: Whether the method looks at unlabelled images.
        workers: Processes that preprocess.
        quiet: Show no progress.
    """
    everything = sorted({*selection.train, *selection.validation})
    data = preprocess_cases(raw, plans, configuration, everything, preprocessed, workers=workers, quiet=quiet)
    _link(data, selection.train, folder / LABELLED, plans, raw, labels=True)
    _warn_of_absent_classes(NnunetStore.of_folder(folder / LABELLED / data.name), raw)
    if not wanted:
        return
    if unlabelled is not None and is_store(unlabelled):
        check_store(Store.open(unlabelled), raw, plans["configurations"][configuration]["spacing"])
        return
    cases = unlabelled_cases(raw, selection, unlabelled, unlabelled_names)
    images = preprocess_cases(
        dataset_of(cases, raw), plans, configuration, list(cases), preprocessed / UNLABELLED, with_labels=False,
        workers=workers, quiet=quiet,
    )  # fmt: skip
    _link(images, list(cases), folder / UNLABELLED, plans, raw, labels=False)


def open_streams(folder: Path, identifier: str, unlabelled: Path | None, *, wanted: bool) -> Streams:
    """Return the stores that `link_streams` has made; every process opens its own.

    Args:
        folder: Folder of the links.
        identifier: `data_identifier` of the plans' configuration.
        unlabelled: As for `link_streams`.
        wanted: Whether the method looks at unlabelled images.
    """
    labelled = NnunetStore.of_folder(folder / LABELLED / identifier)
    if not wanted:
        return Streams(labelled, None)
    if unlabelled is not None and is_store(unlabelled):
        return Streams(labelled, Store.open(unlabelled))
    return Streams(labelled, NnunetStore.of_folder(folder / UNLABELLED / identifier))


def make_loader(
    streams: Streams, kind: type[SemiSupervised], settings: SemiTrainingSettings, policy: Policy, patch: Sequence[int],
    workers: int, **place: Any,
) -> tuple[CropLoader, CropLoader | None, Any]:  # fmt: skip
    """Return the loaders of both parts and what the loop reads from: pairs, or pairs of labelled samples alone.

    Args:
        streams: The stores.
        kind: The method.
        settings: The resolved recipe.
        policy: Of the first purpose.
        patch: What the network sees.
        workers: Reader processes of each loader.
        **place: `rank`, `world` and `device` of a `CropLoader`.
    """
    purposes = kind.purposes(settings.of_method())
    windows = [policy.read_size, *(policy.sibling(purpose).read_size for purpose in purposes[1:])]
    shared: dict[str, Any] = {
        "patch_size": tuple(patch),
        "read_size": tuple(max(edges) for edges in zip(*windows, strict=True)),
        "foreground_probability": settings.foreground_probability,
    }
    needs = kind.needs_of(settings.of_method())
    first = CropSettings(batch_size=settings.batch_size, labels=True, foreground="label", **shared)
    labelled = CropLoader(
        streams.labelled, first, seed=settings.seed, workers=workers, split="all", **place
    )  # fmt: skip
    if streams.unlabelled is None:
        return labelled, None, PairedLoader(labelled, None)
    second = CropSettings(
        batch_size=settings.unlabelled_batch_size or settings.batch_size,
        crops_per_volume=needs.crops_per_volume,
        **shared,
    )
    # Another stream of numbers: the two parts may be as large as each other.
    unlabelled = CropLoader(
        streams.unlabelled, second, seed=settings.seed + 1, workers=workers, split="all", **place
    )  # fmt: skip
    return labelled, unlabelled, PairedLoader(labelled, unlabelled)


def _link(
    data: Path, names: Sequence[str], folder: Path, plans: dict[str, Any], raw: RawDataset, *, labels: bool
) -> None:
    """Make a folder of links to some preprocessed cases; without labels there is no link to one."""
    target = folder / data.name
    target.mkdir(parents=True, exist_ok=True)
    write_json(folder / "plans.json", plans)
    write_json(folder / "dataset.json", raw.content)
    wanted = {f"{name}{ending}" for name in names for ending in (".b2nd", *((_LABEL_ENDING,) if labels else ()))}
    for link in target.iterdir():
        if link.name not in wanted:
            link.unlink()
    for name in wanted:
        link = target / name
        source = os.path.relpath(data / name, target.resolve())
        if not link.is_symlink() or str(link.readlink()) != source:
            link.unlink(missing_ok=True)
            link.symlink_to(source)


def _warn_of_absent_classes(store: Store, raw: RawDataset) -> None:
    present: set[int] = set()
    for name in store.ids:
        voxels = store.label_voxels(name)
        stop = store.row(name)["shape"][1:]
        label = store.read_label(name, (0, 0, 0), stop) if len(voxels) else None
        if label is not None:
            present.update(int(value) for value in np.unique(label[tuple(voxels.T)]))
    for label_name, value in raw.content["labels"].items():
        if isinstance(value, int) and value > 0 and label_name != "ignore" and value not in present:
            logger.warning(
                "No labelled case shows '%s' (value %d): it cannot be learnt. Label a case that shows it, or name "
                "other cases with --train-cases.",
                label_name, value,
            )  # fmt: skip
