"""Endless batches of crops: the batch of step k depends on the seed and k alone, not on workers, ranks or restarts.

Workers only read. With workers, steps are read ahead by reader processes (`medssl.data.pool`); without, in place. On
CUDA a batch goes through page-locked memory to the device on a stream of its own while the step before it computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from medssl.data.batch import Batch
from medssl.data.dataset import BatchArrays, CropReader
from medssl.data.pool import ReaderPool
from medssl.data.sampling import CropSettings, Split
from medssl.errors import MedsslError, UsageError
from medssl.preprocessing.store import Store

# Steps being read or waiting to be taken: one to hand out next, two to even out slow reads.
STEPS_AHEAD = 3


class CropLoader:
    """Batches of crops from a store.

    Args:
        store: Where the volumes are.
        settings: How crops are cut.
        seed: The run's seed.
        workers: Reader processes; 0 reads in this process.
        rank: This process among those that train together.
        world: How many train together.
        device: Where images and labels are delivered; the facts of a batch stay on the CPU.
        split: Which volumes are used.

    Raises:
        DataError: If no volume fits.
        UsageError: If the batch cannot be divided among the ranks, or `workers` is negative.
    """

    def __init__(
        self,
        store: Store,
        settings: CropSettings,
        *,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        split: Split = "train",
    ) -> None:
        if workers < 0:
            raise UsageError(f"--workers takes 0 or more, got {workers}.")
        self.settings = settings
        self.seed = seed
        self.split: Split = split
        self.device = torch.device(device)
        self._reader = CropReader(store, settings, seed=seed, split=split, rank=rank, world=world)
        # A part of the batch is at least one group: more readers than groups would have nothing to do.
        self._workers = min(workers, self._reader.samples // settings.crops_per_volume)
        self._pool: ReaderPool | None = None
        self._use = 0
        self._next_step = 0

    @property
    def volumes(self) -> list[str]:
        """Ids of the volumes that crops come from."""
        return self._reader.sampler.volumes

    @property
    def channels(self) -> int:
        """Channels of every crop."""
        return self._reader.sampler.channels

    @property
    def samples(self) -> int:
        """Samples of a batch on this rank."""
        return self._reader.samples

    @property
    def reader_processes(self) -> list[int]:
        """Ids of the reader processes; empty before the first batch and without workers."""
        return [] if self._pool is None else self._pool.process_ids

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of the steps `start_step`, `start_step + 1`, ... without end.

        A second call takes over the readers; the iterator before it must not be used any more.
        """
        self._use += 1
        arrays = self._read_ahead(start_step, self._use) if self._workers else self._read_here(start_step)
        if self.device.type == "cuda":
            return self._through_stream(arrays)
        return (self._batch(content) for content in arrays)

    def close(self) -> None:
        """End the reader processes; the next call of `batches` starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_here(self, step: int) -> Iterator[BatchArrays]:
        """Yield the arrays of each step; they are overwritten after the next item was asked for."""
        content = BatchArrays(*self._reader.layout())
        while True:
            self._reader.read(step, content)
            yield content
            step += 1

    def _read_ahead(self, step: int, use: int) -> Iterator[BatchArrays]:
        """Yield the arrays of each step; they are overwritten after the next item was asked for."""
        pool = self._started_pool()
        try:
            pool.drain()
            for ahead in range(STEPS_AHEAD):
                pool.submit(step + ahead)
            while True:
                content = pool.wait(step)
                self._next_step = step + 1
                yield content
                if use != self._use:
                    raise UsageError(
                        "This iterator of batches was replaced by a newer one of the same loader: use that one."
                    )
                # Only now is the slot of `step` free: its user has copied it and asks for more.
                pool.submit(step + STEPS_AHEAD)
                step += 1
        except (MedsslError, OSError):
            if use == self._use:
                self.close()
            raise

    def _next_is_there(self) -> bool:
        """Tell whether the next batch can be had without waiting for another process."""
        return self._pool is None or self._pool.ready(self._next_step)

    def _started_pool(self) -> ReaderPool:
        if self._pool is None:
            reader = self._reader
            start = {
                "store": str(reader.store.folder.resolve()),
                "settings": self.settings.model_dump(mode="json"),
                "seed": self.seed,
                "split": self.split,
                "rank": reader.rank,
                "world": reader.world,
            }
            self._pool = ReaderPool(start, workers=self._workers, layout=reader.layout(), slots=STEPS_AHEAD)
        return self._pool

    def _batch(self, content: BatchArrays, *, pin: bool = False) -> Batch:
        """Copy the arrays into a batch of their own."""
        rows = [self._reader.store.row(self.volumes[position]) for position in content.facts["volume"]]
        flat = self.settings.dimensions == 2
        image = _tensor(content.image[:, :, 0] if flat else content.image, torch.float32, pin)
        label = None
        if content.label is not None:
            # To a device labels travel as they are stored, a quarter of the bytes; it widens them itself.
            label = _tensor(content.label[:, 0] if flat else content.label, torch.int16 if pin else torch.int64, pin)
        facts = content.facts
        return Batch(
            image=image,
            sample_index=torch.from_numpy(facts["sample_index"].copy()),
            sample_id=torch.from_numpy(facts["sample_id"].copy()),
            origin_mm=torch.from_numpy(facts["origin_mm"].copy()),
            spacing_mm=torch.from_numpy(facts["spacing_mm"].copy()),
            valid=torch.from_numpy(facts["valid"].copy()),
            background=torch.from_numpy(facts["background"].copy()),
            modality=tuple(str(row["modality"]) for row in rows),
            patient_key=tuple(str(row["patient_key"]) for row in rows),
            label=label,
            rescale=torch.from_numpy(facts["rescale"].copy()),
            extent_mm=torch.from_numpy(facts["extent_mm"].copy()),
        )

    def _through_stream(self, arrays: Iterator[BatchArrays]) -> Iterator[Batch]:
        """Copy to the device on an own stream, one batch ahead of the one in use where it is already read."""
        stream = torch.cuda.Stream(self.device)
        on_their_way: deque[tuple[Batch, torch.cuda.Event]] = deque()
        while True:
            while not on_their_way or (len(on_their_way) < 2 and self._next_is_there()):
                pinned = self._batch(next(arrays), pin=True)
                with torch.cuda.stream(stream):
                    batch = pinned.to(self.device, non_blocking=True)
                    if batch.label is not None:
                        batch.label = batch.label.long()
                    arrived = torch.cuda.Event()
                    arrived.record(stream)
                on_their_way.append((batch, arrived))
                del pinned, batch
            # No name here holds on to what is handed out: its memory is free as soon as its user lets go.
            yield _arrived(*on_their_way.popleft())


def _arrived(batch: Batch, event: torch.cuda.Event) -> Batch:
    """Let the stream that computes wait for a batch; the host does not."""
    current = torch.cuda.current_stream(batch.image.device)
    current.wait_event(event)
    for tensor in (batch.image, batch.label):
        if tensor is not None:
            # The memory belongs to the copying stream: it must not be reused while this one computes with it.
            tensor.record_stream(current)
    return batch


def _tensor(values: np.ndarray, dtype: torch.dtype, pin: bool) -> Tensor:
    result = torch.empty(values.shape, dtype=dtype, pin_memory=pin)
    result.copy_(torch.from_numpy(values))
    return result
