"""Batches reach the training process through pipes, whatever their shape."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from medssl.transfer import batches
from medssl.transfer.batches import StepBatches


class Loader:
    """Stands in for nnU-Net's: an image, and a target at two scales."""

    def generate_train_batch(self) -> dict[str, Any]:
        """Return numbers of torch's own generator."""
        image = torch.rand(2, 1, 4, 4, 4)
        return {"data": image, "target": [image > 0.5, (image > 0.5)[..., ::2, ::2, ::2]], "keys": ["a", "b"]}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


def test_batches_of_workers_are_those_of_this_process_and_none_goes_through_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = StepBatches(Loader(), 0, "train/0")
    here = list(steps.stream_from(3, 6, workers=0, pin_memory=False))

    # Workers are forked: what is patched here holds in them too, and they count into this process's memory.
    shared = multiprocessing.Value("i", 0)

    def count(original: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            with shared.get_lock():
                shared.value += 1
            return original(*arguments)

        return counted

    for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
        monkeypatch.setattr(torch.UntypedStorage, name, count(getattr(torch.UntypedStorage, name)))
    there = list(steps.stream_from(3, 6, workers=1, pin_memory=False))
    assert len(here) == len(there) == 3 and here[0].keys() == {"data", "target"}
    assert all(same(a[name], b[name]) for a, b in zip(here, there, strict=True) for name in a)
    assert shared.value == 0
    monkeypatch.setattr(batches, "_arrays", lambda value: value)
    list(steps.stream_from(3, 6, workers=1, pin_memory=False))
    assert shared.value > 0
