"""Which files under a folder belong to which case of a public data set, by the patterns of its manifest."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from medssl.archive.codes import explain
from medssl.archive.datasets import Layout, Manifest, Part
from medssl.archive.find import Found, Source, walk
from medssl.errors import DataError, UsageError

#: How many files or cases are named where many have the same problem.
NAMED = 5
_PIECES = re.compile(r"\*\*/|\*\*|\*|\?|\{case\}|\{class\}|\{label\}")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with what was downloaded.

    Attributes:
        kind: Short name of the kind of problem.
        path: File or folder, relative to the source.
        detail: What was found.
        remedy: What to do about it.
        case: The case that cannot be used for it; empty if the problem is the set's.
    """

    kind: str
    path: str
    detail: str
    remedy: str
    case: str = ""

    def __str__(self) -> str:
        """Return it in one line."""
        return f"{self.kind}: {self.path}: {self.detail} {self.remedy}".strip()


@dataclass(frozen=True)
class FoundCase:
    """The files of one case.

    Attributes:
        name: Name in the output.
        part: The part of the layout it belongs to.
        patient: Key of the patient as the names tell it.
        images: Paths relative to the source, one for each channel; for DICOM all files of the series.
        masks: Label (empty for a label map) and path of each mask.
        label_class: The class, where the layout tells it.
    """

    name: str
    part: Part
    patient: str
    images: tuple[str, ...]
    masks: tuple[tuple[str, str], ...] = ()
    label_class: str = ""


@dataclass(frozen=True)
class Content:
    """What a folder holds of a data set.

    Attributes:
        layout: The form in which it lies there.
        cases: Cases by name.
        problems: What is missing, double or unreadable.
        others: Number of files that belong to no case.
        files: Relative paths of all files.
    """

    layout: Layout
    cases: dict[str, FoundCase]
    problems: list[Problem]
    others: int
    files: list[str] = field(repr=False)


def look(manifest: Manifest, source: Path) -> Content:
    """Match the files under a folder against the manifest's layouts; the one that fits most files is taken.

    Args:
        manifest: The data set.
        source: What the user downloaded and unpacked: a folder, or one file.

    Raises:
        UsageError: If the source does not exist.
        DataError: If no file fits any layout.
    """
    if not source.exists():
        raise UsageError(f"The source {source} does not exist. Check the path given to --source.")
    place = Source(source.resolve()) if source.is_dir() else Source(source.resolve().parent, source.name)
    entries = [entry for entry in walk(place, 0) if not _hidden(entry.path)]
    files = [entry.path for entry in entries if not entry.code]
    layouts = layouts_of(manifest)
    fits = [sum(any(_fits(part, path) for part in layout.parts) for path in files) for layout in layouts]
    if not max(fits):
        expected = "\n".join(f"  {layout.title}: {', '.join(_patterns(layout))}" for layout in layouts)
        raise DataError(
            f"{source} holds no file of {manifest.name} ({len(files)} files looked at). Expected, at or below it:\n"
            f"{expected}\nUnpack the archives and give the folder that holds them; {manifest.ask} has the data."
        )
    layout = layouts[fits.index(max(fits))]
    cases, problems = _collect(manifest, layout, files)
    problems += _unreadable(layout, entries)
    problems += _counts(layout, cases, problems)
    return Content(layout, dict(sorted(cases.items())), problems, len(files) - max(fits), files)


def layouts_of(manifest: Manifest) -> list[Layout]:
    """Return the manifest's layouts, and for a segmentation an nnU-Net raw data set made of it."""
    layouts = list(manifest.layouts)
    first = layouts[0]
    if first.writes == "nnunet":
        ending = ".png" if manifest.dimensions == 2 else ".nii.gz"
        channels = 1 if manifest.dimensions == 2 else len(manifest.channels)
        labelled = [part.count for part in first.parts if part.masks and part.split in ("train", "validation")]
        count = None if None in labelled else sum(number or 0 for number in labelled)
        images = tuple(f"imagesTr/{{case}}_{channel:04d}{ending}" for channel in range(channels))
        part = Part(images=images, masks=f"labelsTr/{{case}}{ending}", count=count or None)
        layouts.append(Layout(title="nnU-Net raw data set", writes="nnunet", parts=(part,)))
    return layouts


def listed(names: Iterable[str]) -> str:
    """Return the first of many names."""
    several = sorted(names)
    return ", ".join(several[:NAMED]) + (f" and {len(several) - NAMED} more" if len(several) > NAMED else "")


@cache
def compiled(pattern: str, case: str) -> re.Pattern[str]:
    """Return a pattern of a manifest as a regular expression on paths relative to the source."""
    result, position, known = "", 0, set()
    for piece in _PIECES.finditer(pattern):
        result += re.escape(pattern[position : piece.start()])
        position = piece.end()
        token = piece.group()
        name = token.strip("{}")
        if token in known:
            result += f"(?P={name})"
        elif token.startswith("{"):
            known.add(token)
            result += f"(?P<{name}>{case if name == 'case' else '[^/]+?'})"
        else:
            result += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}[token]
    return re.compile("(?:.*/)?" + result + re.escape(pattern[position:]))


def _hidden(path: str) -> bool:
    # Archives packed on a Mac hold "._NAME" twins of every file.
    return any(part.startswith(".") or part == "__MACOSX" for part in path.split("/"))


def _patterns(layout: Layout) -> list[str]:
    return [
        pattern for part in layout.parts for pattern in (*part.images, *([part.masks] if part.masks else ())) if pattern
    ]


def _fits(part: Part, path: str) -> bool:
    patterns = (*part.images, *([part.masks] if part.masks else ()))
    return any(compiled(pattern, part.case).fullmatch(path) for pattern in patterns)


def _matches(part: Part, pattern: str, files: Sequence[str]) -> Iterator[tuple[str, re.Match[str]]]:
    expression = compiled(pattern, part.case)
    for path in files:
        match = expression.fullmatch(path)
        if match:
            yield path, match


def _collect(manifest: Manifest, layout: Layout, files: Sequence[str]) -> tuple[dict[str, FoundCase], list[Problem]]:
    cases: dict[str, FoundCase] = {}
    problems: list[Problem] = []
    for part in layout.parts:
        if layout.writes == "index":
            # An archive of its own: `medssl index` tells what belongs together.
            for path, _ in _matches(part, part.images[0], files):
                cases[path] = FoundCase(path, part, "", (path,))
            continue
        found, classes = _images(layout, part, files, problems)
        masks = _masks(part, files)
        for name in sorted(set(masks) - set(found)):
            problems.append(
                Problem("no_image", masks[name][0][1], f"a mask without its image ({part.images[0]}).", "Download it.")
            )
        for name, images in found.items():
            if name in cases:
                problems.append(
                    Problem(
                        "case_twice", images[0], f"case {name} is there a second time.", "Remove one copy.", case=name
                    )
                )
                continue
            patient = _patient(manifest, name)
            if patient is None:
                rule = f"the rule of patients, {manifest.patient}, does not fit {name}."
                problems.append(Problem("patient", images[0], rule, "Restore the file's name.", case=name))
            cases[name] = FoundCase(
                name, part, patient or name, images, tuple(masks.get(name, ())), classes.get(name, "")
            )
            if len(masks.get(name, ())) > 1 and not united(part) and "{label}" not in part.masks:
                also = f"the mask of {name} is there {len(masks[name])} times."
                problems.append(Problem("case_twice", masks[name][1][1], also, "Remove one copy.", case=name))
            if part.masks and name not in masks and (masks or not part.masks_optional):
                problems.append(
                    Problem("no_mask", images[0], f"has no mask ({part.masks}).", "Download the mask.", case=name)
                )
    return cases, problems


def _images(
    layout: Layout, part: Part, files: Sequence[str], problems: list[Problem]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    channels: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    classes: dict[str, str] = {}
    # "benign (1)_mask.png" fits the pattern of images as well.
    masks = {path for path, _ in _matches(part, part.masks, files)} if part.masks else set()
    for number, pattern in enumerate(part.images):
        for path, match in _matches(part, pattern, files):
            if path in masks:
                continue
            name = written_name(part, match)
            channels[name][number].append(path)
            classes[name] = match.groupdict().get("class") or ""
    result = {}
    for name, by_channel in sorted(channels.items()):
        if layout.dicom:
            result[name] = tuple(by_channel[0])
            continue
        missing = [part.images[number] for number in range(len(part.images)) if not by_channel[number]]
        paths = tuple(path for number in sorted(by_channel) for path in by_channel[number][:1])
        if missing:
            problems.append(
                Problem("no_channel", paths[0], f"{name} lacks {', '.join(missing)}.", "Download it.", case=name)
            )
        for number in by_channel:
            for path in by_channel[number][1:]:
                problems.append(
                    Problem("case_twice", path, f"case {name} is also {paths[number]}.", "Remove one copy.", case=name)
                )
        result[name] = paths
    return result, classes


def _masks(part: Part, files: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    masks: dict[str, list[tuple[str, str]]] = defaultdict(list)
    if part.masks:
        for path, match in _matches(part, part.masks, files):
            masks[written_name(part, match)].append((match.groupdict().get("label") or "", path))
    return masks


def united(part: Part) -> bool:
    """Tell whether a case may have several masks that are one: the pattern leaves their names open."""
    return "*" in part.masks.rpartition("/")[2].removesuffix(".nii*")


def written_name(part: Part, match: re.Match[str]) -> str:
    """Return a case's name in the output: letters, digits, `_`, `-` and `.` only."""
    name = part.name.replace("{case}", match.group("case"))
    return re.sub(r"[^\w.-]+", "_", name).strip("_.")


def _patient(manifest: Manifest, name: str) -> str | None:
    if not manifest.patient:
        return name
    match = re.search(manifest.patient, name)
    return match.group(1) if match else None


def _unreadable(layout: Layout, entries: Sequence[Found]) -> list[Problem]:
    return [
        Problem("unreadable", entry.path, f"{entry.code} ({entry.detail}).", explain(entry.code))
        for entry in entries
        if entry.code and entry.code != "linked_twice" and any(_fits(part, entry.path) for part in layout.parts)
    ]


def _counts(layout: Layout, cases: dict[str, FoundCase], problems: Sequence[Problem]) -> list[Problem]:
    found = []
    refused = {problem.case for problem in problems}
    for part in layout.parts:
        number = sum(case.part is part and case.name not in refused for case in cases.values())
        if part.count is not None and number != part.count and (number or not part.optional):
            what = "unpack the missing archives" if number < part.count else "remove what does not belong to the set"
            found.append(
                Problem(
                    "count",
                    part.images[0],
                    f"{number} whole cases of the part '{part.split}', the release has {part.count}.",
                    f"{what[0].upper()}{what[1:]}, or use --partial to take what is there.",
                )
            )
        elif not number and not part.optional and part.count is None:
            found.append(Problem("count", part.images[0], "no file fits.", "Unpack the missing archives."))
    patients = defaultdict(set)
    for case in cases.values():
        patients[case.patient].add(case.part.split)
    if layout.writes != "index":
        mixed = [patient for patient, splits in patients.items() if len(splits) > 1]
        if mixed:
            found.append(
                Problem(
                    "patient_in_two_splits",
                    os.curdir,
                    f"{len(mixed)} patients are in more than one split: {listed(mixed)}.",
                    "Do not compare with published figures before you have moved them.",
                )
            )
    return found
