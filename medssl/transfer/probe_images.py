"""The images of a labelled data set as a pretraining sees those of its store, for the probes that look at it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from medssl.data.target_files import read_targets
from medssl.errors import DataError, UsageError
from medssl.preprocessing.store import Store
from medssl.pretraining.looks import LabelledImages
from medssl.pretraining.probes import fewer, most_images
from medssl.pretraining.recipe import PretrainingSettings
from medssl.transfer.image_batches import ImageSet
from medssl.transfer.image_fit import choose_patch
from medssl.transfer.images import ImageOptions, fitted_store, volume_store


def read_labelled(dataset: Path, settings: PretrainingSettings, store: Store) -> LabelledImages:
    """Read at most `probes.cases` training and validation images of a data set at the patch of a recipe.

    They are brought to the voxel size of the store and normalised by its scheme, and whole images are fitted to the
    patch as by `medssl finetune classification`. Statistics of a fingerprint (CT, PET) are their own.

    Args:
        dataset: A CSV of paths, a folder for each class, or a MedMNIST .npz.
        settings: The resolved recipe.
        store: What is pretrained on.

    Raises:
        UsageError: If the store does not say how its images were made.
        DataError: If the data set or an image cannot be used, or has other dimensions than the network.
    """
    targets = read_targets(dataset, ignore_unlabelled=True)
    targets = fewer(targets, most_images(settings, store))
    with tempfile.TemporaryDirectory() as scratch:
        options = _options(store, pictures=targets.source == "npz")
        volumes, ids = volume_store(targets, dataset, Path(scratch), options)
        shapes = [volumes.row(name)["shape"][1:] for name in ids.values()]
        choose_patch(shapes, settings.architecture, settings.patch_size)
        size = (1,) * (3 - len(settings.patch_size)) + settings.patch_size
        fitted = fitted_store(volumes, ids, Path(scratch), patch=size, window=size, fit="whole", options=options)
        if not targets.cases:
            raise DataError(f"{dataset} has neither training nor validation cases.")
        images = ImageSet(fitted, targets.cases, targets, len(settings.patch_size))
        batch = images.batch(range(len(targets.cases)), settings.patch_size)
    return LabelledImages(batch.image.to(torch.float32), targets)


def _options(store: Store, *, pictures: bool) -> ImageOptions:
    normalisation = store.info.get("normalisation")
    if not isinstance(normalisation, str):
        raise UsageError(
            "probes.labels: the store does not say how its images were normalised, so that no other image can be made "
            "alike. Use a store of `medssl preprocess`, or a CSV of labels for volumes of the store."
        )
    spacing = (store.info.get("spacing") or {}).get("mm")
    modalities = store.modalities
    return ImageOptions(
        spacing="native" if pictures or spacing is None else tuple(float(edge) for edge in spacing),
        normalisation=normalisation,
        modality=next(iter(modalities)) if len(modalities) == 1 else None,
        grey=all(int(row["shape"][0]) == 1 for row in store.info["volumes"]),
        workers=0,
        quiet=True,
    )
