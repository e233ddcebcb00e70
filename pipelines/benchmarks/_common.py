"""What all benchmarks share: the machine's description, the printed table, the JSON of results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medssl.files import write_json

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    "medssl",
    "torch",
    "numpy",
    "scipy",
    "monai",
    "nnunetv2",
    "dynamic-network-architectures",
    "pydicom",
    "nibabel",
    "SimpleITK",
    "torchio",
    "batchgeneratorsv2",
    "kornia",
    "dicom2nifti",
    "dcm2niix",
    "pynrrd",
    "blosc2",
    "polars",
    "zarr",
)


def describe_machine() -> dict[str, Any]:
    """Return processor, memory, Python and library versions; no names of hosts, users or folders."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "accelerator": _accelerator(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with the same keys as an aligned table, the keys as its head."""
    if not rows:
        print("(no rows)")
        return
    heads = list(rows[0])
    cells = [heads, *([_text(row.get(head, "")) for head in heads] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    for number, line in enumerate(cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def write_results(name: str, payload: Mapping[str, Any]) -> Path:
    """Write `payload` and the machine's description to `results/<name>.json` and return the path."""
    path = RESULTS / f"{name}.json"
    write_json(path, {"machine": describe_machine(), **payload})
    return path


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _accelerator() -> str:
    try:
        import torch
    except ImportError:
        return "none"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
