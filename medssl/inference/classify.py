"""Probabilities of whole images from a classification RUN, as CSV."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from medssl import __version__
from medssl.archive.load import SeriesFound, find_series
from medssl.data.probabilities import Probabilities, write_probabilities
from medssl.errors import EXIT_ALL_REFUSED, EXIT_OK, EXIT_SOME_REFUSED, DataError, InputRefused
from medssl.files import write_json
from medssl.inference.cases import Refusal
from medssl.inference.model import resolve_device
from medssl.lock import claimed_folder
from medssl.progress import progress
from medssl.training.temperature import probabilities_of
from medssl.transfer.classifier_files import TrainedClassifier, load_members
from medssl.transfer.image_fit import fit_image, place
from medssl.transfer.images import prepare_image

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
TABLE = "predictions.json"
CSV = "probabilities.csv"
NOTICE = "Research use only. Not a medical device: not for diagnosis or treatment."


@dataclass
class ClassifySummary:
    """What became of each input.

    Args:
        out: Output folder.
        classes: Names of the classes.
        rows: Case and its probabilities, in the order of the input.
        refused: Inputs that could not be used.
        facts: What the prediction was made with.
    """

    out: Path
    classes: tuple[str, ...]
    rows: list[tuple[str, NDArray[np.float64]]] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0 if all went well, 3 if some inputs were refused, 4 if all were."""
        if not self.refused:
            return EXIT_OK
        return EXIT_SOME_REFUSED if self.rows else EXIT_ALL_REFUSED

    def to_json(self) -> dict[str, Any]:
        """Return the content of `predictions.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "notice": NOTICE,
            **self.facts,
            "predictions": [
                {"case": case, "probabilities": dict(zip(self.classes, values.tolist(), strict=True))}
                for case, values in self.rows
            ],
            "refused": [vars(refusal) for refusal in self.refused],
        }

    def __rich__(self) -> Any:
        """Return a table for the terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title="Probabilities")
        for name in ("case", *self.classes):
            table.add_column(name, justify="left" if name == "case" else "right", overflow="fold")
        for case, values in self.rows:
            table.add_row(case, *(f"{value:.3f}" for value in values))
        refused = [f"refused: {row.source or 'a series'}: {row.code}: {row.detail}" for row in self.refused]
        return Group(*([table] if self.rows else []), *refused, NOTICE)


def classify(
    model: Path, input: Path, out: Path, *, device: str = "auto", overwrite: bool = False, quiet: bool = False
) -> ClassifySummary:
    """Predict the class of an image, of each image in a folder, or of DICOM series.

    Writes `probabilities.csv` (a row per image, a column `p_<class>` per class, calibrated by the model's temperature)
    and `predictions.json` into `out`. Of a RUN of several folds the probabilities are the mean of those of its folds.
    Image files go by their path within the input, DICOM series by their pseudonym.
    An input that cannot be used costs one row in `refused` and nothing else.

    Args:
        model: A finished classification RUN, one of its checkpoints, or a RUN of all folds.
        input: A picture, a volume, a folder of them at any depth, or a DICOM file or folder of series.
        out: Output folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        overwrite: Replace an earlier prediction in `out`.
        quiet: Show no progress.

    Raises:
        UsageError: If an option does not fit or `out` is not empty.
        CheckpointError: If the model cannot be used.
        DataError: If there is nothing to predict.
    """
    members, target = load_members(model), resolve_device(device)
    for member in members:
        member.classifier.to(target)
    trained = members[0]
    found = find_series(input)
    if not found.series and not found.refused:
        raise DataError(f"--input {input} holds no image.")
    with claimed_folder(out, resume=None, overwrite=overwrite, owned=lambda folder: (folder / TABLE).is_file()):
        facts = {
            "medssl_version": __version__,
            "model": {"sha256": [member.sha256 for member in members], "classes": list(trained.classes),
                      "target_kind": trained.kind, "temperature": [member.temperature for member in members]},
            "options": {"device": target.type},
        }  # fmt: skip
        summary = ClassifySummary(out, trained.classes, [], _refused(found.refused), facts)
        write_json(out / TABLE, summary.to_json())  # from now on --overwrite knows the folder as ours
        root = input if input.is_dir() else input.parent
        began = time.monotonic()
        with progress("Predicting", len(found.series), quiet=quiet) as advance:
            for series in found.series:
                source = "" if series.task.kind == "dicom" else series.files[0].relative_to(root).as_posix()
                name = source or series.name
                try:
                    summary.rows.append((name, probabilities_of_volume(members, series, target)))
                except InputRefused as error:
                    logger.warning("%s is refused: %s", name, error)
                    summary.refused.append(Refusal(source, error.code, error.detail))
                advance(1, name)
        summary.facts["seconds"] = round(time.monotonic() - began, 3)
        write_json(out / TABLE, summary.to_json())
        if summary.rows:
            names = tuple(name for name, _ in summary.rows)
            write_probabilities(
                out / CSV, Probabilities(names, trained.classes, np.stack([p for _, p in summary.rows]))
            )
    return summary


def probabilities_of_volume(
    members: Sequence[TrainedClassifier], series: SeriesFound, device: torch.device
) -> NDArray[np.float64]:
    """Return the probability of each class for one volume, the mean over classifiers that see the same. Shape: (K,).

    Raises:
        InputRefused: If it cannot be decoded or is not like the images that were trained on.
    """
    trained = members[0]
    array, spacing, background = prepare_image(series.load(), trained.input, series.name)
    if array.shape[0] != trained.channels:
        raise InputRefused("channels_differ", f"{array.shape[0]} channels; the model takes {trained.channels}")
    flat, patch = array.shape[1] == 1, trained.patch_size
    if flat != (len(patch) == 2):
        raise InputRefused(
            "dimensions_unsupported", f"{'a single slice' if flat else 'a volume'}; the model is {len(patch)}D"
        )
    three = (*(1,) * (3 - len(patch)), *patch)
    fitted, _ = fit_image(array, spacing, three, three, trained.fit)
    window, _, _ = place(fitted, three, background)
    image = torch.from_numpy(window)[None].to(device)
    found = []
    for member in members:
        with torch.inference_mode():
            logits = member.classifier(image[:, :, 0] if flat else image).double().cpu().numpy()
        if not np.isfinite(logits).all():
            raise InputRefused("output_not_finite", "the classifier's output is NaN or infinite")
        found.append(probabilities_of(logits, member.kind, member.temperature)[0])  # type: ignore[arg-type]
    mean: NDArray[np.float64] = np.mean(found, axis=0)
    return mean


def _refused(rows: list[tuple[str, str, str]]) -> list[Refusal]:
    """Return the files that are no image; paths of DICOM files may name the patient, so only kinds are told."""
    tally = Counter((code, detail) for _, code, detail in rows)
    return [Refusal(f"{count} file(s)", code, detail) for (code, detail), count in sorted(tally.items())]
