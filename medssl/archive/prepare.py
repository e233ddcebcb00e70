"""`medssl dataset prepare`: what a user downloaded is checked against its manifest, then written for training."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medssl.archive.codes import explain
from medssl.archive.dataset_arrays import ArraysTask, check_arrays
from medssl.archive.dataset_cases import CaseTask, check_case
from medssl.archive.dataset_files import Content, Problem, look, united
from medssl.archive.dataset_write import write_files, write_nnunet, write_tables
from medssl.archive.datasets import Manifest, manifest
from medssl.archive.find import absolute
from medssl.archive.index import index
from medssl.archive.load import find_series
from medssl.archive.sandbox import VOLUME_LIMITS, Pool, run_limited
from medssl.archive.tasks import VolumeTask
from medssl.errors import (
    EXIT_ALL_REFUSED,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_SOME_REFUSED,
    InputRefused,
    UsageError,
)
from medssl.files import prepare_output_folder, write_json
from medssl.progress import progress

CARD = "manifest.json"
#: Paths that are named for one kind of problem.
_SHOWN = 20
_REMEDIES = {
    "label_value": "Download the mask again; if it is the release's own, report it and use --partial to leave it out.",
    "label_name": "Remove the file, or use --partial to leave the case out.",
    "grid": "Download both again, or use --partial to leave the case out.",
    "channels": "Compare with the release's own description of its channels.",
    "npz_pickled": "Do not open it with anything. Download it from its source.",
    "npz_damaged": "Download it again.",
    "npz_missing": "Download the release's own file, or use --partial to take this one.",
    "npz_shape": "Download the release's own file.",
    "npz_type": "Download the release's own file.",
    "npz_labels": "Download the release's own file.",
    "count": "Download the release's own file, or use --partial to take this one.",
}


@dataclass(frozen=True)
class Prepared:
    """What became of a data set.

    Attributes:
        manifest: Its manifest.
        layout: The form in which it was found.
        out: Where it was written to.
        written: Number of cases written.
        usable: Number of cases without a problem.
        problems: Everything that is wrong.
        others: Files under the source that are not part of the set.
        indexed: Summary of the index, where one was made.
    """

    manifest: Manifest
    layout: str
    out: Path
    written: int
    usable: int
    problems: list[Problem] = field(default_factory=list)
    others: int = 0
    indexed: Any = None

    @property
    def exit_code(self) -> int:
        """Return 0 if nothing is wrong, 3 if what is whole was written, 1 if nothing was, 4 if nothing could be."""
        if not self.usable:
            return EXIT_ALL_REFUSED
        if self.problems and not self.written:
            return EXIT_FAILURE
        if self.indexed is not None and self.indexed.exit_code:
            return int(self.indexed.exit_code)
        return EXIT_SOME_REFUSED if self.problems else EXIT_OK

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain types."""
        return {
            "name": self.manifest.name,
            "layout": self.layout,
            "out": str(self.out),
            "written": self.written,
            "usable": self.usable,
            "others": self.others,
            "problems": [asdict(problem) for problem in self.problems],
            "leaks": list(self.manifest.leaks),
            "licence": self.manifest.licence.name,
            "index": None if self.indexed is None else self.indexed.to_json(),
            "exit_code": self.exit_code,
        }

    def __rich__(self) -> str:
        """Return the same lines for rich, which would otherwise print the fields."""
        return str(self).replace("[", r"\[")

    def __str__(self) -> str:
        """Return what was found in lines: every problem with its path and remedy."""
        entry = self.manifest
        lines = [f"{entry.title}: {self.usable} usable, found as '{self.layout}'"]
        same: dict[tuple[str, str, str], list[str]] = {}
        for problem in self.problems:
            same.setdefault((problem.kind, problem.detail, problem.remedy), []).append(problem.path)
        for (kind, detail, remedy), paths in same.items():
            more = f" and {len(paths) - _SHOWN} more (--json names all)" if len(paths) > _SHOWN else ""
            lines.append(f"  {kind}: {', '.join(paths[:_SHOWN])}{more}: {detail} {remedy}".rstrip())
        if self.others:
            lines.append(f"  {self.others} other files are not part of the set and were left alone")
        lines += [f"  Known of this set: {leak}" for leak in entry.leaks]
        lines.append(f"  Licence: {entry.licence.name} ({entry.licence.url or entry.ask})")
        if not self.written:
            kinds = ", ".join(f"{kind} {number}" for kind, number in Counter(p.kind for p in self.problems).items())
            lines.append(f"Nothing was written ({kinds}). Mend it, or use --partial to write what is whole.")
        else:
            lines.append(f"Written to {self.out}: {self.written}")
        return "\n".join(lines)


def prepare_dataset(
    name: str,
    source: Path,
    out: Path,
    *,
    files: Literal["copy", "hardlink"] = "copy",
    partial: bool = False,
    workers: int | None = None,
    key_file: Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Prepared:
    """Check a downloaded public data set against its manifest and write it for training.

    Every image and mask is decoded once; missing files, unexpected counts, values and checksums are listed. Only a set
    without any problem is written, unless `partial` is given. The source is never modified.

    Written is, as the manifest says: an nnU-Net raw data set (`imagesTr`, `labelsTr`, `dataset.json`; parts without
    masks in `imagesTs` or `imagesUnlabelled`), an INDEX, images with a table of classes (`labels.csv`), or the .npz.
    Beside them stand `cases.csv` (case, patient, the release's split, the literature's split) and the manifest.

    Args:
        name: Of the data set; see `medssl list datasets`.
        source: What was downloaded and unpacked: a folder, or one file.
        out: The folder to write.
        files: `copy` copies what needs no change; `hardlink` links it, which costs no space but lets a program that
            writes into `out` in place change the source. Both write anew what needs a change.
        partial: Write what is whole although something is wrong or missing.
        workers: Processes; by default as many as the machine gives this one.
        key_file: Secret of the pseudonyms of an INDEX.
        overwrite: Replace what is in `out`.
        quiet: Show no progress.

    Returns:
        What was found and written.

    Raises:
        UsageError: If the name, the source or an option does not exist.
        DataError: If the source holds nothing of the set.
        MedsslError: If the output cannot be written.
    """
    entry = manifest(name)
    _check_places(source, out)
    content = look(entry, source)
    root = source.resolve() if source.is_dir() else source.resolve().parent
    kind = content.layout.writes
    problems = [*content.problems, *_checksums(entry, root, content)]
    tasks: dict[str, CaseTask] = {}
    with Pool(workers or len(os.sched_getaffinity(0)), VOLUME_LIMITS) as pool:
        if kind in ("nnunet", "images"):
            tasks, refused = _tasks(entry, content, root)
            problems += [*refused, *_check_cases(tasks, root, pool, quiet)]
        elif kind == "npz":
            problems += _check_arrays(entry, content, root)
        bad = {problem.case for problem in problems}
        whole = {key: case for key, case in content.cases.items() if key not in bad}
        result = Prepared(entry, content.layout.title, out, 0, len(whole), _in_order(problems), content.others)
        if not whole or (problems and not partial):
            return result
        if kind == "index":
            summary = index([source], out, workers=workers, key_file=key_file, overwrite=overwrite, quiet=quiet)
            write_json(out / CARD, entry.model_dump(mode="json"))
            return replace(result, written=summary.volumes, indexed=summary)
        prepare_output_folder(out, resume=None, overwrite=overwrite, owned=lambda folder: (folder / CARD).is_file())
        write_json(out / CARD, entry.model_dump(mode="json"))
        if kind == "nnunet":
            write_nnunet(entry, whole, tasks, out, pool, hardlink=files == "hardlink", quiet=quiet)
        else:
            write_files(content, whole, root, out, hardlink=files == "hardlink")
        write_tables(entry, content, whole, out)
    return replace(result, written=len(whole))


def _check_places(source: Path, out: Path) -> None:
    place, target = source.resolve(), out.resolve()
    if target == place or place in target.parents or target in place.parents:
        raise UsageError(f"--out {out} and the source {source} lie in each other. Choose another --out.")


def _checksums(entry: Manifest, root: Path, content: Content) -> list[Problem]:
    problems = []
    for path in content.files:
        expected = entry.checksums.get(path.rpartition("/")[2])
        if expected is None:
            continue
        with absolute(root, path).open("rb") as handle:
            found = hashlib.file_digest(handle, "md5" if len(expected) == 32 else "sha256").hexdigest()
        if found != expected:
            detail = f"its checksum is {found}, published is {expected}."
            problems.append(Problem("checksum", path, detail, f"Download it again from {entry.ask}."))
    return problems


def _tasks(entry: Manifest, content: Content, root: Path) -> tuple[dict[str, CaseTask], list[Problem]]:
    """Return what is needed to decode each case; DICOM series are put in order first."""
    tasks, problems = {}, []
    for case in content.cases.values():
        images: tuple[str | VolumeTask, ...] = tuple(str(absolute(root, path)) for path in case.images)
        if content.layout.dicom:
            folder = Path(os.path.commonpath([Path(str(path)).parent for path in images]))
            series = find_series(folder).series
            if len(series) != 1:
                detail = f"{len(series)} DICOM volumes where one is expected."
                problems.append(
                    Problem("series", str(folder.relative_to(root)), detail, "Keep the folder with one.", case.name)
                )
                continue
            images = (series[0].task,)
        tasks[case.name] = CaseTask(
            case.name,
            images,
            tuple((label, str(absolute(root, path))) for label, path in case.masks),
            entry.channels,
            entry.labels,
            content.layout.values,
            outline=content.layout.outline,
            united=united(case.part),
            ending=".png" if entry.dimensions == 2 else ".nii.gz",
        )
    return tasks, problems


def _check_cases(tasks: Mapping[str, CaseTask], root: Path, pool: Pool, quiet: bool) -> list[Problem]:
    problems = []
    with progress("Checking cases", len(tasks), quiet=quiet) as advance:
        for task, outcome in pool.map(check_case, tasks.values()):
            found = outcome.value or []
            if outcome.code:
                first = task.images[0] if isinstance(task.images[0], str) else task.images[0].files[0][0]
                found = [(outcome.code, first, outcome.detail)]
            for kind, path, detail in found:
                problems.append(Problem(kind, _relative(path, root), detail, _remedy(kind), task.name))
            advance()
    return problems


def _check_arrays(entry: Manifest, content: Content, root: Path) -> list[Problem]:
    assert entry.arrays is not None
    problems = []
    for case in content.cases.values():
        path = case.images[0]
        task = ArraysTask(
            str(absolute(root, path)),
            entry.dimensions,
            entry.arrays.colours,
            entry.arrays.sizes,
            len(entry.classes),
            entry.target == "multilabel",
            {str(split): number for split, number in entry.arrays.samples.items()},
        )
        try:
            found = run_limited(check_arrays, task)
        except InputRefused as error:
            found = [(error.code, error.detail, True)]
        for kind, detail, fatal in found:
            problems.append(Problem(kind, path, detail, _remedy(kind), case.name if fatal else ""))
    return problems


def _remedy(kind: str) -> str:
    return _REMEDIES.get(kind) or re.sub(r"^.*?\. ", "", explain(kind))


def _relative(path: str, root: Path) -> str:
    return os.path.relpath(path, root) if Path(path).is_absolute() else path


def _in_order(problems: Sequence[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: (bool(problem.case), problem.kind, problem.path))
