"""Batches of nnU-Net's loader as a function of (seed, step): the same after a crash and with any number of workers."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# Cases of small data sets are kept decoded: up to so many voxels (about 0.8 GB with image and label).
VOXELS_TO_KEEP = 2**27


class KeptCases(nnUNetDatasetBlosc2):
    """nnU-Net's data set, which opens and unpickles a case at each draw; here small ones are decoded once.

    Args:
        folder: Folder of preprocessed cases.
        identifiers: The cases.
    """

    def __init__(self, folder: Path, identifiers: Sequence[str]) -> None:
        super().__init__(str(folder), list(identifiers))
        self._kept: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {}
        self._room = VOXELS_TO_KEEP

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Return image, label, None and properties of a case."""
        if identifier in self._kept:
            return self._kept[identifier]
        image, label, before, properties = super().load_case(identifier)
        voxels = math.prod(image.shape)
        if voxels <= self._room:
            self._room -= voxels
            self._kept[identifier] = image[:], label[:], before, properties
            return self._kept[identifier]
        return image, label, before, properties


class StepBatches(Dataset[dict[str, Any]]):
    """Batch number k, drawn with random generators that are seeded by (seed, stream, k).

    nnU-Net's loader and augmentation draw from the global generators of numpy and torch; setting both before each batch
    makes the batch a function of its number.

    Args:
        loader: An `nnUNetDataLoader`.
        seed: The run's seed.
        stream: Separates training from validation, and ranks from each other.
    """

    def __init__(self, loader: Any, seed: int, stream: str) -> None:
        self.loader, self.seed, self.stream = loader, seed, stream

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return the batch of a step."""
        key = hashlib.blake2b(f"{self.seed}|{self.stream}|{step}".encode(), digest_size=8).digest()
        number = int.from_bytes(key, "little")
        random.seed(number)
        np.random.seed(number % 2**32)
        torch.manual_seed(number >> 1)
        batch = self.loader.generate_train_batch()
        return {"data": batch["data"], "target": batch["target"]}

    def stream_from(self, start: int, stop: int, *, workers: int, pin_memory: bool) -> Iterator[dict[str, Any]]:
        """Yield the batches of the steps from `start` to `stop`, made in this process or in workers, in order.

        Workers send arrays through a pipe. Tensors would go through `/dev/shm`, which has 64 MB in a container by
        default: two crops of 128^3 on their way fill it, and the worker ends.
        """
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_size=None,
            sampler=range(start, stop),
            num_workers=workers,
            collate_fn=_arrays if workers else None,
            worker_init_fn=_one_thread,
            prefetch_factor=2 if workers else None,
        )
        for batch in loader:
            yield {name: _tensors(value, pin_memory) for name, value in batch.items()}


def make_repeatable(transforms: Any) -> None:
    """Take the clock out of nnU-Net's augmentation: its blur picks the faster of two algorithms by timing them."""
    for transform in transforms.transforms:
        inner = transform.transform if isinstance(transform, RandomTransform) else transform
        if isinstance(inner, GaussianBlurTransform):
            inner.benchmark = False


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _arrays(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_arrays(item) for item in value]
    return value.numpy() if isinstance(value, Tensor) else value


def _tensors(value: Any, pin_memory: bool) -> Any:
    if isinstance(value, list | tuple):
        return [_tensors(item, pin_memory) for item in value]
    tensor = torch.as_tensor(value)
    return tensor.pin_memory() if pin_memory else tensor


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
