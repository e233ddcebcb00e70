"""What a run was made with: versions and hardware, without the name of the machine, a user or a path."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

LIBRARIES = (
    "medssl",
    "torch",
    "lightning",
    "dynamic-network-architectures",
    "nnunetv2",
    "numpy",
    "scipy",
    "blosc2",
    "monai",
    "nibabel",
    "SimpleITK",
    "pydicom",
    "pydantic",
)


def library_versions() -> dict[str, str]:
    """Return the versions of what is installed among the libraries that matter for the numbers."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processors() -> int:
    """Return how many processors this process may use; a container or a queue may give it fewer than all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_environment() -> dict[str, Any]:
    """Return versions, processor and devices as plain values."""
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [{"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)} for device in devices],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "libraries": library_versions(),
    }
