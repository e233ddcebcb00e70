"""Lays pretrained weights over a network and says of each key what became of it."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from medssl.errors import CheckpointError

logger = logging.getLogger(__name__)

_STEMS = ("encoder.stem.convs.0.", "encoder.stages.0.0.convs.0.")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass
class KeyReport:
    """What became of each key of a checkpoint and of a network.

    Args:
        taken: Keys of the network whose values come from the checkpoint.
        repeated: Those of them whose input channels were spread over more or fewer channels.
        left: Keys of the checkpoint that were not wanted or that the network does not have.
        missing: Keys of the wanted parts that the checkpoint lacks; they keep their random start.
        mismatched: Keys whose shapes differ, with both shapes; they keep their random start.
        not_wanted: Keys of the network outside the wanted parts; they keep their random start.
    """

    taken: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, list[list[int]]] = field(default_factory=dict)
    not_wanted: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return all lists and their lengths."""
        values = asdict(self)
        return {"counts": {name: len(value) for name, value in values.items()}, **values}

    def summary(self) -> str:
        """Return one line."""
        text = f"{len(self.taken)} keys taken, {len(self.left)} of the checkpoint left"
        if self.missing or self.mismatched:
            text += f", {len(self.missing)} missing, {len(self.mismatched)} of another shape"
        if self.repeated:
            text += ", first convolution spread over the input channels"
        return text


def overlay(network: nn.Module, weights: Mapping[str, Tensor], *, decoder: bool, heads: bool = False) -> KeyReport:
    """Copy pretrained values into a network in place.

    Segmentation layers belong to a task's labels and stay random unless `heads` asks for them. A first convolution
    with other input channels is spread: w[:, j] = sum_i w_pretrained[:, i] / n for n channels, which keeps the response
    to n equal channels (repeat / n where one channel was pretrained).

    Args:
        network: A U-Net of dynamic-network-architectures.
        weights: State dict of the checkpoint; names of one tensor may differ in alias (`decoder.encoder.`,
            `all_modules`) and in wrapper prefixes.
        decoder: Take the decoder too.
        heads: Take the output layers too.

    Raises:
        CheckpointError: If no key of the encoder fits: it is another network.
    """
    source = strip_wrappers(weights)
    target = network.state_dict()
    report = KeyReport()
    used: set[str] = set()
    with torch.no_grad():
        for names in _aliases(target).values():
            main = names[0]
            candidates = [name for name in names if name in source]
            used.update(candidates)
            if not _is_wanted(main, decoder=decoder, heads=heads):
                report.not_wanted.extend(names)
                report.left.extend(candidates)
            elif not candidates:
                report.missing.extend(names)
            else:
                _copy(target[main], source[candidates[0]], names, report)
    report.left.extend(name for name in source if name not in used)
    _refuse_stranger(report)
    return report


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the prefixes that DataParallel and torch.compile add taken off."""
    result = {}
    for name, value in weights.items():
        plain = name
        while plain.startswith(_WRAPPERS):
            plain = plain.removeprefix("module.").removeprefix("_orig_mod.")
        result[plain] = value
    return result


def canonical(name: str) -> int:
    """Rank the names of one tensor: the shortest path from the root, as modules are called, comes first."""
    return name.startswith("decoder.encoder.") + 2 * bool(re.search(r"\.all_modules\.", name))


def _aliases(state: Mapping[str, Tensor]) -> dict[tuple[int, tuple[int, ...]], list[str]]:
    groups: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    return {key: sorted(names, key=canonical) for key, names in groups.items()}


def _is_wanted(name: str, *, decoder: bool, heads: bool) -> bool:
    if name.startswith("encoder."):
        return True
    if ".seg_layers." in name:
        return heads
    return decoder


def _copy(target: Tensor, source: Tensor, names: list[str], report: KeyReport) -> None:
    if source.shape == target.shape:
        target.copy_(source)
        report.taken.extend(names)
    elif (
        names[0].startswith(_STEMS)
        and source.ndim == target.ndim
        and source.shape[0] == target.shape[0]
        and source.shape[2:] == target.shape[2:]
    ):
        channels = target.shape[1]
        spread = source.float().sum(dim=1, keepdim=True) / channels
        target.copy_(spread.expand_as(target))
        report.taken.extend(names)
        report.repeated.extend(names)
    else:
        for name in names:
            report.mismatched[name] = [list(source.shape), list(target.shape)]


def _refuse_stranger(report: KeyReport) -> None:
    if any(name.startswith("encoder.") for name in report.taken):
        return
    example = next(iter(report.mismatched.items()), None)
    shown = (
        f" For example {example[0]} has the shape {example[1][0]}, the network wants {example[1][1]}."
        if example
        else ""
    )
    raise CheckpointError(
        f"No weight of the encoder fits this network.{shown} Use plans written from this checkpoint, or `medssl "
        "import` "
        "if it comes from another tool."
    )
