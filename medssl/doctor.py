"""What a machine has and lacks for running medssl."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from medssl.errors import MedsslError

LIBRARIES = (
    "torch",
    "nnunetv2",
    "monai",
    "nibabel",
    "SimpleITK",
    "pydicom",
    "blosc2",
    "lightning",
    "dynamic-network-architectures",
)
DECODERS = (
    ("JPEG 2000", "1.2.840.10008.1.2.4.90"),
    ("JPEG lossless", "1.2.840.10008.1.2.4.70"),
    ("JPEG baseline", "1.2.840.10008.1.2.4.50"),
    ("JPEG-LS", "1.2.840.10008.1.2.4.80"),
    ("RLE", "1.2.840.10008.1.2.5"),
)
SMALL_SHARED_MEMORY_MB = 256


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    subject: str
    verdict: Literal["ok", "limited", "broken"]
    detail: str

    def row(self) -> dict[str, Any]:
        """Return it for a table."""
        return asdict(self)


def examine(model: Path | None = None) -> list[Finding]:
    """Check libraries, decoders, devices and memory, and load a model if one is given.

    Args:
        model: A RUN or a checkpoint file.

    Returns:
        One finding per subject; `broken` ones keep medssl from working.
    """
    findings = [
        Finding("python", "ok", platform.python_version()),
        *map(_library, LIBRARIES),
        *_decoders(),
        _device(),
        _memory(),
        _shared_memory(),
    ]
    if model is not None:
        findings.append(_model(model))
    return findings


def _library(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "broken", f"not installed: pip install {name}")


def _decoders() -> list[Finding]:
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    findings = []
    for name, uid in DECODERS:
        decoder = get_decoder(UID(uid))
        detail = (
            ", ".join(decoder.available_plugins) if decoder.is_available else "; ".join(decoder.missing_dependencies)
        )
        findings.append(Finding(f"DICOM {name}", "ok" if decoder.is_available else "limited", detail))
    return findings


def _device() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("device", "limited", f"no CUDA device; {os.cpu_count()} CPU cores")
    facts = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return Finding("device", "ok", ", ".join(f"{fact.name} ({fact.total_memory / 2**30:.0f} GiB)" for fact in facts))


def _memory() -> Finding:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    return Finding("memory", "ok" if free > 4 else "limited", f"{free:.1f} GiB available")


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "limited", "no /dev/shm: use --workers 0")
    size = shutil.disk_usage(folder).total / 2**20
    if size < SMALL_SHARED_MEMORY_MB:
        return Finding(
            "shared memory", "limited", f"{size:.0f} MiB: in a container, --shm-size 1g lets workers hand over faster"
        )
    return Finding("shared memory", "ok", f"{size:.0f} MiB")


def _model(model: Path) -> Finding:
    from medssl.training.checkpoint import find_checkpoint, load_checkpoint

    try:
        path = find_checkpoint(model)
        content = load_checkpoint(path)
    except MedsslError as error:
        return Finding("model", "broken", str(error))
    return Finding("model", "ok", f"{path.name}: {len(content['network_weights'])} tensors")
