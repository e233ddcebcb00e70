"""`medssl dataset from-index`: volumes of an archive with a DICOM SEG or RTSTRUCT become an nnU-Net raw data set."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medssl.archive.codes import explain
from medssl.archive.dataset_write import TABLE
from medssl.archive.label_cases import KINDS, LabelledTask, LabelObject, read_names, write_labelled
from medssl.archive.load import Index, open_index
from medssl.archive.sandbox import HEADER_LIMITS, VOLUME_LIMITS, Pool
from medssl.errors import (
    EXIT_ALL_REFUSED,
    EXIT_OK,
    EXIT_SOME_REFUSED,
    DataError,
    MedsslError,
    UsageError,
    unknown_name,
)
from medssl.files import prepare_output_folder, write_json, write_text
from medssl.progress import progress

#: What became of every object and volume; an output folder that has it was written by this command.
REPORT = "labels.json"
SCHEMA_VERSION = 1
Missing = Literal["refuse", "background"]


@dataclass(frozen=True)
class Refusal:
    """One object or volume that gives no case.

    Attributes:
        key: Volume id, or series key of the object.
        code: Why.
        detail: What was found.
    """

    key: str
    code: str
    detail: str


@dataclass
class LabelDataset:
    """What was written.

    Attributes:
        out: The data set.
        labels: Value of each label.
        voxels: Voxels of each label, by case.
        refused: What gives no case.
    """

    out: Path
    labels: dict[str, int] = field(default_factory=dict)
    voxels: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if every object gave its labels, 3 if some were refused, 4 if there is no case."""
        if not self.voxels:
            return EXIT_ALL_REFUSED
        return EXIT_SOME_REFUSED if self.refused else EXIT_OK

    def to_json(self) -> dict[str, Any]:
        """Return the content of `labels.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "labels": self.labels,
            "cases": self.voxels,
            "refused": [vars(row) for row in self.refused],
        }

    def __rich__(self) -> Any:
        """Return a text for the terminal."""
        named = [name for name in self.labels if name != "background"]
        lines = [f"{len(self.voxels)} cases with {len(named)} labels: {', '.join(named) or 'none'}"]
        for code, count in sorted(Counter(row.code for row in self.refused).items()):
            lines.append(f"{count} refused: {code}: {explain(code)}")
        if self.voxels:
            lines.append("Names of labels were taken from the archive: look at dataset.json before you share it.")
        return "\n".join(lines)


def dataset_from_index(
    index: Path,
    out: Path,
    *,
    labels: Sequence[str] | None = None,
    priority: Sequence[str] | None = None,
    missing: Missing = "refuse",
    select: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> LabelDataset:
    """Write the volumes of an index that have a DICOM SEG or RTSTRUCT as an nnU-Net raw data set.

    Labels are called as their segments or regions are; all objects of a volume are united. A volume is refused, with
    a code, if an object does not lie on its grid, if labels overlap, or if one is missing.

    Writes `imagesTr/<volume_id>_0000.nii.gz`, `labelsTr/<volume_id>.nii.gz`, `dataset.json`, `cases.csv` (case, patient
    key, split) and `labels.json` (what became of every object and volume).

    Args:
        index: An INDEX with its private folder; the sources must be where they were.
        out: The data set.
        labels: Names to take, in the order of their values; by default all names, in alphabetical order.
        priority: Names of which the earlier wins where two overlap, and over all that are not listed.
        missing: What it means that a volume has no region of a name: `refuse` leaves the volume out, `background`
            takes the label as absent.
        select: SQL condition on the volumes.
        workers: Processes; by default as many as the machine gives this one.
        overwrite: Replace what is in `out`.
        quiet: Show no progress.

    Returns:
        What was written and what was refused.

    Raises:
        UsageError: If there is no such index, no object, no such label, or the volumes are of several modalities.
        DataError: If the index or its sources are not whole.
        MedsslError: If the output cannot be written.
    """
    if missing not in ("refuse", "background"):
        raise unknown_name("meaning of --missing", missing, ("refuse", "background"))
    known = open_index(index)
    target = out.resolve()
    if target == index.resolve() or target in index.resolve().parents:
        raise UsageError(f"--out {out} holds the index. Choose another --out.")
    volumes = {row["volume_id"]: row for row in known.rows(select).iter_rows(named=True)}
    result = LabelDataset(out)
    with Pool(workers or len(os.sched_getaffinity(0)), VOLUME_LIMITS) as pool:
        drawn = _objects(known, volumes, pool, result)
        found = sorted({name for objects in drawn.values() for _, names in objects for name in names})
        wanted = _wanted(found, labels, priority or ())
        cases = _cases(drawn, wanted, missing, result)
        modality = _modality([volumes[name]["modality"] for name in cases])
        prepare_output_folder(out, resume=None, overwrite=overwrite, owned=lambda folder: (folder / REPORT).is_file())
        result.labels = {"background": 0, **{name: value for value, name in enumerate(wanted, 1)}}
        write_json(out / REPORT, result.to_json())  # from now on --overwrite knows the folder as ours
        tasks = (
            LabelledTask(
                name,
                known.task(name),
                tuple(objects),
                tuple(wanted),
                tuple(priority or ()),
                str(target / "imagesTr" / f"{name}_0000.nii.gz"),
                str(target / "labelsTr" / f"{name}.nii.gz"),
            )
            for name, objects in cases.items()
        )
        _write(tasks, len(cases), pool, result, quiet)
    result.voxels = dict(sorted(result.voxels.items()))
    result.refused.sort(key=lambda row: (row.code, row.key))
    if result.voxels:
        _write_tables(result, volumes, modality)
    write_json(out / REPORT, result.to_json())
    return result


_Drawn = dict[str, list[tuple[LabelObject, list[str]]]]


def _objects(known: Index, volumes: dict[str, Any], pool: Pool, result: LabelDataset) -> _Drawn:
    """Return the objects of each volume with the names of their regions."""
    table = known.related()
    if "volume_ids" not in table.columns:
        raise DataError(f"{known.path} was written by an older medssl: run `medssl index` on it with --resume.")
    rows = [row for row in table.iter_rows(named=True) if row["kind"] in KINDS]
    if not rows:
        raise UsageError(f"{known.path} has no DICOM SEG and no RTSTRUCT. Index the folder that holds them.")
    volume_of: dict[LabelObject, str] = {}
    for row in rows:
        found = [name for name in row["volume_ids"] if name in volumes]
        if len(found) == 1:
            file = known.related_file(row["source"], row["relative_path"])
            volume_of[LabelObject(row["kind"], file, row["series_key"])] = found[0]
        else:
            code = "label_of_several_volumes" if found else "label_without_volume"
            result.refused.append(Refusal(row["series_key"], code, f"{row['kind']}: {len(found)} volumes"))
    drawn: _Drawn = {}
    for item, outcome in pool.map(read_names, list(volume_of), limits=HEADER_LIMITS):
        if outcome.code:
            result.refused.append(Refusal(item.key, outcome.code, outcome.detail))
        else:
            drawn.setdefault(volume_of[item], []).append((item, outcome.value))
    return {name: sorted(objects, key=lambda pair: pair[0].file.number) for name, objects in sorted(drawn.items())}


def _wanted(found: Sequence[str], labels: Sequence[str] | None, priority: Sequence[str]) -> list[str]:
    wanted = list(found if labels is None else labels)
    if len(set(wanted)) != len(wanted):
        raise UsageError(f"--labels {','.join(wanted)} names one twice.")
    for option, names in (("--labels", wanted), ("--priority", priority)):
        for name in names:
            if name not in found and found:
                raise unknown_name(f"label for {option}", name, found)
    if "background" in wanted:
        raise UsageError("A region is called 'background', which nnU-Net keeps for 0. Leave it out with --labels.")
    return wanted


def _cases(
    drawn: _Drawn, wanted: Sequence[str], missing: Missing, result: LabelDataset
) -> dict[str, list[LabelObject]]:
    """Return the objects to be painted for each volume that has them all."""
    cases = {}
    for volume, objects in drawn.items():
        counted = Counter(name for _, names in objects for name in set(names) if name in wanted)
        repeated = [name for name in wanted if counted[name] > 1]
        absent = [name for name in wanted if not counted[name]]
        if repeated:
            result.refused.append(
                Refusal(volume, "label_repeated", f"'{repeated[0]}' in {counted[repeated[0]]} objects")
            )
        elif len(absent) == len(wanted) or (absent and missing == "refuse"):
            result.refused.append(Refusal(volume, "label_missing", f"no '{absent[0]}' and {len(absent) - 1} others"))
        else:
            cases[volume] = [item for item, names in objects if set(names) & set(wanted)]
    return cases


def _modality(found: Sequence[str]) -> str:
    kinds = sorted(set(found))
    if len(kinds) > 1:
        raise UsageError(
            f"The labelled volumes are of several modalities ({', '.join(kinds)}): a model takes one. Use --select "
            f"\"modality = '{kinds[0]}'\"."
        )
    return kinds[0] if kinds else ""


def _write(tasks: Iterator[LabelledTask], count: int, pool: Pool, result: LabelDataset, quiet: bool) -> None:
    with progress("Writing cases", count, quiet=quiet) as advance:
        for task, outcome in pool.map(write_labelled, tasks):
            if outcome.code:
                result.refused.append(Refusal(task.name, outcome.code, outcome.detail))
            elif outcome.value.problem:
                raise MedsslError(outcome.value.problem)
            else:
                result.voxels[task.name] = outcome.value.voxels
            advance(1, task.name)


def _write_tables(result: LabelDataset, volumes: dict[str, Any], modality: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "patient", "split"])
    writer.writerows([name, volumes[name]["patient_key"], volumes[name]["split"]] for name in result.voxels)
    write_text(result.out / TABLE, text.getvalue())
    write_json(
        result.out / "dataset.json",
        {
            "name": result.out.name,
            "channel_names": {"0": modality},
            "labels": result.labels,
            "numTraining": len(result.voxels),
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "NibabelIOWithReorient",
        },
    )
