"""Which augmentation a purpose gets on which modality: data in `policies/*.yaml`, built into one callable here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, field_validator
from torch import Tensor

from medssl.augmentation.catalogue import CATALOGUE
from medssl.augmentation.extent import read_size_for
from medssl.augmentation.interop import Library
from medssl.augmentation.libraries import LibrarySettings
from medssl.augmentation.mirror import Laterality, allowed_axes, swap_classes, swap_table
from medssl.augmentation.pairs import pair_shifts
from medssl.augmentation.precision import full_precision
from medssl.augmentation.spatial import Spatial
from medssl.augmentation.spatial_settings import SpatialSettings
from medssl.augmentation.transform import Facts, Parameters, Transform, TransformSettings, to_device
from medssl.config import Settings, check_settings, merged, read_yaml
from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.errors import DataError, UsageError, unknown_name

PURPOSES = ("reconstruction", "restoration", "fine-tuning", "weak", "strong", "contrastive", "none")
# Purposes whose views carry the image before changes of intensity as their target.
WITH_TARGET = frozenset({"reconstruction", "restoration"})


class AugmentationSettings(Settings):
    """What a user can say about augmentation.

    Args:
        laterality: `forbid` never mirrors left and right; `swap-labels` mirrors and exchanges paired classes; `allow`
            mirrors.
        swap_labels: Pairs of classes to exchange, for `swap-labels`.
        modality: Treat every volume as this modality; None believes the store.
        policy: A policy file of one's own instead of the purpose's; the same layout.
        overrides: Values on top of the policy, for example `{spatial: {rotation: {probability: 0}}}`.
        label_interpolation: `nearest`, or `linear` per class as nnU-Net does, slower.
        classes: Number of classes including background, for `linear`.
        check_ranges: Look after every transform whether intensities are finite and in the modality's range. Makes the
            host wait for the device.
    """

    laterality: Laterality = "forbid"
    swap_labels: tuple[tuple[int, int], ...] = ()
    modality: str | None = None
    policy: Path | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    label_interpolation: Literal["nearest", "linear"] = "nearest"
    classes: int = Field(default=0, ge=0)
    check_ranges: bool = False

    @field_validator("swap_labels")
    @classmethod
    def _pairs(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        try:
            swap_table(value)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return value


class PolicySettings(Settings):
    """A policy for one modality, as read from YAML."""

    spatial: SpatialSettings = SpatialSettings()
    intensity: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    library: tuple[LibrarySettings, ...] = ()

    def transforms(self, where: str) -> dict[str, TransformSettings]:
        """Return the settings of each intensity transform, in order."""
        found = {}
        for name, values in self.intensity.items():
            if name not in CATALOGUE:
                raise UsageError(f"{where}: {unknown_name('intensity transform', name, CATALOGUE)}")
            if values is not None:
                found[name] = check_settings(CATALOGUE[name].settings_class, values, f"{where}, {name}")
        return found


class Policy:
    """Makes views of batches.

    Args:
        purpose: What the views are for.
        by_modality: The policy of each modality that may be met.
        patch_size: Spatial size of the views.
        settings: What the user said.
    """

    def __init__(
        self,
        purpose: str,
        by_modality: Mapping[str, PolicySettings],
        patch_size: tuple[int, ...],
        settings: AugmentationSettings,
    ) -> None:
        self.purpose = purpose
        self.patch_size = patch_size
        self.settings = settings
        self.by_modality = {modality: _with_laterality(policy, settings) for modality, policy in by_modality.items()}
        self.spatial = Spatial(
            {modality: policy.spatial for modality, policy in self.by_modality.items()},
            patch_size,
            label_mode=settings.label_interpolation,
            classes=settings.classes,
        )
        self.intensity = _intensity_of(self.by_modality, purpose)
        self.library = Library({name: p.library for name, p in self.by_modality.items()}, purpose, settings.laterality)
        self.read_size = read_size_for(self.spatial)

    def view(self, batch: Batch, draw: Draw, *, shift: Tensor | None = None, place: Draw | None = None) -> View:
        """Make one view of each sample: moved, cut to the patch, then changed in intensity.

        Two policies with the same spatial settings move a sample alike when they are given the same draw.

        Args:
            batch: Crops of `read_size` or any other size; not modified.
            draw: Stream of this view.
            shift: Where the patch lies, in voxels from the middle of the crop, instead of what the policy would draw.
                Shape: (B, 3), int64, on the CPU.
            place: Stream that the spatial part is drawn from, in place of one of `draw`: views that are given the
                same show the same voxels in different intensities.

        Returns:
            For the purposes `WITH_TARGET`, `target` is the image before changes of intensity; it may share memory
            with `image`.

        Raises:
            DataError: If `check_ranges` is set and a transform leaves the range of a modality.
        """
        with torch.no_grad(), full_precision():
            modality = self._known(batch)
            facts = Facts.of(batch, modality, self.patch_size)
            drawn: dict[str, Parameters] = {"spatial": self.spatial.draw(facts, place or draw.child("spatial"))}
            if shift is not None:
                drawn["spatial"]["shift"] = shift
            placed = self.spatial.apply(batch, drawn["spatial"])
            self._check(placed.image, modality, "spatial")
            if self.library:
                drawn["library"] = self.library.draw(facts, draw.child("library"))
                placed = self.library.move(placed, facts, drawn["library"])
            image, target, label = placed.image, None, placed.label
            for transform in self.intensity:
                drawn[transform.name] = transform.draw(facts, draw.child(transform.name))
            if self.purpose in WITH_TARGET:
                target = image
                if any(bool(drawn[transform.name]["active"].any()) for transform in self.intensity):
                    image = image.clone()
            if self.library:
                image, label = self.library.change(image, label, facts, drawn["library"])
                self._check(image, modality, "library")
            for transform in self.intensity:
                image = transform.apply_(image, drawn[transform.name])
                self._check(image, modality, transform.name)
            if label is not None and self.settings.laterality == "swap-labels":
                label = swap_classes(label, drawn["spatial"]["mirror"][:, 2], self.settings.swap_labels)
        return View(
            image=image,
            inside=placed.inside,
            to_source_mm=placed.to_source_mm,
            displacement_mm=placed.displacement_mm,
            target=target,
            label=label,
            parameters=drawn,
            sample_id=to_device(batch.sample_id, image.device),
            extent_mm=None if batch.extent_mm is None else to_device(batch.extent_mm, image.device),
        )

    def two(self, batch: Batch, draw: Draw) -> Views:
        """Make two views of each sample, drawn apart."""
        return [self.view(batch, draw.child("first")), self.view(batch, draw.child("second"))]

    def pair(self, batch: Batch, draw: Draw, overlap: tuple[float, float]) -> Views:
        """Make two views of each sample whose boxes share a drawn part of their volume; the rest is drawn apart.

        The boxes are those before turning and scaling. `spatial.shift` bounds how far apart they can lie, and with it
        `read_size`: at least the product of 1 - 2 shift over the axes is shared.

        Args:
            batch: Crops of `read_size` or larger.
            draw: Stream of the pair.
            overlap: Smallest and largest volume of the intersection, relative to the patch's.

        Raises:
            UsageError: If the range is out of reach of `spatial.shift`, or the crops are too small.
        """
        facts = Facts.of(batch, self._known(batch), self.patch_size)
        first, second = pair_shifts(self.spatial, batch, facts, draw.child("pair"), overlap)
        return [
            self.view(batch, draw.child("first"), shift=first),
            self.view(batch, draw.child("second"), shift=second),
        ]

    def sibling(self, purpose: str) -> Policy:
        """Return the policy of another purpose for the same modalities, patch and settings.

        Raises:
            UsageError: If there is no such purpose.
        """
        return policy_for(purpose, self.by_modality, self.patch_size, self.settings)

    def described(self) -> dict[str, Any]:
        """Return the resolved policy of each modality, for a recipe."""
        return {modality: policy.model_dump(mode="json") for modality, policy in self.by_modality.items()}

    def _known(self, batch: Batch) -> tuple[str, ...]:
        if self.settings.modality is not None:
            return (next(iter(self.by_modality)),) * len(batch)
        names = tuple(known_modality(name) for name in batch.modality)
        for name in names:
            if name not in self.by_modality:
                raise UsageError(
                    f"The batch holds {name}, the policy was made for {', '.join(sorted(self.by_modality))}: name all "
                    "modalities of the store to policy_for."
                )
        return names

    def _check(self, image: torch.Tensor, modality: tuple[str, ...], transform: str) -> None:
        if not self.settings.check_ranges:
            return
        flat = image.flatten(1)
        smallest, largest = flat.amin(dim=1).tolist(), flat.amax(dim=1).tolist()
        for name, low, high in zip(modality, smallest, largest, strict=True):
            bounds = _modalities()[name]["range"]
            # Also true for NaN, which compares with nothing.
            if not (low >= bounds[0] and high <= bounds[1]):
                raise DataError(
                    f"After the transform '{transform}' a {name} sample spans {low:g} to {high:g}; normalised "
                    f"{name} lies in {bounds[0]} to {bounds[1]}. Look at the volume's normalisation or the policy."
                )


def policy_for(
    purpose: str, modalities: Iterable[str], patch_size: Iterable[int], settings: AugmentationSettings | None = None
) -> Policy:
    """Build the policy of a purpose.

    Args:
        purpose: One of `PURPOSES`.
        modalities: All modalities that the store holds; `settings.modality` overrules them.
        patch_size: Spatial size of the views, 2 or 3 numbers.
        settings: What the user said; all defaults where None.

    Raises:
        UsageError: If the purpose, a modality or a name in a policy is unknown; near names are listed.
    """
    settings = settings or AugmentationSettings()
    if purpose not in PURPOSES:
        raise unknown_name("augmentation purpose", purpose, PURPOSES)
    if settings.modality is not None:
        modalities = {settings.modality}
    names = sorted({known_modality(name) for name in modalities})
    if not names:
        raise UsageError("A policy needs the modalities it is for: the store names none. Set augmentation.modality.")
    if settings.label_interpolation == "linear" and settings.classes < 2:
        raise UsageError("label_interpolation linear needs classes, the number of classes with background (2 or more).")
    where = str(settings.policy or f"policy {purpose}")
    content = read_yaml(settings.policy) if settings.policy else _packaged(purpose)
    return Policy(
        purpose,
        {name: _resolved(content, name, settings.overrides, where) for name in names},
        tuple(int(edge) for edge in patch_size),
        settings,
    )


def known_modality(name: str) -> str:
    """Return the policies' name of a modality, for example `MR` for `mri`.

    Raises:
        UsageError: If it is unknown; near names are listed.
    """
    table = _aliases()
    if name.strip().upper() not in table:
        error = unknown_name("modality", name, table)
        raise UsageError(f"{error} Set augmentation.modality to the one that the volumes are to be treated as.")
    return table[name.strip().upper()]


def list_policies() -> list[dict[str, str]]:
    """Return purpose and modality of every packaged policy, with what each has of its own, for `medssl list`."""
    rows = []
    for purpose in PURPOSES:
        content = _packaged(purpose)
        for modality, about in _modalities().items():
            policy = _resolved(content, modality, {}, f"policy {purpose}")
            spatial = policy.spatial
            moves = [
                name for name in ("rotation", "scale", "elastic", "mirror") if getattr(spatial, name).probability > 0
            ]
            changes = list(policy.transforms(purpose))
            rows.append(
                {
                    "purpose": purpose,
                    "modality": modality,
                    "title": about["title"],
                    "transforms": ", ".join(moves + changes) or "none",
                }
            )
    return rows


def _resolved(content: Mapping[str, Any], modality: str, overrides: Mapping[str, Any], where: str) -> PolicySettings:
    values = {name: value for name, value in content.items() if name != "modalities"}
    own = content.get("modalities") or {}
    for name in own:
        if name not in _modalities():
            raise UsageError(f"{where}: {unknown_name('modality', name, _modalities())}")
    values = merged(merged(values, own.get(modality) or {}), overrides)
    policy = check_settings(PolicySettings, values, where)
    for name, settings in policy.transforms(where).items():
        if settings.probability > 0 and not CATALOGUE[name].fits(modality):
            raise UsageError(
                f"{where}: {name} is never applied to {modality}. Remove it (`{name}: null`) for {modality}."
            )
    return policy


def _with_laterality(policy: PolicySettings, settings: AugmentationSettings) -> PolicySettings:
    mirror = policy.spatial.mirror
    chosen = allowed_axes(mirror.axes if mirror.probability > 0 else (), settings.laterality, settings.swap_labels)
    axes = tuple(axis for axis in mirror.axes if axis in chosen)
    spatial = policy.spatial.model_copy(update={"mirror": mirror.model_copy(update={"axes": axes})})
    return policy.model_copy(update={"spatial": spatial})


def _intensity_of(by_modality: Mapping[str, PolicySettings], where: str) -> list[Transform[Any]]:
    settings = {modality: policy.transforms(where) for modality, policy in by_modality.items()}
    order = list(dict.fromkeys(name for of_one in settings.values() for name in of_one))
    order.sort(key=list(CATALOGUE).index)
    return [
        CATALOGUE[name]({modality: of_one[name] for modality, of_one in settings.items() if name in of_one})
        for name in order
        if any(name in of_one and of_one[name].probability > 0 for of_one in settings.values())
    ]


@cache
def _packaged(name: str) -> dict[str, Any]:
    text = resources.files("medssl.augmentation").joinpath("policies", f"{name}.yaml").read_text()
    content: dict[str, Any] = yaml.safe_load(text)
    return content


@cache
def _modalities() -> dict[str, dict[str, Any]]:
    return _packaged("modalities")


@cache
def _aliases() -> dict[str, str]:
    table = {}
    for name, about in _modalities().items():
        table.update(dict.fromkeys((name, *about["aliases"]), name))
    return table
