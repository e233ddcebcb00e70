"""The images of a labelled data set as a frozen encoder is shown them: exactly as a classifier that is fine-tuned."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medssl.data.target_files import read_targets
from medssl.data.targets import Targets, draw_labelled
from medssl.inference.frozen import Frozen, load_frozen
from medssl.inference.volumes import Volume, volumes_of_store
from medssl.transfer.classification_images import prepare_images
from medssl.transfer.classification_settings import ClassificationSettings
from medssl.transfer.images import ImageOptions
from medssl.transfer.source import load_source


@contextmanager
def labelled_volumes(
    dataset: Path,
    checkpoint: Path,
    *,
    labels: Path | None = None,
    kind: str = "auto",
    classes: Sequence[str] | None = None,
    folds: int | None = None,
    fold: int = 0,
    labelled: int | None = None,
    fit: str = "whole",
    patch_size: tuple[int, ...] | None = None,
    options: ImageOptions | None = None,
    cache: Path | None = None,
    seed: int = 0,
) -> Iterator[tuple[list[Volume], Targets, tuple[int, ...]]]:
    """Read a data set and bring its images to the patch; see `medssl.transfer.classification`.

    Args:
        dataset: A CSV, a folder for each class, a MedMNIST .npz, an INDEX or a STORE.
        checkpoint: Decides the network, and with it dimensions and channels.
        labels: CSV of labels, for an INDEX or a STORE.
        kind: Kind of target, or `auto`.
        classes: Names of the classes in order.
        folds: Deal the patients out into so many folds.
        fold: Which of them validates.
        labelled: Use only so many of the training cases.
        fit: How an image is brought to the patch.
        patch_size: What the encoder sees.
        options: What is done to every image.
        cache: Folder for the prepared images; by default a temporary one.
        seed: Of the draw of `labelled` cases.

    Yields:
        Volumes in the order of the cases, the targets, and the patch. They can be read within the `with` block.

    Raises:
        DataError: If the data set or an image cannot be used; the row is named.
        UsageError: If options do not fit together.
    """
    targets = read_targets(dataset, labels=labels, kind=kind, classes=classes, folds=folds, fold=fold)
    if labelled is not None:
        targets = draw_labelled(targets, labelled, seed)
    with prepared_volumes(targets, dataset, checkpoint, fit, patch_size, options, cache) as (volumes, patch):
        yield volumes, targets, patch


@contextmanager
def prepared_volumes(
    targets: Targets,
    dataset: Path,
    checkpoint: Path,
    fit: str = "whole",
    patch_size: tuple[int, ...] | None = None,
    options: ImageOptions | None = None,
    cache: Path | None = None,
) -> Iterator[tuple[list[Volume], tuple[int, ...]]]:
    """Bring the images of some cases to the patch; see `labelled_volumes`.

    Args:
        targets: The cases; their targets do not count.
        dataset: Where they were read from.
        checkpoint: Decides the network, and with it dimensions and channels.
        fit: How an image is brought to the patch.
        patch_size: What the encoder sees.
        options: What is done to every image.
        cache: Folder for the prepared images; by default a temporary one.

    Yields:
        Volumes in the order of the cases, and the patch. They can be read within the `with` block.

    Raises:
        DataError: If an image cannot be used; the row is named.
        UsageError: If options do not fit together.
    """
    source = load_source(checkpoint)
    settings = ClassificationSettings.model_validate({"augment": False})
    with tempfile.TemporaryDirectory() as scratch:
        images = prepare_images(
            targets, dataset, source, None, cache or Path(scratch), patch_size, fit, settings, options or ImageOptions()
        )
        cases = targets.cases
        volumes = volumes_of_store(images.store, ids=[case.name for case in cases])
        # The store of fitted images knows no test split, and the data set is who decides.
        volumes = [
            dataclasses.replace(volume, patient_key=case.patient_key, split=case.split)
            for volume, case in zip(volumes, cases, strict=True)
        ]
        yield volumes, images.patch


def frozen_pair(
    checkpoint: Path, patch: tuple[int, ...], *, control: bool, seed: int, **more: Any
) -> dict[str, Frozen]:
    """Return the encoder as `trained` and, as a control, its untrained twin as `untrained`."""
    names = {"trained": False, **({"untrained": True} if control else {})}
    return {
        name: load_frozen(checkpoint, untrained=untrained, seed=seed, patch_size=patch, **more)
        for name, untrained in names.items()
    }
