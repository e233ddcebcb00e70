"""What a frozen encoder knows of labels that it was not trained on, beside what its untrained twin knows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.data.probabilities import Probabilities, write_probabilities
from medssl.data.target_table import SEPARATOR
from medssl.data.targets import Targets, carried
from medssl.errors import DataError, UsageError, unknown_name
from medssl.evaluation.bootstrap import Estimate, estimate
from medssl.evaluation.classification import measure_classification, metric_differences
from medssl.evaluation.classification_result import ClassificationResult, Interval
from medssl.files import write_json
from medssl.inference.embedding import Embeddings, embed
from medssl.inference.labelled import frozen_pair, labelled_volumes
from medssl.inference.model import resolve_device
from medssl.networks.pooling import Pooling, Stages
from medssl.training.heads import Cases, knn_probe, linear_probe, prototypes
from medssl.training.scores import classification_metrics
from medssl.transfer.images import ImageOptions

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
PROBES = ("linear", "knn", "prototypes")
SHOTS = (1, 2, 5, 10, 20)
DRAWS = 20
_SHOWN = ("auroc", "balanced_accuracy", "nll")


@dataclass(frozen=True)
class Outcome:
    """A head on the features of one encoder.

    Args:
        setting: C of the linear probe, k of the nearest neighbours.
        result: Its metrics with intervals.
        table: Its probabilities of the reported cases.
    """

    setting: float
    result: ClassificationResult
    table: Probabilities


@dataclass(frozen=True)
class ProbeResult:
    """What was found.

    Args:
        kind: Kind of target.
        classes: Their names.
        counts: Cases by split.
        reported: Split that the metrics are of.
        outcomes: By probe and encoder (`trained`, `untrained`).
        differences: By probe, `trained` minus `untrained` on the same cases.
        few_shot: Per number of shots and encoder the mean of each metric over draws; `difference` is paired by draw.
        facts: Which encoder, stages and images.
    """

    kind: str
    classes: tuple[str, ...]
    counts: dict[str, int]
    reported: str
    outcomes: dict[str, dict[str, Outcome]]
    differences: dict[str, dict[str, Interval]]
    few_shot: list[dict[str, Any]]
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `probe.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "probe evaluation",
            "target_kind": self.kind,
            "classes": list(self.classes),
            "cases": self.counts,
            "reported_split": self.reported,
            "chosen_on": "validation" if self.reported == "test" else "folds of the training patients",
            "probes": {
                probe: {
                    encoder: {"setting": outcome.setting, **outcome.result.to_json()}
                    for encoder, outcome in by_encoder.items()
                }
                for probe, by_encoder in self.outcomes.items()
            },
            "differences": {
                probe: {name: value.to_json() for name, value in values.items()}
                for probe, values in self.differences.items()
            },
            "few_shot_interval": f"over {DRAWS} draws of labelled cases; encoders and reported cases are fixed",
            "few_shot": [
                {name: value.to_json() if isinstance(value, Estimate) else value for name, value in row.items()}
                for row in self.few_shot
            ],
            **self.facts,
        }

    def __rich__(self) -> Any:
        """Return tables for the terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title=f"Probes on {self.counts[self.reported]} {self.reported} cases")
        for name in ("probe", "metric", "trained", "untrained", "difference"):
            table.add_column(name, justify="left" if name in ("probe", "metric") else "right")
        for probe, by_encoder in self.outcomes.items():
            for metric in _SHOWN:
                values = [
                    str(by_encoder[name].result.metrics[metric]) if name in by_encoder else "-"
                    for name in ("trained", "untrained")
                ]
                gap = self.differences.get(probe, {}).get(metric)
                table.add_row(probe, metric.replace("_", " "), *values, "-" if gap is None else str(gap))
        shots = Table(title=f"Nearest prototypes, balanced accuracy over {DRAWS} draws")
        for name in ("cases of each class", "trained", "untrained", "difference"):
            shots.add_column(name, justify="right")
        for row in self.few_shot:
            cells = [row.get(f"{name}/balanced_accuracy") for name in ("trained", "untrained", "difference")]
            shots.add_row(str(row["shots"]), *map(_cell, cells))
        return Group(table, *([shots] if self.few_shot else []))


def evaluate_probe(
    checkpoint: Path,
    dataset: Path,
    out: Path | None = None,
    *,
    probes: Sequence[str] = PROBES,
    labels: Path | None = None,
    kind: str = "auto",
    classes: Sequence[str] | None = None,
    folds: int | None = None,
    fold: int = 0,
    labelled: int | None = None,
    shots: Sequence[int] = SHOTS,
    stages: Stages = "all",
    pooling: Pooling = "mean",
    fit: str = "whole",
    patch_size: tuple[int, ...] | None = None,
    options: ImageOptions | None = None,
    cache: Path | None = None,
    control: bool = True,
    seed: int = 0,
    device: str = "auto",
    quiet: bool = False,
) -> ProbeResult:
    """Train small heads on frozen features of the training cases and measure them on cases that chose nothing.

    Where the data set has a split `test`, settings are chosen on `validation` and metrics are of `test`; otherwise they
    are chosen in folds of the training patients and metrics are of `validation`. Images are brought to the patch as by
    `medssl finetune classification`, so that probe and fine-tuning see the same.

    Args:
        checkpoint: A RUN or a checkpoint file.
        dataset: See `medssl.inference.labelled.labelled_volumes`, also for the options not named here.
        out: Folder for `probe.json` and the tables of probabilities, or None.
        probes: Of `linear`, `knn`, `prototypes`.
        labels: CSV of labels, for an INDEX or a STORE.
        kind: Kind of target.
        classes: Names of the classes in order.
        folds: Deal the patients out into so many folds.
        fold: Which of them validates.
        labelled: Use only so many of the training cases.
        shots: Cases of each class for the prototypes.
        stages: Stages whose pooled features are used.
        pooling: `mean` or `mean+max`.
        fit: How an image is brought to the patch.
        patch_size: What the encoder sees.
        options: What is done to every image.
        cache: Folder for prepared images that several calls share.
        control: Probe the untrained network too.
        seed: Of the untrained weights, folds and draws.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        quiet: Show no progress.

    Raises:
        UsageError: If there is no such probe, or options do not fit together.
        DataError: If the data set cannot be used, or features are not numbers.
    """
    for name in probes:
        if name not in PROBES:
            raise unknown_name("probe", name, PROBES)
    if not probes or any(count < 1 for count in shots):
        raise UsageError("Name at least one probe, and shots of at least 1.")
    resolved = resolve_device(device)
    with labelled_volumes(
        dataset, checkpoint, labels=labels, kind=kind, classes=classes, folds=folds, fold=fold, labelled=labelled,
        fit=fit, patch_size=patch_size, options=options or ImageOptions(quiet=quiet), cache=cache, seed=seed,
    ) as (volumes, targets, patch):  # fmt: skip
        encoders = frozen_pair(checkpoint, patch, control=control, seed=seed, device=resolved)
        features = {
            name: embed(frozen, volumes, stages=stages, pooling=pooling, boxes="centre", quiet=quiet)
            for name, frozen in encoders.items()
        }
    result = probe_features(features, targets, probes=probes, shots=shots, seed=seed)
    if out is not None:
        for probe, by_encoder in result.outcomes.items():
            for encoder, outcome in by_encoder.items():
                write_probabilities(out / f"{probe}_{encoder}.csv", outcome.table)
        write_json(out / "probe.json", result.to_json())
    return result


def probe_features(
    features: dict[str, Embeddings],
    targets: Targets,
    *,
    probes: Sequence[str] = PROBES,
    shots: Sequence[int] = SHOTS,
    seed: int = 0,
) -> ProbeResult:
    """Train and measure heads on features that are there already; see `evaluate_probe`.

    Args:
        features: By encoder, rows in the order of the cases of `targets`; `trained`, and `untrained` if there is one.
        targets: The cases.
        probes: Of `linear`, `knn`, `prototypes`.
        shots: Cases of each class for the prototypes.
        seed: Of folds and draws.

    Raises:
        DataError: If features are not numbers, or the training cases are of one class.
    """
    for embeddings in features.values():
        embeddings.require_finite()
    rows = {
        split: np.flatnonzero([case.split == split for case in targets.cases])
        for split in ("train", "validation", "test")
    }
    reported = "test" if len(rows["test"]) else "validation"
    if not len(rows[reported]) or not len(rows["train"]):
        raise DataError("A probe needs training cases and validation or test cases: see the column split.")
    kind: Any = targets.kind
    outcomes: dict[str, dict[str, Outcome]] = {}
    for probe, train in (("linear", linear_probe), ("knn", knn_probe)):
        if probe not in probes:
            continue
        for encoder, embeddings in features.items():
            select = _cases(embeddings, targets, rows["validation"]) if reported == "test" else None
            learn = _cases(embeddings, targets, rows["train"])
            chosen = train(learn, kind, len(targets.classes), select, seed)
            values = chosen.head(embeddings.features[rows[reported]].astype(np.float64))
            table = _table(values, targets, rows[reported])
            measured = measure_classification(table, kind, seed=seed)
            outcomes.setdefault(probe, {})[encoder] = Outcome(chosen.setting, measured, table)
    differences = {
        probe: metric_differences(found["trained"].table, found["untrained"].table, kind, seed=seed)
        for probe, found in outcomes.items()
        if {"trained", "untrained"} <= set(found)
    }
    few_shot: list[dict[str, Any]] = []
    if "prototypes" in probes and targets.kind == "multilabel":
        logger.warning("Nearest prototypes need one class per case: they are left out.")
    elif "prototypes" in probes:
        few_shot = _few_shot(features, targets, rows["train"], rows[reported], shots, seed)
    facts = {name: embeddings.facts for name, embeddings in features.items()}
    return ProbeResult(
        kind=targets.kind,
        classes=targets.classes,
        counts={split: len(index) for split, index in rows.items()},
        reported=reported,
        outcomes=outcomes,
        differences=differences,
        few_shot=few_shot,
        facts={"encoders": facts, "targets_sha256": targets.digest(), "seed": seed},
    )


def _few_shot(
    features: dict[str, Embeddings],
    targets: Targets,
    train: np.ndarray[Any, Any],
    reported: np.ndarray[Any, Any],
    shots: Sequence[int],
    seed: int,
) -> list[dict[str, Any]]:
    kind: Any = targets.kind
    found = []
    for count in sorted(set(shots)):
        values: dict[str, dict[str, list[float]]] = {}
        for encoder, embeddings in features.items():
            learn, judge = _cases(embeddings, targets, train), _cases(embeddings, targets, reported)
            for draw in range(DRAWS):
                head = prototypes(learn, kind, len(targets.classes), count, draw, seed)
                if head is None:
                    break
                metrics = classification_metrics(head(judge.features), judge.targets, kind)
                for name in ("auroc", "balanced_accuracy"):
                    values.setdefault(encoder, {}).setdefault(name, []).append(metrics[name])
        if not values:
            continue
        row: dict[str, Any] = {"shots": count, "draws": DRAWS}
        for encoder, by_metric in values.items():
            row |= {f"{encoder}/{name}": estimate(numbers, seed=seed) for name, numbers in by_metric.items()}
        if {"trained", "untrained"} <= set(values):
            for name, numbers in values["trained"].items():
                gaps = np.subtract(numbers, values["untrained"][name]).tolist()
                row[f"difference/{name}"] = estimate(gaps, seed=seed)
        found.append(row)
    return found


def _cases(embeddings: Embeddings, targets: Targets, rows: np.ndarray[Any, Any]) -> Cases:
    chosen = [targets.cases[row] for row in rows]
    return Cases(
        embeddings.features[rows].astype(np.float64), targets.array(chosen), tuple(case.patient_key for case in chosen)
    )


def _table(values: Any, targets: Targets, rows: np.ndarray[Any, Any]) -> Probabilities:
    chosen = [targets.cases[row] for row in rows]
    names = targets.classes
    clipped = np.clip(values, 0, 1)
    return Probabilities(
        cases=tuple(case.name for case in chosen),
        classes=names,
        values=clipped if targets.kind == "multilabel" else clipped / clipped.sum(axis=1, keepdims=True),
        patient_keys=tuple(case.patient_key for case in chosen),
        targets=tuple(SEPARATOR.join(names[number] for number in carried(case)) for case in chosen),
    )


def _cell(value: Any) -> str:
    if value is None or value.mean is None:
        return "-"
    return f"{value.mean:.3f}" + ("" if value.low is None else f" [{value.low:.3f}, {value.high:.3f}]")
