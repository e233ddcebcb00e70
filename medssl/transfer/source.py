"""A pretrained checkpoint as transfer needs it: weights, architecture, and what is known of the pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from medssl.errors import CheckpointError
from medssl.networks.architecture import Architecture
from medssl.training.checkpoint import find_checkpoint, load_checkpoint


@dataclass(frozen=True)
class Source:
    """What a checkpoint offers.

    Args:
        path: The file.
        weights: State dict of the U-Net with nnU-Net's names.
        architecture: How to build it.
        in_channels: Channels it was trained with.
        trains_decoder: Whether its decoder is worth transferring.
        patch_size: Patch of the pretraining, or None.
        spacing_mm: Spacing (z, y, x) of the pretraining if it was one, or None.
        facts: All else that it says of itself.
        citations: Papers to cite.
    """

    path: Path
    weights: dict[str, Tensor]
    architecture: Architecture
    in_channels: int
    trains_decoder: bool
    patch_size: tuple[int, ...] | None
    spacing_mm: tuple[float, ...] | None
    facts: dict[str, Any] = field(default_factory=dict)
    citations: list[Any] = field(default_factory=list)


def load_source(run_or_file: Path) -> Source:
    """Read a checkpoint of ours, or one of nnssl or nnU-Net as `medssl import` reads it.

    Args:
        run_or_file: A RUN or a file.

    Raises:
        CheckpointError: If it is missing, damaged, unsafe, or says nothing of its architecture.
    """
    path = find_checkpoint(run_or_file)
    content = load_checkpoint(path, numpy_scalars=True)
    if "medssl" not in content or "architecture" not in content["medssl"]:
        from medssl.transfer.importing import convert

        content, _ = convert(content, path)
    facts = content["medssl"]
    try:
        plan = facts["architecture"]
        return Source(
            path=path,
            weights=content["network_weights"],
            architecture=Architecture.from_json(plan),
            in_channels=int(plan.get("in_channels", 1)),
            trains_decoder=bool(facts.get("trains_decoder", False)),
            patch_size=_numbers(facts.get("patch_size"), int),
            spacing_mm=_numbers(facts.get("spacing_mm"), float),
            facts={name: value for name, value in facts.items() if isinstance(value, str | int | float | bool | list)},
            citations=list(content.get("citations") or []),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its description of the architecture cannot be used ({type(error).__name__}: {error}). "
            "Pretrain again with this version, or import the file anew."
        ) from error


def _numbers(values: Any, kind: type) -> tuple[Any, ...] | None:
    # Pretraining at native or median spacing says so in a word.
    if values is None or isinstance(values, str) or not isinstance(values, Sequence):
        return None
    return tuple(kind(value) for value in values)
