"""Modality and body part of an image file that does not carry them: from what stands beside it, never from voxels."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from medssl.archive.identity import channel_of, stem_of

_LIMIT = 2**20
#: Suffixes of BIDS that belong to one modality.
_BIDS = {
    "MR": "T1w T2w T2star FLAIR PD PDw PDT2 inplaneT1 inplaneT2 angio bold sbref dwi asl m0scan epi T1rho T1map T2map "
    "T2starmap UNIT1 MP2RAGE MPRAGE SWI",
    "PT": "pet",
    "CT": "ct",
}
_MODALITIES = {suffix: modality for modality, suffixes in _BIDS.items() for suffix in suffixes.split()}
#: Words in nnU-Net's `channel_names` that name a modality.
_CHANNELS = {
    "CT": r"^(ct|noncontrast ?ct|ncct|cect|cta)$",
    "PT": r"^(pet|suv|fdg-?pet)$",
    "US": r"^(us|ultrasound)$",
    "MR": r"^(mri?|lge|.*-?mri|t1.*|t2.*|flair|adc|dwi|pd|bssfp|cine)$",
}


def hint_paths(path: str) -> list[str]:
    """Return the files that may tell of an image, relative as the image's own path."""
    pure = PurePosixPath(path)
    paths = [str(pure.with_name(stem_of(pure.name) + ".json"))]
    if pure.parent.name.startswith("images"):
        paths.append(str(pure.parent.parent / "dataset.json"))
    return paths


def hints_of(root: Path, path: str) -> dict[str, str]:
    """Return `modality` and `body_part` as far as sidecar, data-set description or BIDS name tell.

    Args:
        root: The source.
        path: The image, relative to it.
    """
    pure = PurePosixPath(path)
    found: dict[str, str] = {}
    suffix = re.search(r"_([A-Za-z0-9]+)$", stem_of(pure.name))
    if suffix and re.search(r"(^|/)sub-", path) and suffix.group(1) in _MODALITIES:
        found["modality"] = _MODALITIES[suffix.group(1)]
    for name in reversed(hint_paths(path)):
        content = _read(root / name)
        found.update(_from_dataset(content, pure.name) if name.endswith("dataset.json") else _from_sidecar(content))
    return found


def _from_sidecar(content: dict[str, Any]) -> dict[str, str]:
    found = {}
    modality, part = content.get("Modality"), content.get("BodyPartExamined", content.get("BodyPart"))
    if isinstance(modality, str) and re.fullmatch(r"[A-Z]{2,6}", modality):
        found["modality"] = modality
    if isinstance(part, str) and re.fullmatch(r"[A-Za-z ]{2,32}", part):
        found["body_part"] = part.strip().upper()
    return found


def _from_dataset(content: dict[str, Any], name: str) -> dict[str, str]:
    channels = content.get("channel_names", content.get("modality"))
    number = channel_of(name) or "0"
    channel = channels.get(number) if isinstance(channels, dict) else None
    if isinstance(channel, str):
        for modality, pattern in _CHANNELS.items():
            if re.match(pattern, channel.strip().lower()):
                return {"modality": modality}
    return {}


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _LIMIT:
            return {}
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
