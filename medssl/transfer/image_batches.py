"""Batches of whole images with their class: which images a step shows is a function of (seed, step) alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.batch import Batch
from medssl.data.generators import generator
from medssl.data.targets import Case, Targets, carried
from medssl.preprocessing.store import Store
from medssl.transfer.image_fit import place

Sampling = Literal["natural", "balanced"]
#: Images are kept in memory up to this many bytes; those beyond are read from the store each time.
MEMORY = 2 * 2**30


@dataclass
class ImageBatch(Batch):
    """Images with what they show.

    Args:
        target: Class of each image, shape (B,); 0 and 1 for each of several labels, shape (B, K). int64.
    """

    target: Tensor | None = None


class ImageSet:
    """Reads fitted images into windows of one size.

    Args:
        store: What `medssl.transfer.images.fitted_store` returned.
        cases: The cases, named as in the store.
        targets: What the cases show; None for images that are to be seen without it.
        dimensions: 2 or 3.
    """

    def __init__(self, store: Store, cases: Sequence[Case], targets: Targets | None, dimensions: int) -> None:
        self.store, self.cases, self.dimensions = store, list(cases), dimensions
        self._targets = None if targets is None else torch.from_numpy(targets.array(self.cases))
        self._kept: dict[str, NDArray[np.float32]] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def targets(self) -> Tensor:
        """Class of each image, (N,), or 0 and 1 for each label, (N, K); int64."""
        if self._targets is None:
            raise ValueError("These images are to be seen without their classes.")
        return self._targets

    @property
    def channels(self) -> int:
        """Channels of every image."""
        return int(self.store.row(self.cases[0].name)["shape"][0])

    def batch(
        self, rows: Sequence[int], window: Sequence[int], sample_index: Sequence[int] | None = None
    ) -> ImageBatch:
        """Return some images, each in the middle of a window.

        Args:
            rows: Which cases.
            window: Size of the window, 2 or 3 numbers.
            sample_index: Positions in the endless stream; by default the rows.
        """
        three = (1,) * (3 - len(window)) + tuple(window)
        entries = [self.store.entry(self.cases[row].name) for row in rows]
        placed = [place(self._image(entry.id), three, entry.background) for entry in entries]
        image = torch.from_numpy(np.stack([array for array, _, _ in placed]))
        spacing = torch.tensor([entry.spacing_mm for entry in entries])
        return ImageBatch(
            image=image[:, :, 0] if self.dimensions == 2 else image,
            sample_index=torch.tensor(list(rows if sample_index is None else sample_index)),
            sample_id=torch.tensor([entry.number for entry in entries]),
            origin_mm=torch.tensor([first for _, _, first in placed]) * spacing,
            spacing_mm=spacing,
            valid=torch.from_numpy(np.stack([box for _, box, _ in placed])),
            background=torch.tensor([entry.background for entry in entries]),
            modality=tuple(entry.modality for entry in entries),
            patient_key=tuple(entry.patient_key for entry in entries),
            rescale=torch.tensor([entry.rescale for entry in entries]),
            target=None if self._targets is None else self._targets[list(rows)],
        )

    def in_order(self, window: Sequence[int], size: int) -> Iterator[ImageBatch]:
        """Yield all images once, in order."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))), window)

    def _image(self, name: str) -> NDArray[np.float32]:
        if name in self._kept:
            return self._kept[name]
        image = self.store.read(name, (0, 0, 0), self.store.entry(name).shape[1:])
        if self._bytes + image.nbytes <= MEMORY:
            self._kept[name] = image
            self._bytes += image.nbytes
        return image


class ImageOrder:
    """Chooses the image of every sample of an endless stream.

    Args:
        cases: The training cases.
        sampling: `natural`: every pass shows each image once. `balanced`: every class is shown equally often, each of
            its images once before any is shown again; a case of several labels counts for the rarest of them, one
            without labels for a class of its own.
        seed: The run's seed.
    """

    def __init__(self, cases: Sequence[Case], sampling: Sampling, seed: int) -> None:
        self.seed = seed
        self.piles = [np.arange(len(cases))] if sampling == "natural" else _piles(cases)
        self._shuffled = lru_cache(maxsize=4 * len(self.piles) + 4)(self._shuffle)

    def __getitem__(self, sample: int) -> int:
        """Return the number of the case that a sample shows."""
        block, position = divmod(sample, len(self.piles))
        pile = int(self._shuffled("order of classes", block, len(self.piles))[position])
        members = self.piles[pile]
        passed, member = divmod(block, len(members))
        return int(members[self._shuffled(f"order of class {pile}", passed, len(members))[member]])

    def _shuffle(self, name: str, number: int, count: int) -> NDArray[np.int64]:
        return generator(self.seed, number, name).permutation(count)


class ImageLoader:
    """Endless batches for the training loop.

    Args:
        images: Where they come from.
        order: Which images they show.
        window: What is read, 2 or 3 numbers.
        batch_size: Images over all ranks.
        device: Where images and targets are delivered.
        rank: This process among those that train together.
        world: How many train together.
    """

    def __init__(
        self,
        images: ImageSet,
        order: ImageOrder,
        window: Sequence[int],
        batch_size: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.order, self.window = images, order, tuple(window)
        self.batch_size, self.device, self.rank, self.world = batch_size, device, rank, world

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of the steps `start_step` and on, without end."""
        step = start_step
        while True:
            first = step * self.batch_size
            samples = range(first + self.rank, first + self.batch_size, self.world)
            rows = [self.order[sample] for sample in samples]
            yield self.images.batch(rows, self.window, samples).to(self.device, non_blocking=True)
            step += 1


def _piles(cases: Sequence[Case]) -> list[NDArray[np.int64]]:
    frequency = Counter(number for case in cases for number in carried(case))
    piles: dict[int, list[int]] = {}
    for row, case in enumerate(cases):
        rarest = min(carried(case), key=lambda number: (frequency[number], number), default=-1)
        piles.setdefault(rarest, []).append(row)
    return [np.array(piles[number]) for number in sorted(piles)]
