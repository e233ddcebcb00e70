"""All folds of a classification: a RUN for each below one folder, out-of-fold probabilities, and their ensemble."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medssl.config import to_yaml
from medssl.data.probabilities import Probabilities, read_probabilities, write_probabilities
from medssl.data.targets import Targets
from medssl.errors import DataError, MedsslError, UsageError
from medssl.files import write_json, write_text
from medssl.lock import claimed_folder
from medssl.training.environment import describe_environment
from medssl.training.scores import classification_metrics
from medssl.transfer import classification_files as files
from medssl.transfer.classifier_files import KIND, fold_folders, number_of_folds

SUMMARY = "folds.json"


def train_folds(
    out: Path, parts: Sequence[Targets], train: Callable[[Path, int], Path], *, resume: bool, overwrite: bool
) -> Path:
    """Train each fold that is not done, then put their validation cases together.

    Every case but those of the split `test` validates once, so that `validation/probabilities.csv` holds out-of-fold
    probabilities; `test/probabilities.csv` holds the mean over the folds, as `medssl predict` does of new images.

    Args:
        out: The folder; fold n is the RUN `fold_n` in it.
        parts: The targets, divided for each fold.
        train: Trains a fold into a folder; goes on with what is there.
        resume: Go on in `out`.
        overwrite: Replace what is in `out`.

    Returns:
        `out`; it is a classification RUN itself, of all folds.

    Raises:
        UsageError: If `out` was begun with another number of folds, or is one fold.
    """
    folds = len(parts)
    with claimed_folder(out, resume=resume, overwrite=overwrite, owned=files.is_ours):
        if resume and (out / "run.json").is_file() and number_of_folds(out) != folds:
            before = number_of_folds(out)
            begun = "as a single run" if before is None else f"with {before} folds"
            raise UsageError(
                f"--resume: {out} was begun {begun}, not with {folds} folds. Give the same --folds (and --fold), or "
                "another --out."
            )
        # A finished RUN stays one: a fold that refuses other settings has changed nothing.
        if not (out / "run.json").is_file():
            _write_run(out, parts[0], folds, finished=False)
        for number, folder in enumerate(fold_folders(out, folds)):
            try:
                train(folder, number)
            except MedsslError:
                # What cannot be used at all leaves nothing; what has begun stays for --resume.
                if not resume and not any(fold.exists() for fold in fold_folders(out, folds)):
                    shutil.rmtree(out)
                raise
        _gather(out, parts)
        _write_run(out, parts[0], folds, finished=True)
    return out


def _gather(out: Path, parts: Sequence[Targets]) -> None:
    folders = fold_folders(out, len(parts))
    tables = [read_probabilities(folder / "validation" / "probabilities.csv") for folder in folders]
    rows = sorted((case, number, row) for number, table in enumerate(tables) for row, case in enumerate(table.cases))
    whole = Probabilities(
        cases=tuple(case for case, _, _ in rows),
        classes=tables[0].classes,
        values=np.stack([tables[number].values[row] for _, number, row in rows]),
        patient_keys=tuple(tables[number].patient_keys[row] for _, number, row in rows),
        targets=tuple(tables[number].targets[row] for _, number, row in rows),
    )
    if len(set(whole.cases)) != len(whole.cases):
        raise DataError(f"{out}: a case validates in two folds. Train the folds again with --overwrite.")
    write_probabilities(out / "validation" / "probabilities.csv", whole)
    if all((folder / "test" / "probabilities.csv").is_file() for folder in folders):
        tested = [read_probabilities(folder / "test" / "probabilities.csv") for folder in folders]
        first = tested[0]
        if any(table.cases != first.cases for table in tested):
            raise DataError(f"{out}: the folds have other test cases. Train them again with --overwrite.")
        mean = np.mean([table.values for table in tested], axis=0)
        averaged = Probabilities(first.cases, first.classes, mean, first.patient_keys, first.targets)
        write_probabilities(out / "test" / "probabilities.csv", averaged)
    write_json(out / SUMMARY, _summary(parts, tables))
    recipe = yaml.safe_load((folders[0] / files.RECIPE).read_text())
    text = "# Written by medssl finetune classification; the settings of every fold.\n"
    write_text(out / files.RECIPE, text + to_yaml({**recipe, "fold": None}))
    write_json(out / "environment.json", describe_environment())


def _summary(parts: Sequence[Targets], tables: Sequence[Probabilities]) -> dict[str, Any]:
    """Return each fold's metrics, their mean and deviation; intervals are those of all cases together."""
    kind: Any = parts[0].kind
    found = []
    for targets, table in zip(parts, tables, strict=True):
        by_name = {case.name: case for case in targets.cases}
        truth = targets.array([by_name[name] for name in table.cases])
        values = classification_metrics(table.values, truth, kind, table.classes)
        found.append({name: value for name, value in values.items() if "/" not in name})
    columns = {name: np.array([values[name] for values in found]) for name in found[0]}
    spread = {
        name: {
            "mean": _plain(column[np.isfinite(column)].mean() if np.isfinite(column).any() else np.nan),
            "deviation": _plain(column[np.isfinite(column)].std(ddof=1) if np.isfinite(column).sum() > 1 else np.nan),
        }
        for name, column in columns.items()
    }
    rows = [
        {"fold": number, "cases": len(table.cases), "metrics": {name: _plain(value) for name, value in values.items()}}
        for number, (table, values) in enumerate(zip(tables, found, strict=True))
    ]
    return {"kind": "classification folds", "target_kind": kind, "folds": rows, "over_folds": spread}


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _write_run(out: Path, targets: Targets, folds: int, *, finished: bool) -> None:
    write_json(
        out / "run.json",
        {
            "kind": KIND,
            "schema_version": files.SCHEMA_VERSION,
            "method": "finetune",
            "target_kind": targets.kind,
            "classes": list(targets.classes),
            "folds": folds,
            "cases": len(targets.cases),
            "finished": finished,
        },
    )
