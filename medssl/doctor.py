"""What a machine has and lacks for running medssl."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from medssl.errors import MedsslError, UsageError

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
SMALL_TEMPORARY_MB = 1024


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    subject: str
    verdict: Literal["ok", "limited", "broken"]
    detail: str

    def row(self) -> dict[str, Any]:
        """Return it for a table."""
        return asdict(self)


def examine(model: Path | None = None, sha256: str | None = None) -> list[Finding]:
    """Check libraries, decoders, devices, memory and folders, and load a model if one is given.

    Args:
        model: A RUN or a checkpoint file; its weights are loaded onto the CPU, of a fine-tuned RUN into its networks.
        sha256: What the model's hash must be: the SHA-256 of its checkpoint; of several folds the SHA-256 over theirs,
            in order of the folds, in hexadecimal with a line feed between them (the hash that DICOM SEGs name).

    Returns:
        One finding per subject; `broken` ones keep medssl from working.

    Raises:
        UsageError: If a hash is given without a model.
    """
    if sha256 is not None and model is None:
        raise UsageError("--sha256 is the hash of a model: give --model too.")
    findings = [
        Finding("python", "ok", platform.python_version()),
        *map(_library, LIBRARIES),
        *_decoders(),
        _device(),
        _memory(),
        _shared_memory(),
        _temporary_folder(),
        _user(),
    ]
    if model is not None:
        findings.extend(_model(model, sha256))
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
            "shared memory",
            "limited",
            f"{size:.0f} MiB: training on several GPUs needs more, in a container --shm-size 1g; one GPU does not",
        )
    return Finding("shared memory", "ok", f"{size:.0f} MiB")


def _temporary_folder() -> Finding:
    try:
        with tempfile.TemporaryFile() as file:
            file.write(b"medssl")
        free = shutil.disk_usage(tempfile.gettempdir()).free / 2**20
    except OSError:
        return Finding(
            "temporary folder", "broken", "none can be written: mount a tmpfs on /tmp, or set TMPDIR to a folder"
        )
    return Finding("temporary folder", "ok" if free >= SMALL_TEMPORARY_MB else "limited", f"{free:.0f} MiB free")


def _user() -> Finding:
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        return Finding(
            "user", "broken", f"user id {os.getuid()} has no name, which MONAI asks for: set USER to any name"
        )
    return Finding("user", "ok", f"user id {os.getuid()}")


def _model(model: Path, expected: str | None) -> list[Finding]:
    try:
        hashes = _loaded(model)
    except MedsslError as error:
        return [Finding("model", "broken", str(error))]
    from medssl.inference.dicom_seg import Algorithm

    found = Algorithm("medssl", hashes).model_hash
    loaded = Finding("model", "ok", f"loaded {len(hashes)} checkpoint{'s' if len(hashes) > 1 else ''}")
    return [loaded, _model_hash(found, expected)]


def _loaded(model: Path) -> dict[str, str]:
    """Load a model as far as what it is for is known, and return the SHA-256 of each checkpoint."""
    from medssl.files import sha256_of
    from medssl.inference.model import load_model
    from medssl.training.checkpoint import find_checkpoint, load_checkpoint
    from medssl.transfer.classifier_files import is_classification, load_members

    if is_classification(model):
        return {f"fold_{number}": member.sha256 for number, member in enumerate(load_members(model))}
    if (model / "plans.json").is_file():
        import torch

        return load_model(model, torch.device("cpu")).sha256
    path = find_checkpoint(model)
    load_checkpoint(path)
    return {path.name: sha256_of(path)}


def _model_hash(found: str, expected: str | None) -> Finding:
    if expected is None:
        return Finding("model hash", "ok", f"{found}; not compared: --sha256 says what it must be")
    if found != expected.strip().lower():
        return Finding(
            "model hash", "broken", f"{found}, but {expected} is expected: this is another model, or a changed one"
        )
    return Finding("model hash", "ok", f"{found}, as expected")
