"""A queue of rows from earlier steps, as buffers: it travels with a checkpoint and never makes the host wait."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: What an entry has for a volume before it is filled.
NO_VOLUME = -1


class Queue(nn.Module):
    """The last rows that were offered, each with the volume that it came from; the newest take the place of the oldest.

    He et al., CVPR 2020 (MoCo). Unlike theirs, its length need not be a multiple of the batch: it is written round the
    end. Rows are offered while losses are computed and taken in after the step, so that a loss sees the queue as the
    last step left it, also where several batches make one step. Rows of all ranks must be offered, in the order that
    `medssl.training.distributed.gather` gives, so that every rank holds the same queue.

    Args:
        length: Rows that it holds.
        width: Features of a row.

    Attributes:
        rows: Shape: (length, width), float32; zero where nothing is yet.
        volumes: Number of the volume of each row, -1 where nothing is yet. Shape: (length,), int64.
        position: Where the next row goes. Scalar, int64.
        count: How many rows are filled, from the start on. Scalar, int64.
    """

    rows: Tensor
    volumes: Tensor
    position: Tensor
    count: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(length, width))
        self.register_buffer("volumes", torch.full((length,), NO_VOLUME))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._offered: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def filled(self) -> Tensor:
        """True where there is a row. Shape: (length,), bool."""
        return torch.arange(len(self), device=self.count.device) < self.count

    @property
    def full(self) -> Tensor:
        """Whether every place is filled. Scalar, bool, on the device."""
        return self.count == len(self)

    def offer(self, rows: Tensor, volumes: Tensor | None = None) -> None:
        """Hold rows ready for the end of the step; not while a method is only looked at, in `eval` mode.

        Args:
            rows: Rows of all ranks. Shape: (N, width).
            volumes: Their volumes, where somebody asks for them. Shape: (N,), int64.

        Raises:
            ValueError: If the shapes do not fit the queue or each other.
        """
        if volumes is None:
            volumes = torch.full((len(rows),), NO_VOLUME, device=rows.device)
        if rows.ndim != 2 or rows.shape[1] != self.rows.shape[1] or volumes.shape != rows.shape[:1]:
            raise ValueError(
                f"A queue of width {self.rows.shape[1]} takes rows (N, {self.rows.shape[1]}) with one volume each, "
                f"got {tuple(rows.shape)} and {tuple(volumes.shape)}"
            )
        if self.training:
            self._offered.append((rows.detach(), volumes))

    @torch.no_grad()
    def take_in(self) -> None:
        """Write what was offered since the last call; called after the optimiser's step."""
        for rows, volumes in self._offered:
            # Of a batch longer than the queue only the end would stay; to write a place twice would be undefined.
            rows, volumes = rows[-len(self) :], volumes[-len(self) :]
            places = (self.position + torch.arange(len(rows), device=rows.device)) % len(self)
            self.rows.index_copy_(0, places, rows.to(self.rows.dtype))
            self.volumes.index_copy_(0, places, volumes)
            self.position.add_(len(rows)).remainder_(len(self))
            self.count.add_(len(rows)).clamp_(max=len(self))
        self._offered.clear()
