"""TorchIO's and MONAI's transforms in a policy: one sample at a time on the CPU, off the fast path, at a known cost.

A policy lists them beside `spatial` and `intensity`:

```yaml
library:
  - {transform: torchio.RandomGhosting, probability: 0.1, arguments: {num_ghosts: [4, 10]}}
  - {transform: monai.transforms.RandGibbsNoised, probability: 0.1, arguments: {alpha: [0.2, 0.6]}}
```

They come after the spatial step and before our intensity transforms: first those that move anatomy, then the others,
each in the order of the list. Both libraries meet an image as their own readers would give it, (C, X, Y, Z) in RAS+
with its voxel size, so that arguments that name axes mean what their documentation says. A 2D image has one slice along
Z for TorchIO and is (C, X, Y) for MONAI.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl.augmentation.libraries import FAILURES, LibrarySettings, build, find_class, mirrors, moves
from medssl.augmentation.mirror import Laterality
from medssl.augmentation.spatial import Placed
from medssl.augmentation.transform import Facts, Parameters, to_device
from medssl.data.draw import Draw
from medssl.errors import DataError, UsageError

logger = logging.getLogger(__name__)

# Purposes whose methods ask where in the body a voxel of a view lies.
USES_POSITIONS = frozenset({"contrastive"})
# Batches after which the measured cost is told.
BATCHES_BEFORE_COST = 3


class LibraryTransform:
    """A transform of TorchIO or MONAI on one sample, and what it has cost so far.

    Args:
        settings: The policy's entry.

    Attributes:
        moves: Whether it moves anatomy, so that the label has to move along.
        mirrors: Whether it mirrors or exchanges axes.
        seconds: Time that was spent in it.
        changed: Samples that went through it.

    Raises:
        UsageError: If the name is not a transform that a policy may hold, or if the arguments do not fit.
    """

    def __init__(self, settings: LibrarySettings) -> None:
        self.name = settings.transform
        self.probability = settings.probability
        self.seconds = 0.0
        self.changed = 0
        kind = find_class(settings.transform)
        self.is_monai = kind.__module__.startswith("monai.")
        self.moves, self.mirrors = moves(kind), mirrors(kind)
        self.transform = build(kind, settings)

    @property
    def milliseconds(self) -> float:
        """Mean time per changed sample; NaN before the first."""
        return 1000 * self.seconds / self.changed if self.changed else float("nan")

    def __call__(
        self, image: Tensor, label: Tensor | None, spacing_mm: Sequence[float], seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return the changed image and label; the given ones are not modified.

        Args:
            image: Shape: (C, Z, Y, X) or (C, Y, X), floating, on the CPU.
            label: Shape: (K, Z, Y, X) or (K, Y, X), int64, on the CPU.
            spacing_mm: Voxel size (z, y, x).
            seed: Of this sample's randomness, below 2^32.

        Raises:
            UsageError: If the shape is another one afterwards.
            DataError: If the library's transform fails.
        """
        started = time.perf_counter()
        try:
            with _seeded(seed):
                run = self._run_monai if self.is_monai else self._run_torchio
                after = run(image if image.dtype == torch.float64 else image.float(), label, spacing_mm, seed)
        except FAILURES as error:
            raise DataError(
                f"{self.name} failed on an image of shape {tuple(image.shape)}: {' '.join(str(error).split())} "
                "Check its arguments in the policy's library list and the volume, or remove it."
            ) from error
        results = []
        for before, tensor in zip((image, label), after, strict=True):
            if before is not None and (tensor is None or tensor.shape != before.shape):
                found = "removed" if tensor is None else f"changed to {tuple(tensor.shape)}"
                raise UsageError(
                    f"{self.name}: the shape {tuple(before.shape)} was {found}. A patch keeps its size: remove the "
                    "transform from the policy's library list."
                )
            results.append(None if before is None or tensor is None else tensor.to(before.dtype))
        self.seconds += time.perf_counter() - started
        self.changed += 1
        moved_image, moved_label = results
        assert moved_image is not None
        return moved_image, moved_label

    def _run_torchio(
        self, image: Tensor, label: Tensor | None, spacing_mm: Sequence[float], seed: int
    ) -> tuple[Tensor | None, Tensor | None]:
        import torchio

        affine = np.diag([*reversed(spacing_mm), 1.0])
        flat = image.ndim == 3
        images: dict[str, Any] = {"image": torchio.ScalarImage(tensor=_to_xyz(image, flat), affine=affine)}
        if label is not None:
            images["label"] = torchio.LabelMap(tensor=_to_xyz(label, flat), affine=affine)
        subject = self.transform(torchio.Subject(images))
        return tuple(  # type: ignore[return-value]
            _from_xyz(subject[name].data, flat) if name in subject else None for name in ("image", "label")
        )

    def _run_monai(
        self, image: Tensor, label: Tensor | None, spacing_mm: Sequence[float], seed: int
    ) -> tuple[Tensor | None, Tensor | None]:
        from monai.data import MetaTensor

        affine = torch.diag(torch.tensor([*reversed(spacing_mm), 1.0], dtype=torch.float64))
        given = {"image": image} if label is None else {"image": image, "label": label}
        data = {name: MetaTensor(_to_xyz(tensor, False), affine=affine.clone()) for name, tensor in given.items()}
        if hasattr(self.transform, "set_random_state"):
            self.transform.set_random_state(seed)
        result = self.transform(data)
        return tuple(  # type: ignore[return-value]
            _from_xyz(_plain(result[name]), False) if name in result else None for name in ("image", "label")
        )


class Library:
    """The library transforms of a policy.

    Args:
        by_modality: The entries of each modality that the policy meets.
        purpose: What the views are for.
        laterality: What the user said about mirroring.

    Raises:
        UsageError: If an entry does not exist, does not fit its arguments, moves anatomy where positions are used, or
            mirrors where the laterality policy does not allow it.
    """

    def __init__(
        self, by_modality: Mapping[str, Sequence[LibrarySettings]], purpose: str, laterality: Laterality
    ) -> None:
        self.by_modality = {
            modality: [LibraryTransform(entry) for entry in entries] for modality, entries in by_modality.items()
        }
        self.longest = max((len(entries) for entries in self.by_modality.values()), default=0)
        self._batches = 0
        self._told = False
        for transform in self.transforms:
            if transform.moves and purpose in USES_POSITIONS:
                raise UsageError(
                    f"library: {transform.name} moves anatomy, and where it went is not known to us; the purpose "
                    f"{purpose} needs positions. Use the policy's spatial section, or another transform."
                )
            if transform.mirrors and laterality != "allow":
                raise UsageError(
                    f"library: {transform.name} mirrors or swaps axes, which laterality {laterality} does not let a "
                    "library do. Use the policy's spatial.mirror, which knows left and right, or laterality allow."
                )

    def __len__(self) -> int:
        return self.longest

    @property
    def transforms(self) -> list[LibraryTransform]:
        """All of them."""
        return [transform for entries in self.by_modality.values() for transform in entries]

    def costs(self) -> dict[str, float]:
        """Return the mean milliseconds per changed sample of each transform; NaN where there was none."""
        spent: dict[str, tuple[float, int]] = {}
        for transform in self.transforms:
            seconds, changed = spent.get(transform.name, (0.0, 0))
            spent[transform.name] = seconds + transform.seconds, changed + transform.changed
        return {name: 1000 * s / changed if changed else float("nan") for name, (s, changed) in spent.items()}

    def draw(self, facts: Facts, rng: Draw) -> Parameters:
        """Draw who is changed and with which seed.

        Returns:
            `active` (B, N) bool and `seed` (B, N) int64, for the N entries of the list.
        """
        # A stream for each place in the list: an entry that is added behind changes nothing before it.
        streams = [rng.child(place) for place in range(self.longest)]
        active = torch.stack([stream.uniform(0, 1) for stream in streams], dim=1)
        seed = torch.stack([stream.integers(0, 2**32) for stream in streams], dim=1)
        chance = torch.zeros(len(facts), self.longest)
        for row, modality in enumerate(facts.modality):
            for column, transform in enumerate(self.by_modality.get(modality, ())):
                chance[row, column] = transform.probability
        return {"active": active < chance, "seed": seed}

    def move(self, placed: Placed, facts: Facts, parameters: Parameters) -> Placed:
        """Apply what moves anatomy; where it went is not known, so that `to_source_mm` becomes NaN."""
        if not any(self._chosen(row, facts, parameters, moving=True) for row in range(len(facts))):
            return placed
        # What shows the volume moves like a class of the label.
        inside = placed.inside.long()
        label = inside if placed.label is None else torch.cat([placed.label[:, None], inside], dim=1)
        image, moved, rows = self._applied(placed.image, label, facts, parameters, moving=True)
        assert moved is not None
        which = to_device(rows, placed.to_source_mm.device).reshape(-1, 1, 1)
        return dataclasses.replace(
            placed,
            image=image,
            inside=moved[:, -1:] > 0,
            label=None if placed.label is None else moved[:, 0],
            to_source_mm=placed.to_source_mm.masked_fill(which, float("nan")),
        )

    def change(
        self, image: Tensor, label: Tensor | None, facts: Facts, parameters: Parameters
    ) -> tuple[Tensor, Tensor | None]:
        """Apply what leaves anatomy in its place, and tell the cost once it is known.

        Returns:
            Image and label, the given ones where nobody was changed; they are not modified.
        """
        channel = None if label is None else label[:, None]
        image, changed, _ = self._applied(image, channel, facts, parameters, moving=False)
        self._tell_cost()
        return image, None if changed is None else changed[:, 0]

    def _chosen(
        self, row: int, facts: Facts, parameters: Parameters, moving: bool
    ) -> list[tuple[LibraryTransform, int]]:
        """Return what was drawn for a sample, with its seeds: what moves anatomy, or what leaves it in its place."""
        entries = self.by_modality.get(facts.modality[row], ())
        drawn = zip(entries, parameters["active"][row].tolist(), parameters["seed"][row].tolist(), strict=False)
        return [(transform, seed) for transform, active, seed in drawn if active and transform.moves == moving]

    def _applied(
        self, image: Tensor, label: Tensor | None, facts: Facts, parameters: Parameters, *, moving: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        rows = torch.zeros(len(facts), dtype=torch.bool)
        before = image
        for row in range(len(facts)):
            chosen = self._chosen(row, facts, parameters, moving)
            if not chosen:
                continue
            if image is before:
                image, label = image.clone(), None if label is None else label.clone()
            rows[row] = True
            one, mask = image[row].cpu(), None if label is None else label[row].cpu()
            for transform, seed in chosen:
                one, mask = transform(one, mask, facts.spacing_mm[row].tolist(), seed)
            image[row] = one.to(image.device)
            if label is not None and mask is not None:
                label[row] = mask.to(label.device)
        return image, label, rows

    def _tell_cost(self) -> None:
        self._batches += 1
        if self._told or self._batches < BATCHES_BEFORE_COST or not any(t.changed for t in self.transforms):
            return
        self._told = True
        known = ", ".join(f"{name} {cost:.1f} ms" for name, cost in self.costs().items() if cost == cost)
        logger.warning("Library transforms run off the fast path, sample by sample on the CPU: %s per sample.", known)


def _to_xyz(tensor: Tensor, add_slice: bool) -> Tensor:
    """Return a copy with the axes (C, X, Y, Z) or (C, X, Y)."""
    turned = tensor.permute(0, *range(tensor.ndim - 1, 0, -1))
    return (turned[..., None] if add_slice else turned).clone(memory_format=torch.contiguous_format)


def _from_xyz(tensor: Tensor, drop_slice: bool) -> Tensor:
    tensor = tensor[..., 0] if drop_slice and tensor.shape[-1] == 1 else tensor
    return tensor.permute(0, *range(tensor.ndim - 1, 0, -1))


def _plain(value: Any) -> Tensor:
    return value.as_tensor() if hasattr(value, "as_tensor") else torch.as_tensor(value)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which the libraries draw from, and leave them as they were.

    Not by `torch.manual_seed`, which would seed the GPUs' generators too.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
