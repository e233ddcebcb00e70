"""Whether a method can learn from a store, before anything is trained; and if not, which one near it can."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from medssl import registry
from medssl.augmentation.policy import AugmentationSettings, policy_for
from medssl.config import Settings
from medssl.errors import UsageError
from medssl.preprocessing.store import Store

if TYPE_CHECKING:
    from medssl.pretraining.recipe import PretrainingSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """What a step draws from, as far as methods differ in what they ask of it.

    Args:
        patch_size: What the network sees, (Z, Y, X) or (Y, X).
        batch_size: Samples of a step over all devices.
        shapes: Size (Z, Y, X) of each training volume.
        modalities: What the store holds.
        augmentation: What the user said about augmentation.
    """

    patch_size: tuple[int, ...]
    batch_size: int
    shapes: Sequence[Sequence[int]]
    modalities: frozenset[str]
    augmentation: AugmentationSettings

    @staticmethod
    def of(recipe: PretrainingSettings, store: Store) -> Sample:
        """Return what a recipe draws from a store."""
        train = set(store.ids_of("train"))
        shapes = [row["shape"][1:] for row in store.info["volumes"] if row["id"] in train]
        return Sample(recipe.patch_size, recipe.batch_size, shapes, frozenset(store.modalities), recipe.augmentation)


def check_fitness(name: str, settings: Settings, sample: Sample) -> None:
    """Refuse a method that cannot learn from what a step draws, and warn where it can learn little.

    Args:
        name: A key of `medssl.registry.METHODS`.
        settings: The method's own.
        sample: What a step draws from.

    Raises:
        UsageError: Naming what is missing, what would mend it, and the nearest method that works as things are.
    """
    entry = registry.method(name)
    problem = misfit(name, settings, sample)
    if problem is not None:
        raise UsageError(f"{problem} {_advice(entry, sample)}")
    if sample.batch_size < entry.sensible_batch:
        logger.warning(
            "batch_size %d: %s compares the samples of a batch and learns little from fewer than %d. Raise it, with "
            "smaller patches if memory is short.",
            sample.batch_size, name, entry.sensible_batch,
        )  # fmt: skip


def misfit(name: str, settings: Settings, sample: Sample) -> str | None:
    """Return why a method cannot learn from what a step draws, and what would mend it, or None if it can."""
    entry = registry.method(name)
    dimensions = len(sample.patch_size)
    if dimensions not in entry.dimensions:
        works = " and ".join(f"{number}D" for number in entry.dimensions)
        return f"{name} works in {works}; the patch {list(sample.patch_size)} has {dimensions} dimensions."
    kind = entry.load()
    needs = kind.needs_of(settings)
    if sample.batch_size < needs.least_batch:
        return (
            f"batch_size {sample.batch_size}: {name} compares samples of a batch and needs {needs.least_batch} or more."
        )
    if len(sample.shapes) < needs.least_volumes:
        return (
            f"The store has {len(sample.shapes)} training volume(s); {name} compares volumes and needs "
            f"{needs.least_volumes} or more."
        )
    if needs.whole_patch:
        smallest = [min(sizes) for sizes in zip(*sample.shapes, strict=True)][-dimensions:]
        if any(edge > size for edge, size in zip(sample.patch_size, smallest, strict=True)):
            return (
                f"patch_size {list(sample.patch_size)}: {name} asks where crops lie and needs patches that fit into "
                f"every volume; the smallest edges are {smallest}. Lower patch_size."
            )
    for purpose in kind.purposes(settings):
        policy_for(purpose, sample.modalities, sample.patch_size, sample.augmentation)
    own: str | None = kind.misfit(settings, sample.patch_size, sample.shapes)
    return own


def _advice(entry: registry.Entry, sample: Sample) -> str:
    for name in entry.instead:
        settings = registry.method(name).load_settings()()
        if hasattr(settings, "resolved"):
            settings = settings.resolved(sample.patch_size)
        if misfit(name, settings, sample) is None:
            return f"As things are, --method {name} would work."
    return ""
