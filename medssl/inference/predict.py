"""Masks from a trained model: voxel for voxel those of stock nnU-Net, within a budget of memory.

Stock nnU-Net holds the logits of every class at both grids, and one class of them twice in float64. Here the image, its
resampled copy, the window and the mask live in a budget (`memory_mb`) or in scratch files in the output folder; logits
leave the sliding window row by row and become labels at once. For any number of voxels and classes the peak is

    libraries (0.9 GB) + memory_mb + a quarter of it for one slab's temporaries + the network's activations of one tile

A volume that fits is worked on whole, with nnU-Net's own functions. `tests/inference/test_memory.py` measures the
bound, `pipelines/benchmarks/prediction_memory.py` compares it with stock nnU-Net.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medssl import __version__
from medssl.errors import EXIT_ALL_REFUSED, EXIT_OK, EXIT_SOME_REFUSED, InputRefused, UsageError
from medssl.files import write_json, write_text
from medssl.inference.cases import Case, Refusal, find_cases
from medssl.inference.classify import ClassifySummary, classify
from medssl.inference.gates.watch import Gatekeeper, Watch, described, open_gatekeeper
from medssl.inference.grid import Grid
from medssl.inference.mask_formats import DicomSeg, MaskFormat, mask_format
from medssl.inference.model import SegmentationModel, load_model, resolve_device
from medssl.inference.name_map import check_name_map, write_name_map
from medssl.inference.preprocess import prepare
from medssl.inference.restore import restore
from medssl.inference.source import read_image
from medssl.inference.window import SlidingWindow
from medssl.inference.workspace import Workspace
from medssl.lock import claimed_folder
from medssl.progress import progress

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
TABLE = "predictions.json"
VOLUMES = "volumes.json"
NOTICE = "Research use only. Not a medical device: not for diagnosis or treatment."


@dataclass(frozen=True)
class Prediction:
    """One mask that was written.

    Args:
        case: Its name.
        mask: File name within the output folder.
        source: Names of the input files; nothing for DICOM.
        shape: Voxels of the source along its stored (x, y, z).
        spacing_mm: Voxel size along them.
        volumes_ml: Volume of each label or region in millilitres.
        flags: Codes of what was mended in the input.
        seconds: Time it took.
    """

    case: str
    mask: str
    source: tuple[str, ...]
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    volumes_ml: dict[str, float]
    flags: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return plain types."""
        return {
            **vars(self),
            "shape": list(self.shape),
            "spacing_mm": list(self.spacing_mm),
            "source": list(self.source),
            "flags": list(self.flags),
        }


@dataclass
class PredictSummary:
    """What became of each input."""

    out: Path
    predictions: list[Prediction] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    gatekeeper: Gatekeeper | None = None

    @property
    def exit_code(self) -> int:
        """0 if all went well, 3 if some inputs were refused, 4 if all were."""
        if not self.refused:
            return EXIT_OK
        return EXIT_SOME_REFUSED if self.predictions else EXIT_ALL_REFUSED

    def to_json(self) -> dict[str, Any]:
        """Return the content of `predictions.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "notice": NOTICE,
            **self.facts,
            "predictions": [prediction.to_json() for prediction in self.predictions],
            "refused": [vars(refusal) for refusal in self.refused],
            "gates": self.gates,
        }

    @property
    def gates(self) -> dict[str, Any] | None:
        """Return the gates' verdicts, or None where the model has no gates or they are off."""
        return None if self.gatekeeper is None else self.gatekeeper.facts()

    def __rich__(self) -> Any:
        """Return a table for the terminal."""
        from rich.console import Group
        from rich.table import Table

        table = Table(title="Predictions")
        names = list(self.predictions[0].volumes_ml) if self.predictions else []
        for name in ("case", *(f"{name} [ml]" for name in names), "seconds"):
            table.add_column(name, justify="left" if name == "case" else "right")
        for row in self.predictions:
            table.add_row(row.case, *(f"{row.volumes_ml[name]:.2f}" for name in names), f"{row.seconds:.1f}")
        refused = [f"refused: {row.source or 'a series'}: {row.code}: {row.detail}" for row in self.refused]
        verdicts = described(self.gates) if self.gates else []
        return Group(*([table] if self.predictions else []), *refused, *verdicts, NOTICE)


def predict(
    model: Path,
    input: Path,
    out: Path,
    *,
    device: str = "auto",
    step_size: float = 0.5,
    mirroring: bool | None = None,
    memory_mb: int | None = None,
    format: str = "nifti",
    codes: Path | None = None,
    empty_frames: bool = False,
    gates: str = "report",
    name_map: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> PredictSummary | ClassifySummary:
    """Segment or classify a volume, a folder of volumes, or DICOM series.

    With a classification RUN the result is a table of probabilities; see `medssl.inference.classify`. Options of the
    sliding window belong to segmentation, where each mask lies on the grid of its source.

    Writes `<case>.nii.gz` or `<case>.dcm`, `predictions.json`, and the volumes in millilitres as `volumes.json` and
    `volumes.csv` into `out`. An input that cannot be used costs one row in `refused` and nothing else. If the model has
    gates (`medssl calibrate`), each case gets a verdict with reasons in `gates.json`.

    A DICOM SEG belongs to the patient's study: it alone carries what the source says of both.

    Args:
        model: A classification RUN, a segmentation RUN, or any trained nnU-Net model folder; of several folds the mean
            is taken.
        input: A NIfTI, NRRD, MetaImage or MGH file, a folder of them, or a DICOM file or folder of series.
        out: Output folder.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        step_size: Distance of the window's tiles in tile sizes, in (0, 1].
        mirroring: None mirrors along the axes the checkpoint allows, False never; True demands that it allows some.
        memory_mb: Working memory in MiB for arrays that grow with the volume; 2048 by default.
        format: `nifti`, or `dicom-seg` for DICOM series: a binary SEG on the grid of its source.
        codes: YAML file of category and type of labels for DICOM SEG, looked up before `segment_codes.yaml`.
        empty_frames: Write also the frames of a DICOM SEG that have no content; some viewers place the others better.
        gates: `report` judges each case where the model has gates and writes its mask all the same; `enforce` refuses
            strange cases before they are predicted; `off` does not look.
        name_map: CSV file, outside of `out`, that tells which mask was made of which input files.
        overwrite: Replace the masks of an earlier prediction in `out`.
        quiet: Show no progress.

    Raises:
        UsageError: If an option does not fit, `out` is not empty, mirroring is asked for and not allowed, or DICOM SEG
            is asked for and the input is not DICOM.
        CheckpointError: If the model cannot be used.
    """
    from medssl.transfer.classifier_files import is_classification
    from medssl.transfer.nnunet import nnunet_environment

    masks = mask_format(format, codes, empty_frames)
    if is_classification(model):
        if isinstance(masks, DicomSeg):
            raise UsageError(f"--format {format} is for masks: this model is a classifier.")
        if gates != "report" or name_map is not None:
            raise UsageError("--gates and --name-map are for masks: this model is a classifier.")
        if mirroring is not None or step_size != 0.5 or memory_mb is not None:
            raise UsageError("--mirroring, --step-size and --memory-mb are for masks: this model is a classifier.")
        _refuse_overlap(input, out)
        return classify(model, input, out, device=device, overwrite=overwrite, quiet=quiet)
    if not 0 < step_size <= 1:
        raise UsageError(f"--step-size {step_size}: must be above 0 and at most 1. nnU-Net's default is 0.5.")
    if memory_mb is not None and memory_mb < 1:
        raise UsageError(f"--memory-mb {memory_mb}: must be positive.")
    with nnunet_environment(), ExitStack() as held:
        network = load_model(model, resolve_device(device))
        axes = _mirroring(network, mirroring)
        cases, refused = find_cases(input, network.channels)
        masks.check(cases, input)
        keeper = open_gatekeeper(model, gates, network, step_size, axes)
        check_name_map(name_map, out)
        _refuse_overlap(input, out)
        held.enter_context(
            claimed_folder(out, resume=None, overwrite=overwrite, owned=lambda folder: (folder / TABLE).is_file())
        )
        facts = {
            "medssl_version": __version__,
            "model": {
                "sha256": network.sha256,
                "labels": {name: list(values) for name, values in network.label_values.items()},
            },
            "options": {
                "step_size": step_size,
                "mirroring_axes": list(axes),
                "device": network.device.type,
                "format": format,
            },
        }
        facts |= masks.facts(network)
        summary = PredictSummary(out, [], list(refused), facts, keeper)
        for refusal in refused:
            keeper.refused(refusal.source, refusal.code, refusal.detail)
        write_json(out / TABLE, summary.to_json())  # from now on --overwrite knows the folder as ours
        with progress("Predicting", len(cases), quiet=quiet) as advance:
            for case in cases:
                try:
                    watch = keeper.watch(case.name)
                    done = _predict_case(case, network, axes, step_size, memory_mb, out, masks, watch, advance)
                    summary.predictions.append(done)
                except InputRefused as error:
                    logger.warning("%s is refused: %s", case.name, error)
                    summary.refused.append(Refusal(", ".join(case.source) or case.name, error.code, error.detail))
                    keeper.refused(case.name, error.code, error.detail)
                write_json(out / TABLE, summary.to_json())
                advance(1, case.name)
        write_json(out / TABLE, summary.to_json())
        write_text(out / "volumes.csv", _volumes_csv(summary.predictions, list(network.label_values)))
        write_json(out / VOLUMES, _volumes_json(summary.predictions))
        keeper.write(out)
        if name_map is not None:
            write_name_map(name_map, cases, {row.case: row.mask for row in summary.predictions}, input)
    return summary


def _predict_case(
    case: Case,
    model: SegmentationModel,
    axes: tuple[int, ...],
    step_size: float,
    memory_mb: int | None,
    out: Path,
    masks: MaskFormat,
    watch: Watch,
    advance: Callable[..., None],
) -> Prediction:
    began = time.monotonic()
    write = masks.writer(case, model)
    workspace = Workspace(memory_mb, out)
    reorient = model.plans.plans["image_reader_writer"] == "NibabelIOWithReorient"
    image = read_image(case.open(), reorient, workspace)
    watch.image(image)
    grid, flags = image.grid, image.flags
    prepared = prepare(image.array, image.spacing, model, workspace)
    del image  # its array is either the network's input itself or no longer needed
    watch.prepared(prepared)
    window = SlidingWindow(model, prepared.data.shape[1:], step_size, axes, watch.observer)
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        advance(0, f"{case.name}: tile {seen} of {window.tiles}")

    mask = restore(watch.rows(window.rows(prepared.data, workspace, tick)), prepared, model, workspace)
    watch.mask(mask, grid)
    del prepared
    name = write(out, mask, grid, reorient)
    if not any(bool(row.any()) for row in mask):
        flags = tuple(sorted({*flags, "mask_empty"}))
    return Prediction(
        case=case.name,
        mask=name,
        source=case.source,
        shape=grid.shape,
        spacing_mm=_spacing(grid),
        volumes_ml=_volumes(mask, grid, model),
        flags=flags,
        seconds=round(time.monotonic() - began, 3),
    )


def _mirroring(model: SegmentationModel, wanted: bool | None) -> tuple[int, ...]:
    if wanted and not model.mirroring_axes:
        raise UsageError(
            "--mirroring: this model was trained without mirroring (its laterality policy forbids it), and mirrored "
            "inputs would confuse left and right. Leave the option away."
        )
    return () if wanted is False else model.mirroring_axes


def _refuse_overlap(input: Path, out: Path) -> None:
    source = input.resolve() if input.is_dir() else input.resolve().parent
    if out.resolve() == source or out.resolve() in source.parents:
        raise UsageError(f"--out {out} holds the input; masks would mix with images. Choose another --out.")


def _spacing(grid: Grid) -> tuple[float, float, float]:
    x, y, z = (round(float(side), 6) for side in np.linalg.norm(grid.affine[:3, :3], axis=0))
    return x, y, z


def _volumes(mask: np.ndarray[Any, Any], grid: Grid, model: SegmentationModel) -> dict[str, float]:
    counts = np.zeros(1 << 16, np.int64)
    for row in mask:
        present, number = np.unique(row, return_counts=True)
        counts[present] += number
    return {
        name: round(float(counts[list(values)].sum()) * grid.voxel_ml, 6) for name, values in model.label_values.items()
    }


def _volumes_csv(predictions: list[Prediction], labels: list[str]) -> str:
    import csv
    import io

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *(f"{label}_ml" for label in labels)])
    for row in predictions:
        writer.writerow([row.case, *(row.volumes_ml[label] for label in labels)])
    return text.getvalue()


def _volumes_json(predictions: list[Prediction]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "notice": NOTICE,
        "unit": "ml",
        "cases": {row.case: row.volumes_ml for row in predictions},
    }
