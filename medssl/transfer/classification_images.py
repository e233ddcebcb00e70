"""What a classification run needs to know of its images before its first step: store, network, patch and policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.augmentation.policy import Policy, policy_for
from medssl.data.targets import Targets
from medssl.lock import run_lock
from medssl.networks.architecture import Architecture, architecture
from medssl.preprocessing.store import Store
from medssl.transfer.classification_settings import ClassificationSettings
from medssl.transfer.image_batches import ImageSet
from medssl.transfer.image_fit import choose_patch
from medssl.transfer.images import ImageOptions, fitted_store, input_facts, volume_store
from medssl.transfer.source import Source


@dataclass(frozen=True)
class Images:
    """The images of a run.

    Args:
        store: At the size of the patch, named as the cases.
        plan: The network.
        patch: What it sees.
        policy: Changes training images.
        facts: `input`, `fit`, `modalities` and `spacing_mm`, as a checkpoint keeps them.
        targets: The cases.
    """

    store: Store
    plan: Architecture
    patch: tuple[int, ...]
    policy: Policy
    facts: dict[str, Any]
    targets: Targets

    def of(self, split: str) -> ImageSet:
        """Return the images of one split."""
        return ImageSet(self.store, self.targets.of(split), self.targets, self.plan.dimensions)


def prepare_images(
    targets: Targets,
    dataset: Path,
    template: Source | None,
    network: str | None,
    cache: Path,
    patch_size: tuple[int, ...] | None,
    fit: str,
    settings: ClassificationSettings,
    options: ImageOptions,
) -> Images:
    """Bring the images to the patch; what cannot be used is refused here, before anything is trained.

    Args:
        targets: The cases.
        dataset: Where they were read from.
        template: Checkpoint that decides the network, or None.
        network: Name of the network where there is no such checkpoint.
        cache: Folder for the stores.
        patch_size: What the network sees, or None.
        fit: A key of `medssl.transfer.image_fit.FITS`.
        settings: Whether and how images are augmented.
        options: What is done to every image.

    Raises:
        DataError: If an image cannot be used, or the images do not fit the network.
        UsageError: If the patch does not.
    """
    with run_lock(cache):
        store, ids = volume_store(targets, dataset, cache, options)
        shapes = [store.row(name)["shape"][1:] for name in ids.values()]
        flat = all(shape[0] == 1 for shape in shapes)
        plan = template.architecture if template is not None else architecture(str(network), 2 if flat else 3)
        patch = choose_patch(shapes, plan, patch_size)
        modalities = {str(store.row(name)["modality"]) for name in ids.values()}
        augmentation = settings.augmentation
        if options.modality is not None and augmentation.modality is None:
            # A store brings its own modality; told otherwise, its images are changed as those of the other.
            augmentation = augmentation.model_copy(update={"modality": options.modality})
        policy = policy_for("fine-tuning" if settings.augment else "none", modalities, patch, augmentation)
        front = (1,) * (3 - len(patch))
        fitted = fitted_store(
            store, ids, cache, patch=(*front, *patch), window=(*front, *policy.read_size), fit=fit, options=options
        )
    facts = {
        "input": input_facts(store, options),
        "fit": fit,
        "modalities": sorted(modalities),
        "spacing_mm": (store.info.get("spacing") or {}).get("mm"),
    }
    return Images(fitted, plan, patch, policy, facts, targets)
