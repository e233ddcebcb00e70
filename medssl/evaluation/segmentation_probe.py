"""What a frozen encoder knows of where things are: a 1x1 head on its stages, trained for a few hundred steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.label_split import with_validation
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.errors import DataError, UsageError
from medssl.evaluation.bootstrap import Estimate, estimate
from medssl.evaluation.compare import signed_rank
from medssl.evaluation.segmentation import case_means, show
from medssl.evaluation.stage_head import StageHead, segmentation_loss
from medssl.files import write_json
from medssl.inference.frozen import Frozen
from medssl.inference.labelled import frozen_pair
from medssl.inference.model import resolve_device
from medssl.inference.tiles import Triple, read_tile, tile_volume
from medssl.inference.volumes import Volume, volumes_of_store
from medssl.networks.pooling import Stages, chosen_stages
from medssl.preprocessing.store import Store
from medssl.progress import progress
from medssl.transfer.source import load_source

SCHEMA_VERSION = 1
ALL = "all labels"
#: Batches from which the size of each feature is taken before the first step.
SCALE_BATCHES = 4


@dataclass(frozen=True)
class SegmentationProbeResult:
    """Dice of the head on the validation volumes.

    Args:
        dice: By encoder, label (and `all labels`) and volume; NaN where label and answer are both empty.
        facts: Which encoder, stages and steps.
        seed: Of the bootstrap.
    """

    dice: dict[str, dict[str, dict[str, float]]]
    facts: dict[str, Any]
    seed: int

    def mean(self, encoder: str, label: str = ALL) -> Estimate:
        """Return the mean over volumes with its interval."""
        return estimate(list(self.dice[encoder][label].values()), seed=self.seed)

    def difference(self, label: str = ALL) -> tuple[Estimate, float | None]:
        """Return `trained` minus `untrained` over volumes, and the p of a signed-rank test."""
        trained, untrained = self.dice["trained"][label], self.dice["untrained"][label]
        gaps = [gap for case in trained if not math.isnan(gap := trained[case] - untrained[case])]
        return estimate(gaps, seed=self.seed), signed_rank(gaps)

    def to_json(self) -> dict[str, Any]:
        """Return the content of `segmentation_probe.json`."""
        labels = list(self.dice["trained"])
        differences = {}
        if "untrained" in self.dice:
            for label in labels:
                gap, p = self.difference(label)
                differences[label] = {**gap.to_json(), "p": p}
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "segmentation probe evaluation",
            "interval": "percentile bootstrap over validation volumes; undefined where label and answer are empty",
            "dice": {
                encoder: {label: self.mean(encoder, label).to_json() for label in labels} for encoder in self.dice
            },
            "differences": differences,
            "cases": {
                encoder: {
                    label: {case: None if math.isnan(value) else value for case, value in values.items()}
                    for label, values in by_label.items()
                }
                for encoder, by_label in self.dice.items()
            },
            **self.facts,
        }

    def __rich__(self) -> Any:
        """Return a table for the terminal."""
        from rich.table import Table

        table = Table(title=f"Segmentation probe, Dice on {len(self.dice['trained'][ALL])} validation volumes")
        for name in ("label", *self.dice, *(("difference",) if "untrained" in self.dice else ())):
            table.add_column(name, justify="left" if name == "label" else "right")
        for label in self.dice["trained"]:
            cells = [show(self.mean(encoder, label), "dice") for encoder in self.dice]
            gap = [show(self.difference(label)[0], "dice")] if "untrained" in self.dice else []
            table.add_row(label, *cells, *gap)
        return table


def evaluate_segmentation_probe(
    checkpoint: Path,
    store: Path,
    out: Path | None = None,
    *,
    steps: int = 300,
    batch_size: int = 4,
    learning_rate: float = 0.01,
    stages: Stages = "all",
    patch_size: tuple[int, ...] | None = None,
    control: bool = True,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> SegmentationProbeResult:
    """Train a linear head on the stages of a frozen encoder and measure it on the validation volumes of a store.

    Where the store names no validation volumes, a fifth of the patients validate, chosen by a hash of each.
    Cross-entropy plus one minus soft Dice, AdamW, cosine to 0, the last step counts: nothing is chosen on validation.
    Trained and untrained encoder see the same crops in the same order.

    Args:
        checkpoint: A RUN or a checkpoint file.
        store: A store with labels.
        out: Folder for `segmentation_probe.json`, or None.
        steps: Of the head.
        batch_size: Crops in a step.
        learning_rate: At the start.
        stages: Stages whose features it sees.
        patch_size: Crop; by default the encoder's own patch.
        control: Probe the untrained network too.
        seed: Of crops and untrained weights.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quiet: Show no progress.

    Raises:
        UsageError: If the patch or the stages do not fit.
        DataError: If the store has no labelled volumes to train on or to validate.
    """
    opened = with_validation(Store.open(store))
    validation = [name for name in opened.ids_of("validation") if opened.has_label(name)]
    training = [name for name in opened.ids_of("train") if opened.has_label(name)]
    if not training or not validation:
        raise DataError(
            f"The segmentation probe needs labelled volumes in both splits; the store has {len(training)} for training "
            f"and {len(validation)} for validation. Preprocess a data set with labels and a split."
        )
    patch = patch_size or load_source(checkpoint).patch_size
    if patch is None:
        raise UsageError("The checkpoint names no patch: give --patch-size.")
    labels = _labels(opened, training)
    dice: dict[str, dict[str, dict[str, float]]] = {}
    encoders = frozen_pair(checkpoint, patch, control=control, seed=seed, device=resolve_device(device))
    for name, frozen in encoders.items():
        head = _train(frozen, opened, labels, stages, steps, batch_size, learning_rate, seed, name, quiet)
        dice[name] = _measure(frozen, head, opened, validation, labels, stages, quiet)
    facts = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "stages": list(chosen_stages(encoders["trained"].encoder, stages)),
        "patch_size": list(patch),
        "volumes": {"train": len(training), "validation": len(validation)},
        "store_hash": opened.hash,
        "seed": seed,
    }
    result = SegmentationProbeResult(dice, facts, seed)
    if out is not None:
        write_json(out / "segmentation_probe.json", result.to_json())
    return result


def _train(
    frozen: Frozen,
    store: Store,
    labels: Sequence[int],
    stages: Stages,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    name: str,
    quiet: bool,
) -> StageHead:
    chosen = chosen_stages(frozen.encoder, stages)
    # Class of each label, whose values may have gaps.
    number = torch.zeros(max(labels) + 1, dtype=torch.int64, device=frozen.device)
    number[list(labels)] = torch.arange(1, len(labels) + 1, device=frozen.device)
    settings = CropSettings(
        patch_size=frozen.patch_size, batch_size=batch_size, foreground_probability=0.5, labels=True
    )
    with CropLoader(store, settings, seed=seed, device=frozen.device) as loader:
        if loader.channels != frozen.encoder.in_channels:
            raise UsageError(
                f"The store has {loader.channels} channels, the encoder takes {frozen.encoder.in_channels}."
            )
        head = StageHead([frozen.encoder.widths[stage] for stage in chosen], len(labels) + 1).to(frozen.device)
        batches = loader.batches()
        head.fit_scale([_stages(frozen, next(batches).image, chosen) for _ in range(SCALE_BATCHES)])
        optimiser = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        with progress(f"Probing the {name} encoder", steps, quiet=quiet) as advance:
            for _ in range(steps):
                batch = next(batches)
                assert batch.label is not None
                logits = head(_stages(frozen, batch.image, chosen), batch.image.shape[2:])
                loss = segmentation_loss(logits, number[batch.label])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                advance()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in head.parameters()):
        raise DataError(f"The features of the {name} encoder are not numbers: the probe's weights became NaN.")
    return head


def dice_of(answer: NDArray[Any], truth: NDArray[Any]) -> float:
    """Return the Dice of two masks; NaN where both are empty."""
    total = int(answer.sum()) + int(truth.sum())
    return 2 * int((answer & truth).sum()) / total if total else math.nan


def _measure(
    frozen: Frozen,
    head: StageHead,
    store: Store,
    ids: Sequence[str],
    labels: Sequence[int],
    stages: Stages,
    quiet: bool,
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {f"label {label}": {} for label in labels}
    with progress("Measuring", len(ids), quiet=quiet) as advance:
        for volume in volumes_of_store(store, ids=ids):
            answer = _segment(frozen, head, volume, len(labels) + 1, stages)
            truth = store.read_label(volume.id, (0, 0, 0), volume.shape[1:])
            assert truth is not None
            for place, label in enumerate(labels, start=1):
                found[f"label {label}"][volume.id] = dice_of(answer == place, truth == label)
            advance()
    means = case_means((case, value) for values in found.values() for case, value in values.items())
    return {ALL: means, **found} if len(found) > 1 else {ALL: means}


def _segment(frozen: Frozen, head: StageHead, volume: Volume, classes: int, stages: Stages) -> NDArray[np.int64]:
    """Return the most probable class of each voxel of a volume; logits of overlapping boxes are averaged."""
    size: Triple = (1, *frozen.patch_size)[-3:]  # type: ignore[assignment]
    shape = volume.shape[1:]
    chosen = chosen_stages(frozen.encoder, stages)
    logits, counts = np.zeros((classes, *shape), np.float32), np.zeros(shape, np.float32)
    for tile in tile_volume(shape, size, 10**9, margin=0):
        image = torch.from_numpy(read_tile(volume.read, tile, shape, volume.shape[0], volume.background))[None]
        image = (image[:, :, 0] if frozen.dimensions == 2 else image).to(frozen.device)
        with torch.no_grad():
            values = head(_stages(frozen, image, chosen), image.shape[2:])[0].cpu().numpy().reshape(classes, *size)
        low = [max(start, 0) for start in tile.start]
        high = [min(s + n, edge) for s, n, edge in zip(tile.start, size, shape, strict=True)]
        there = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        here = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, tile.start, strict=True))
        logits[(slice(None), *there)] += values[(slice(None), *here)]
        counts[there] += 1
    return (logits / counts).argmax(axis=0)


def _stages(frozen: Frozen, image: Tensor, chosen: Sequence[int]) -> list[Tensor]:
    with torch.no_grad():
        features = frozen.encoder.stages(image)
    return [features[stage].float() for stage in chosen]


def _labels(store: Store, ids: Sequence[str]) -> list[int]:
    values: set[int] = set()
    for name in ids:
        label = store.read_label(name, (0, 0, 0), store.entry(name).shape[1:])
        values |= set(np.unique(label).tolist()) if label is not None else set()
    found = sorted(value for value in values if value > 0)
    if not found:
        raise DataError("All labels of the training volumes are empty: there is nothing for the probe to learn.")
    return found
