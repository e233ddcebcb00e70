"""Makes the gates of a segmentation RUN from its own cases: the Python twin of `medssl calibrate`."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medssl.archive.volume import UNKNOWN_MODALITY
from medssl.augmentation.policy import known_modality
from medssl.errors import DataError, InputRefused, UsageError
from medssl.inference.gates.certainty import uncertainty
from medssl.inference.gates.envelope import fit_envelope
from medssl.inference.gates.gates import SCORES, Gates, write_gates
from medssl.inference.gates.measured import Array, Measured, measure_mask
from medssl.inference.gates.reference import LEAST_CASES, fit_reference
from medssl.inference.gates.thresholds import calibrate as threshold_of
from medssl.inference.gates.thresholds import check_cases
from medssl.inference.gates.verdict import ACCEPTED, REFUSED, REVIEW
from medssl.inference.gates.voxels import Sampler, VoxelSample, temperature_of
from medssl.inference.gates.watch import Measuring, encoder_of
from medssl.inference.model import SegmentationModel, load_model, resolve_device
from medssl.inference.preprocess import Prepared, prepare
from medssl.inference.restore import restore
from medssl.inference.source import Image, open_file, read_image
from medssl.inference.window import SlidingWindow
from medssl.inference.workspace import Workspace
from medssl.progress import progress
from medssl.transfer.raw import Case, RawDataset, read_dataset

logger = logging.getLogger(__name__)

#: Of more training cases than this, so many evenly spaced ones are looked at.
MOST_TRAINING = 300
#: Normalisations that keep stored intensities comparable between scanners.
QUANTITATIVE = ("CTNormalization", "NoNormalization", "RGBTo01Normalization")


@dataclass(frozen=True)
class Calibration:
    """The gates of a RUN, and what they say of the cases they were set on.

    Args:
        gates: What was written.
        path: Where.
    """

    gates: Gates
    path: Path

    def to_json(self) -> dict[str, Any]:
        """Return thresholds and what they rest on; without the embedding's numbers."""
        content = self.gates.to_json()
        content["embedding"] = {name: content["embedding"][name] for name in ("cases", "width")}
        return content

    def __rich__(self) -> Any:
        """Return a table for the terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title="Gates")
        for name in ("score", "review above", "refused above", "validation cases", "flagged"):
            table.add_column(name, justify="left" if name == "score" else "right")
        for name, threshold in self.gates.thresholds.items():
            refuse = "-" if threshold.refuse is None else f"{threshold.refuse:.4g}"
            table.add_row(name, f"{threshold.review:.4g}", refuse, str(threshold.cases), str(threshold.flagged))
        return Group(table, *summary_lines(self.gates))


def summary_lines(gates: Gates) -> list[str]:
    """Return what else is to be told of gates, for terminal and report."""
    facts = gates.facts
    counts = facts["validation_verdicts"]
    temperature = facts["temperature"]
    lines = [
        f"{gates.envelope.cases} training cases give the ranges. Verdicts on the {facts['validation_cases']} "
        f"validation cases: {', '.join(f'{counts[name]} {name}' for name in (ACCEPTED, REVIEW, REFUSED))}."
    ]
    if temperature["fitted"]:
        error = temperature["ece"]
        lines.append(
            f"Temperature {gates.temperature:.3g}: calibration error of voxels near the organ "
            f"{error['before']:.3g} before, {error['after']:.3g} after, on cases it was not fitted on."
        )
    else:
        lines.append(f"Temperature 1: {temperature['why']}.")
    return [*lines, *(f"Not calibrated: {line}." for line in facts["not_calibrated"])]


def calibrate(
    run: Path,
    *,
    dataset: Path | None = None,
    train_cases: Sequence[str] | None = None,
    validation_cases: Sequence[str] | None = None,
    flag_rate: float = 0.05,
    modality: str | None = None,
    step_size: float = 0.5,
    mirroring: bool | None = None,
    memory_mb: int | None = None,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> Calibration:
    """Write `gates.json` into a RUN: what its training cases span, and thresholds set on its validation cases.

    Of training cases images and masks are looked at, and the encoder's features. Validation cases are predicted as
    `medssl predict` does. No name, no path and nothing of a single case is written, but for extremes over all.

    Args:
        run: A segmentation RUN.
        dataset: Its nnU-Net raw folder; by default where the RUN found it.
        train_cases: What it was trained on; by default what `data.json` says, else all but the validation cases.
        validation_cases: Cases that it was not trained on, no fold of it; by default those of `data.json`.
        flag_rate: Share of cases like the validation cases that each score may send to review.
        modality: DICOM's code of the model's modality; by default what the channels' names say.
        step_size: Of the window; `predict` applies the network's own scores only with the same.
        mirroring: As for `predict`.
        memory_mb: As for `predict`.
        seed: Of the draw of voxels.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quiet: Show no progress.

    Raises:
        UsageError: If there are too few cases, or nothing says where the data set is.
        DataError: If a case cannot be read.
        CheckpointError: If the RUN holds no finished model.
    """
    from medssl.transfer.nnunet import nnunet_environment

    with nnunet_environment(), tempfile.TemporaryDirectory() as scratch:
        model = load_model(run, resolve_device(device))
        raw, training, validation = _cases(run, model, dataset, train_cases, validation_cases)
        check_cases(len(validation), flag_rate)
        if len(training) < LEAST_CASES:
            raise UsageError(f"{len(training)} training cases span no range: {LEAST_CASES} are needed.")
        axes = () if mirroring is False else model.mirroring_axes
        work = _Work(model, step_size, axes, memory_mb, Path(scratch), seed)
        chosen = [training[int(place)] for place in _spread(len(training))]
        with progress("Measuring cases", len(chosen) + len(validation), quiet=quiet) as advance:
            trained = [work.train(raw.cases[name], advance) for name in chosen]
            judged = [work.predict(raw.cases[name], number, advance) for number, name in enumerate(validation)]
        gates = _fit(model, trained, judged, flag_rate, _modality(raw, modality), step_size, axes)
        return Calibration(gates, write_gates(run, gates))


class _Work:
    """Measures labelled cases with a model."""

    def __init__(
        self,
        model: SegmentationModel,
        step_size: float,
        axes: tuple[int, ...],
        memory_mb: int | None,
        scratch: Path,
        seed: int,
    ) -> None:
        self.model, self.step_size, self.axes = model, step_size, axes
        self.memory_mb, self.scratch, self.seed = memory_mb, scratch, seed
        self.frozen = encoder_of(model)
        self.reorient = model.plans.plans["image_reader_writer"] == "NibabelIOWithReorient"

    def train(self, case: Case, advance: Any) -> Measured:
        """Measure image, features and mask of a training case."""
        measuring, image, _, _ = self._prepared(case)
        labels = self._labels(case)
        measuring.found.volumes_ml, measuring.found.parts = measure_mask(labels, image.grid, self.model.label_values)
        advance()
        return measuring.found

    def predict(self, case: Case, number: int, advance: Any) -> tuple[Measured, VoxelSample]:
        """Measure a validation case and its prediction."""
        measuring, image, prepared, workspace = self._prepared(case)
        sampler = Sampler(self._labels(case), prepared, self.model, self.seed + number)
        shape = prepared.data.shape[1:]
        window = SlidingWindow(self.model, shape, self.step_size, self.axes, measuring.observer)
        rows = sampler.pass_on(window.rows(prepared.data, workspace, lambda: None))
        mask = restore(measuring.rows(rows), prepared, self.model, workspace)
        measuring.mask(mask, image.grid)
        advance()
        return measuring.found, sampler.sample()

    def _prepared(self, case: Case) -> tuple[Measuring, Image, Prepared, Workspace]:
        measuring, workspace = Measuring(self.model, self.frozen), Workspace(self.memory_mb, self.scratch)
        try:
            image = read_image([open_file(path) for path in case.images], self.reorient, workspace)
        except InputRefused as error:
            raise DataError(f"{case.name} cannot be read: {error}. Mend the file, or leave the case out.") from error
        measuring.image(image)
        prepared = prepare(image.array, image.spacing, self.model, workspace)
        measuring.prepared(prepared)
        return measuring, image, prepared, workspace

    def _labels(self, case: Case) -> Array:
        """Return the reference in the reader's axes. Shape: (Z, Y, X)."""
        try:
            channel = open_file(case.label)
            labels = np.empty(channel.grid.reader_shape(self.reorient), np.float32)
            channel.fill(channel.grid.stored_view(labels, self.reorient))
        except InputRefused as error:
            raise DataError(f"{case.name}: its mask cannot be read: {error}. Mend the file.") from error
        return np.rint(labels).astype(np.int32)


def _fit(
    model: SegmentationModel,
    trained: list[Measured],
    judged: list[tuple[Measured, VoxelSample]],
    flag_rate: float,
    modality: str | None,
    step_size: float,
    axes: tuple[int, ...],
) -> Gates:
    regions = bool(model.labels.has_regions)
    temperature, about = temperature_of([sample for _, sample in judged], regions)
    for found, sample in judged:
        if sample.labelled.shape[1]:
            entropy, confidence = uncertainty(sample.labelled.astype(np.float64) / temperature, regions)
            found.entropy, found.confidence = float(entropy.mean()), float(confidence.mean())
    envelope = fit_envelope(
        trained,
        channels=model.channels,
        modality=modality,
        reorients=model.plans.plans["image_reader_writer"] == "NibabelIOWithReorient",
        raw=all(scheme in QUANTITATIVE for scheme in model.configuration.normalization_schemes),
    )
    reference = fit_reference(np.stack([found.embedding for found in trained if found.embedding is not None]))
    bare = Gates(model.sha256, envelope, reference, {}, temperature, step_size, axes, {})
    scores = [bare.scores(found) for found, _ in judged]
    thresholds, missing = {}, []
    for name in SCORES:
        values = [found[name] for found in scores if name in found]
        try:
            thresholds[name] = threshold_of(values, flag_rate, refuses=name == "embedding_distance")
        except UsageError:
            missing.append(_why(name, len(values), len(judged), model, axes))
    gates = Gates(model.sha256, envelope, reference, thresholds, temperature, step_size, axes, {})
    verdicts = [gates.judge("", found, step_size=step_size, mirroring_axes=axes).verdict for found, _ in judged]
    volumes = [sum(found.volumes_ml.values()) for found, _ in judged]
    facts: dict[str, Any] = {
        "validation_volume_ml": {"mean": float(np.mean(volumes)), "std": float(np.std(volumes))},
        "training_cases": len(trained),
        "validation_cases": len(judged),
        "flag_rate": flag_rate,
        "temperature": about,
        "not_calibrated": missing,
        "validation_verdicts": {name: verdicts.count(name) for name in (ACCEPTED, REVIEW, REFUSED)},
    }
    return Gates(model.sha256, envelope, reference, thresholds, temperature, step_size, axes, facts)


def _why(name: str, measured: int, cases: int, model: SegmentationModel, axes: tuple[int, ...]) -> str:
    if name == "disagreement" and not axes and len(model.networks) == 1:
        return "disagreement: one fold without mirroring has nothing to disagree with"
    return f"{name}: only {measured} of {cases} validation cases have a labelled voxel"


def _cases(
    run: Path,
    model: SegmentationModel,
    dataset: Path | None,
    train_cases: Sequence[str] | None,
    validation_cases: Sequence[str] | None,
) -> tuple[RawDataset, list[str], list[str]]:
    """Return the data set, and the names of training and validation cases; no case is in both."""
    data = _content(run / "data.json")
    folder = dataset or _folder_of(run)
    raw = read_dataset(folder)
    if model.channels != len(raw.channel_names):
        raise DataError(f"{raw.name} has {len(raw.channel_names)} channels, the model takes {model.channels}.")
    if len(model.networks) > 1 and validation_cases is None:
        raise UsageError(
            f"The model has {len(model.networks)} folds: name cases that none of them was trained on with "
            "--validation-cases."
        )
    validation = validation_cases if validation_cases is not None else data.get("validation_cases")
    if validation is None:
        raise UsageError("The RUN has no data.json that names its cases: give --dataset and --validation-cases.")
    validation = raw.select(validation, "validation cases")
    training = train_cases if train_cases is not None else data.get("train_cases")
    if training is None:
        training = [name for name, case in raw.cases.items() if name not in set(validation) and case.label.is_file()]
    training = raw.select(training, "training cases")
    both = sorted(set(training) & set(validation))
    if both:
        raise UsageError(
            f"{', '.join(both[:5])} would be training and validation cases: on what it has learned by heart a model is "
            "too sure. Name others with --validation-cases."
        )
    return raw, training, validation


def _folder_of(run: Path) -> Path:
    path = run / "recipe.yaml"
    try:
        content = yaml.safe_load(path.read_text()) if path.is_file() else {}
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}. Give --dataset.") from error
    folder = content.get("dataset") if isinstance(content, dict) else None
    if not folder or not Path(folder).is_dir():
        raise UsageError(
            "The data set of the RUN is not where it was trained: give its nnU-Net raw folder with --dataset."
        )
    return Path(folder)


def _modality(raw: RawDataset, given: str | None) -> str | None:
    """Return the one modality of all channels, or None where their names do not say."""
    if given is not None:
        return known_modality(given)
    found = set()
    for name in raw.channel_names:
        try:
            found.add(known_modality(name))
        except UsageError:
            return None
    modality = found.pop() if len(found) == 1 else UNKNOWN_MODALITY
    return None if modality == UNKNOWN_MODALITY else modality


def _content(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}. Give --dataset and the cases.") from error
    return content if isinstance(content, dict) else {}


def _spread(count: int) -> Array:
    return np.unique(np.linspace(0, count - 1, min(count, MOST_TRAINING)).round())
