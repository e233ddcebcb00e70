"""Clocks, batches and memory for `_gpu_sections.py`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from medssl.data.batch import Batch

# A batch that does not fit is tried again smaller.
SMALLER = (8, 6, 4, 2, 1)
WARM_UP = 4


def synthetic_batch(
    size: Sequence[int], samples: int, device: str, *, modality: str = "MR", labels: bool = False
) -> Batch:
    """Return smooth noise on the device."""
    coarse = torch.randn(samples, 1, *(max(edge // 8, 2) for edge in size), device=device)
    image = F.interpolate(coarse, tuple(size), mode="trilinear")
    return Batch(
        image=image,
        sample_index=torch.arange(samples),
        sample_id=torch.arange(samples),
        origin_mm=torch.zeros(samples, 3),
        spacing_mm=torch.ones(samples, 3),
        valid=torch.tensor([[[0, edge] for edge in size]]).repeat(samples, 1, 1),
        background=torch.full((samples,), -2.0),
        modality=(modality,) * samples,
        patient_key=("",) * samples,
        label=(image[:, 0] > 0).long() if labels else None,
        rescale=torch.tensor([[40.0, 250.0]]).repeat(samples, 1),
    )


def throughput(prepared: Callable[[int], Callable[[], Any]], batch: int, device: str, seconds: float) -> dict[str, Any]:
    """Time a step at the largest batch that fits, and take the peak of memory.

    Args:
        prepared: Makes the step for a number of samples.
        batch: The number wished for.
        device: `cuda` or `cpu`.
        seconds: How long to measure.
    """
    for samples in (batch, *(smaller for smaller in SMALLER if smaller < batch)):
        try:
            return _one_size(prepared(samples), samples, device, seconds)
        except torch.cuda.OutOfMemoryError:
            print(f"{samples} samples do not fit", flush=True)
        # Here the error is gone, and with it what its frames held.
        gc.collect()
        torch.cuda.empty_cache()
    return {"failed": "not even one sample fits"}


def _one_size(once: Callable[[], Any], samples: int, device: str, seconds: float) -> dict[str, Any]:
    began = time.perf_counter()
    once()
    wait_for(device)
    first = time.perf_counter() - began
    for _ in range(WARM_UP - 1):
        once()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    passed = mean_seconds(once, device, seconds)
    return {
        "batch": samples, "ms": 1000 * passed, "samples per s": samples / passed,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0, "first step s": first,
    }  # fmt: skip


def mean_seconds(once: Callable[[], Any], device: str, seconds: float, *, ahead: int = 0) -> float:
    """Return the mean time of a call, after `ahead` calls that are not counted."""
    for _ in range(ahead):
        once()
    wait_for(device)
    together = 5 if device == "cuda" else 1
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < seconds:
        for _ in range(together):
            once()
        count += together
        # The host is far ahead of the device: without a look now and then it would go on much too long.
        wait_for(device)
    return (time.perf_counter() - began) / count


def host_waits(once: Callable[[], Any], device: str) -> str:
    """Tell whether anything in a call made the host wait for the device."""
    if device != "cuda":
        return "not on a GPU"
    wait_for(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "never"


def wait_for(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
