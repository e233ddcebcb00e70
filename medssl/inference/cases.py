"""What there is to predict under `--input`: volume files by nnU-Net's or plain names, or DICOM series."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medssl.archive.load import SeriesFound, find_series
from medssl.errors import DataError, InputRefused, UsageError
from medssl.inference.source import Channel, from_volume, open_file

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh")
_NUMBERED = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Case:
    """One case to predict.

    Args:
        name: What its mask is called, without an ending.
        source: What to call the input in the outputs: file names, or nothing for DICOM.
        open: Opens its channels; raises `InputRefused`.
        series: Where it lies, if it was found among DICOM series.
    """

    name: str
    source: tuple[str, ...]
    open: Callable[[], list[Channel]]
    series: SeriesFound | None = None


@dataclass(frozen=True)
class Refusal:
    """One input that cannot be predicted, with the code and what was found."""

    source: str
    code: str
    detail: str


def find_cases(where: Path, channels: int) -> tuple[list[Case], list[Refusal]]:
    """List the cases of a file or folder; nothing is decoded yet.

    A folder that holds volume files is taken as one case per file (`case_0000.nii.gz`, `case_0001.nii.gz` are the
    channels of one case; with a model of one channel also `case.nii.gz`). Any other folder is taken as DICOM, series
    in sub-folders included.

    Args:
        where: A volume file, a folder of them, a DICOM file or a folder of series.
        channels: How many channels the model takes.

    Raises:
        UsageError: If `where` does not exist.
        DataError: If there is nothing to predict.
    """
    if not where.exists():
        raise UsageError(f"--input {where} does not exist.")
    if where.is_file():
        if _stem(where) is None:
            return _dicom(where, channels)
        files = [where]
        match = _NUMBERED.fullmatch(_stem(where) or "")
        if channels > 1 and match:
            files = [file for file in _volume_files(where.parent) if _case_and_channel(file)[0] == match.group(1)]
        return _volumes(files, channels)
    files = _volume_files(where)
    found = _volumes(files, channels) if files else _dicom(where, channels)
    if not found[0] and not found[1]:
        raise DataError(
            f"--input {where} holds nothing to predict: no {', '.join(ENDINGS)} file directly in it "
            "and no DICOM series."
        )
    return found


def _volumes(files: list[Path], channels: int) -> tuple[list[Case], list[Refusal]]:
    groups: dict[str, dict[int, Path]] = {}
    refused: list[Refusal] = []
    for file in files:
        name, channel = _case_and_channel(file)
        taken = groups.setdefault(name, {})
        if channel in taken:
            refused.append(Refusal(file.name, "name_taken", f"{taken[channel].name} is the same case and channel"))
        else:
            taken[channel] = file
    cases = []
    for name, taken in sorted(groups.items()):
        if sorted(taken) == list(range(channels)):
            paths = [taken[channel] for channel in range(channels)]
            cases.append(Case(name, tuple(path.name for path in paths), _opener(paths)))
        else:
            wanted = ", ".join(f"{name}_{channel:04d}" for channel in range(channels))
            names = ", ".join(path.name for path in taken.values())
            refused.append(Refusal(names, "channels_incomplete", f"the model takes {channels} channel(s): {wanted}"))
    return cases, refused


def _opener(paths: list[Path]) -> Callable[[], list[Channel]]:
    return lambda: [open_file(path) for path in paths]


def _dicom(where: Path, channels: int) -> tuple[list[Case], list[Refusal]]:
    if channels != 1:
        raise UsageError(
            f"This model takes {channels} channels, and DICOM series do not say which one is which channel. "
            "Convert them with `medssl convert` and name the files CASE_0000.nii.gz, CASE_0001.nii.gz."
        )
    found = find_series(where)
    cases = [Case(series.name, (), _series_opener(series), series) for series in found.series]
    # Paths of DICOM files often name the patient, so only kinds and numbers of refused files are told.
    tally = Counter((code, detail) for _, code, detail in found.refused)
    return cases, [Refusal(f"{count} DICOM file(s)", code, detail) for (code, detail), count in sorted(tally.items())]


def _series_opener(series: SeriesFound) -> Callable[[], list[Channel]]:
    return lambda: [from_volume(series.load())]


def _volume_files(folder: Path) -> list[Path]:
    return sorted(_existing(folder))


def _existing(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if _stem(path) is not None and not path.name.startswith(".") and not path.is_dir():
            yield path


def _stem(path: Path) -> str | None:
    """Return the file name without a volume's ending, or None if it has none."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending) and len(path.name) > len(ending):
            return path.name[: -len(ending)]
    return None


def _case_and_channel(path: Path) -> tuple[str, int]:
    stem = _stem(path)
    if stem is None:
        raise InputRefused("not_an_image", path.name)
    match = _NUMBERED.fullmatch(stem)
    return (match.group(1), int(match.group(2))) if match else (stem, 0)
