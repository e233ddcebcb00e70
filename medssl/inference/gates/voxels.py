"""A sample of voxels of validation cases, logits and truth, and the temperature that makes their probabilities honest.

Guo et al. (ICML 2017) fit one temperature on whole images; here voxels are drawn evenly from the box around the
reference, a margin included, since far background would drown all others. What the network says far from the organ is
therefore not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.data.targets import Kind
from medssl.inference.model import SegmentationModel
from medssl.inference.preprocess import Prepared
from medssl.training.scores import classification_metrics
from medssl.training.temperature import fit_temperature, probabilities_of

Array = NDArray[Any]
#: Voxels of a case; logits in float16 and float64 of all cases must fit into memory.
MOST_VOXELS = 20_000
MARGIN = 5


@dataclass
class VoxelSample:
    """Voxels of one case.

    Args:
        logits: Shape: (N, heads), float32.
        targets: Class of each, (N,), or for regions 0 or 1, (N, heads).
        labelled: Logits of voxels that the network labels, for the entropy at any temperature. Shape: (heads, M).
    """

    logits: Array
    targets: Array
    labelled: Array


class Sampler:
    """Draws voxels from rows of logits as they pass.

    Args:
        reference: Labels in the reader's axes. Shape: (Z, Y, X).
        prepared: The network's input.
        model: What predicts.
        seed: Of the draw.
    """

    def __init__(self, reference: Array, prepared: Prepared, model: SegmentationModel, seed: int) -> None:
        self.model = model
        self.rng = np.random.default_rng(seed)
        self.truth = labels_on_grid(reference, prepared, model)
        self._logits: list[Array] = []
        self._targets: list[Array] = []
        self._labelled: list[Array] = []
        hits = np.argwhere(self.truth > 0)
        if len(hits):
            low = np.maximum(hits.min(axis=0) - MARGIN, 0)
            high = np.minimum(hits.max(axis=0) + 1 + MARGIN, self.truth.shape)
            self.box = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
            self.share = min(1.0, MOST_VOXELS / float(np.prod(high - low)))
        else:
            self.box, self.share = (slice(0, 0),) * 3, 0.0

    def pass_on(self, rows: Iterable[Array]) -> Iterator[Array]:
        """Yield the rows as they are. Shape each: (heads, n, Y, X)."""
        row = 0
        for block in rows:
            for plane in block.swapaxes(0, 1):
                self._see(row, plane)
                row += 1
            yield block

    def sample(self) -> VoxelSample:
        """Return what was drawn."""
        heads = self.model.heads
        several = bool(self.model.labels.has_regions)
        return VoxelSample(
            np.concatenate([np.empty((0, heads), np.float32), *self._logits]),
            np.concatenate([np.empty((0, heads) if several else 0, np.int64), *self._targets]),
            np.concatenate([np.empty((heads, 0), np.float32), *self._labelled], axis=1),
        )

    def _see(self, row: int, plane: Array) -> None:
        found = (plane > 0).any(axis=0) if self.model.labels.has_regions else plane.argmax(axis=0) > 0
        # About as many labelled voxels as there are in a cube of the sample's size.
        kept = found & (self.rng.random(found.shape) < max(self.share, 0.01))
        self._labelled.append(plane[:, kept].astype(np.float32))
        if not self.box[0].start <= row < self.box[0].stop:
            return
        truth = self.truth[row][self.box[1:]]
        drawn = self.rng.random(truth.shape) < self.share
        if self.model.labels.has_ignore_label:
            drawn &= truth != self.model.labels.ignore_label
        self._logits.append(plane[(slice(None), *self.box[1:])][:, drawn].T.astype(np.float32))
        self._targets.append(_targets(truth[drawn], self.model))


def labels_on_grid(reference: Array, prepared: Prepared, model: SegmentationModel) -> Array:
    """Return the nearest label of each voxel of the network's grid. Shape: (Z', Y', X')."""
    turned = reference.transpose(model.plans.transpose_forward)
    cropped = turned[tuple(slice(low, high) for low, high in prepared.bbox)]
    places = [
        np.clip(np.rint((np.arange(new) + 0.5) * old / new - 0.5).astype(int), 0, old - 1)
        for old, new in zip(cropped.shape, prepared.data.shape[1:], strict=True)
    ]
    return np.ascontiguousarray(cropped[np.ix_(*places)])


def temperature_of(samples: list[VoxelSample], regions: bool) -> tuple[float, dict[str, Any]]:
    """Return the temperature of all cases, and what it does to cases it was not fitted on.

    The calibration error before and after is measured twice: fitted on every other case, judged on the rest.

    Args:
        samples: Of validation cases.
        regions: Whether each output is a region of its own.

    Returns:
        The temperature, 1 where nothing tells it, and facts: `fitted`, and if not so, `why`.
    """
    used = [sample for sample in samples if len(sample.targets)]
    if len(used) < 2:
        why = f"{len(used)} validation cases show a label; two or more are needed"
        return 1.0, {"fitted": False, "why": why}
    kind: Kind = "multilabel" if regions else "multiclass"
    logits, targets = np.concatenate([s.logits for s in used]), np.concatenate([s.targets for s in used])
    temperature = fit_temperature(logits, targets, kind)
    before, after = [], []
    for part in (0, 1):
        fitted, judged = used[part::2], used[1 - part :: 2]
        one = fit_temperature(
            np.concatenate([s.logits for s in fitted]), np.concatenate([s.targets for s in fitted]), kind
        )
        z, truth = np.concatenate([s.logits for s in judged]), np.concatenate([s.targets for s in judged])
        before.append(classification_metrics(probabilities_of(z, kind), truth, kind))
        after.append(classification_metrics(probabilities_of(z, kind, one), truth, kind))
    facts: dict[str, Any] = {"fitted": True, "cases": len(used), "voxels": len(targets)}
    for name in ("ece", "nll"):
        facts[name] = {
            "before": float(np.mean([found[name] for found in before])),
            "after": float(np.mean([found[name] for found in after])),
        }
    return temperature, facts


def _targets(labels: Array, model: SegmentationModel) -> Array:
    if not model.labels.has_regions:
        return labels.astype(np.int64)
    columns = [
        np.isin(labels, region if isinstance(region, list | tuple) else [region])
        for region in model.labels.foreground_regions
    ]
    return np.stack(columns, axis=1).astype(np.int64)
