"""Checkpoint files: written whole or not at all, with a checksum beside them, and read without running any code."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.errors import CheckpointError
from medssl.files import atomic_path, sha256_of, write_text

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d+)\.pth")


def checkpoint_name(step: int) -> str:
    """Return the file name of the checkpoint after `step` steps."""
    return f"step_{step:08d}.pth"


def step_of(path: Path) -> int:
    """Return the number of steps that a checkpoint's name tells."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path.name} is not named step_<number>.pth.")
    return int(match.group(1))


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint and its SHA-256, each whole or not at all.

    Tensors are stored on the CPU, and each storage once however many names it has.

    Args:
        path: Where it shall stand.
        content: Tensors, numbers, text, and lists and dictionaries of them.

    Raises:
        MedsslError: If the disk is full.
    """
    sidecar = _sidecar(path)
    # A checksum of an older file of this name would make the new one look damaged if we are killed in between.
    sidecar.unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        _write(to_cpu(dict(content)), temporary)
        digest = sha256_of(temporary)
    write_text(sidecar, f"{digest}  {path.name}\n")


def load_checkpoint(path: Path, *, numpy_scalars: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code that it may hold.

    Args:
        path: The file. If a `.sha256` stands beside it, it is compared first.
        numpy_scalars: Also take numpy's numbers, which nnU-Net's own checkpoints hold in their logs.

    Returns:
        A dictionary with at least `network_weights`.

    Raises:
        CheckpointError: If it is missing, damaged, a pickle that would need code to load, or no checkpoint.
    """
    fault = damage(path)
    if fault:
        raise CheckpointError(f"{path}: {fault}. Use an older checkpoint or a fresh copy of the file.")
    _refuse_unsafe_container(path)
    try:
        with torch.serialization.safe_globals(_numpy_scalars() if numpy_scalars else []):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        reason = f"it is a pickle that asks for {found.group(1)}" if found else "it is a pickle that asks for code"
        raise CheckpointError(_unsafe(path, reason)) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {_first_line(error)}. Use an older checkpoint or a fresh copy of the file."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a checkpoint is a dictionary.")
    weights = content.get("network_weights")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{path} has no 'network_weights'; it holds {', '.join(sorted(map(str, content))[:10]) or 'nothing'}. "
            "medssl reads its own checkpoints, nnssl's and nnU-Net's."
        )
    return content


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint file, or None if it is intact."""
    if not path.is_file():
        return "there is no such file"
    if path.stat().st_size == 0:
        return "the file is empty"
    sidecar = _sidecar(path)
    if sidecar.is_file():
        # Content of the side file is compared and never trusted for anything else.
        expected = sidecar.read_text(errors="replace").split(" ")[0].strip()
        return None if sha256_of(path) == expected else f"its SHA-256 is not the one in {sidecar.name}; it is damaged"
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError) as error:
            return f"it is damaged ({_first_line(error)})"
        return None if broken is None else f"its part {broken} is damaged"
    with path.open("rb") as handle:
        return "it is cut off or damaged" if handle.read(4) == b"PK\x03\x04" else None


def newest_intact(folder: Path) -> Path:
    """Return the newest undamaged checkpoint of a folder; damaged newer ones are named in the log.

    Raises:
        CheckpointError: If there is none.
    """
    found = sorted(
        (path for path in folder.glob("step_*.pth") if _NAME.fullmatch(path.name)), key=step_of, reverse=True
    )
    for path in found:
        fault = damage(path)
        if fault is None:
            return path
        logger.warning("Checkpoint %s: %s; falling back to the one before it.", path.name, fault)
    if found:
        raise CheckpointError(f"All {len(found)} checkpoints in {folder} are damaged. Train again with --overwrite.")
    raise CheckpointError(f"There is no checkpoint in {folder}. Has the run saved one yet?")


def find_checkpoint(run_or_file: Path) -> Path:
    """Return the checkpoint that a path means: the file itself, or a RUN's newest intact one.

    Args:
        run_or_file: A checkpoint file, a pretraining RUN, its `checkpoints` folder, or a segmentation RUN.

    Raises:
        CheckpointError: If it holds none.
    """
    if run_or_file.is_file():
        return run_or_file
    if not run_or_file.is_dir():
        raise CheckpointError(f"{run_or_file} does not exist: give a RUN or a checkpoint file.")
    if (run_or_file / FOLDER).is_dir():
        return newest_intact(run_or_file / FOLDER)
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "checkpoint_latest.pth"):
        for path in (run_or_file / "fold_0" / name, run_or_file / name):
            if path.is_file():
                return path
    return newest_intact(run_or_file)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what killed writers left behind."""
    found = _saved(folder)
    for path in found[: max(len(found) - keep, 0)]:
        # The checksum goes first: a file without one is still tested as a zip, a checksum without a file is litter.
        _sidecar(path).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    for path in folder.glob(".*-step_*.pth*"):
        path.unlink(missing_ok=True)


def to_cpu(value: Any) -> Any:
    """Return nested content with every tensor detached on the CPU.

    Names that share one tensor share it afterwards too, and a tensor that shows part of a larger storage is copied,
    so that the file holds what it names and nothing more.
    """
    return _to_cpu(value, {})


def _write(content: dict[str, Any], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:
        # torch's own writer says "unexpected pos" where the system said that the disk is full.
        if "inline_container" in str(error) or "PytorchStreamWriter" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _to_cpu(value: Any, seen: dict[tuple[object, ...], Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensor = value.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() == 0 or tensor.data_ptr() == 0:
            return tensor.cpu()
        if key not in seen:
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            seen[key] = tensor.cpu() if whole else tensor.cpu().clone()
        return seen[key]
    if isinstance(value, Mapping):
        return {name: _to_cpu(item, seen) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_cpu(item, seen) for item in value)
    return value


def _refuse_unsafe_container(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(_unsafe(path, "it is a bare or legacy pickle, not a file of torch.save since 1.6"))
    with zipfile.ZipFile(path) as archive:
        # torch.save never compresses; a compressed part could unfold to any size.
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise CheckpointError(f"{path} has compressed parts; torch.save writes none. Get a fresh copy of the file.")
        if any(part.filename.endswith("constants.pkl") for part in archive.infolist()):
            raise CheckpointError(
                f"{path} is a TorchScript program, not a checkpoint. Save the state dict of its model instead."
            )


def _unsafe(path: Path, reason: str) -> str:
    return (
        f"{path} is refused: {reason}. Loading it could run code. Ask its author for a file that torch.load(..., "
        "weights_only=True) reads, or, in a sandbox without secrets and network, keep the tensors alone: "
        "torch.save({'network_weights': torch.load(FILE, weights_only=False)['network_weights']}, NEW_FILE)."
    )


def _saved(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step_*.pth") if _NAME.fullmatch(path.name)), key=step_of)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _numpy_scalars() -> list[Any]:
    import numpy as np

    kinds = [kind for name in dir(np.dtypes) if isinstance(kind := getattr(np.dtypes, name), type)]
    plain = [kind for kind in kinds if kind.__name__.removesuffix("DType").rstrip("0123456789") in _PLAIN]
    scalar = np.float64(0).__reduce__()[0]
    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *plain]


_PLAIN = {"Float", "Int", "UInt", "Bool"}
