"""An nnU-Net raw data set: `imagesTr`, `labelsTr` and `dataset.json`, read strictly and never changed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.errors import DataError, UsageError, unknown_name

NIFTI = (".nii", ".nii.gz")
# One file of these may hold all channels, as colours; `check_case` then counts them.
_PICTURES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Case:
    """One labelled case.

    Args:
        name: Its identifier, the file name without channel and ending.
        images: One file per channel.
        label: The mask; it may not exist.
    """

    name: str
    images: tuple[Path, ...]
    label: Path

    @property
    def signature(self) -> list[list[Any]]:
        """Size and time of change of each file: what a cached result depends on."""
        files = (*self.images, self.label)
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]


@dataclass(frozen=True)
class RawDataset:
    """What a raw folder holds.

    Args:
        folder: The folder.
        content: `dataset.json`, completed with the reader that yields RAS+ axes.
        cases: The cases of `imagesTr` by name, sorted.
    """

    folder: Path
    content: dict[str, Any]
    cases: dict[str, Case]

    @property
    def name(self) -> str:
        """nnU-Net's name of the data set, `DatasetXXX_name` also where the folder is not called so."""
        folder = self.folder.resolve().name
        return folder if re.fullmatch(r"Dataset\d{3}_\w+", folder) else "Dataset999_" + re.sub(r"\W+", "_", folder)

    @property
    def file_ending(self) -> str:
        """How images and labels end."""
        return str(self.content["file_ending"])

    @property
    def channel_names(self) -> list[str]:
        """Name of each input channel; nnU-Net chooses the normalisation by it."""
        names = self.content["channel_names"]
        return [str(names[key]) for key in sorted(names, key=int)]

    @property
    def label_values(self) -> list[int]:
        """Every value that a mask may have, the ignore label included."""
        values: set[int] = set()
        for value in self.content["labels"].values():
            values.update(int(item) for item in (value if isinstance(value, list) else [value]))
        return sorted(values)

    @property
    def is_nifti(self) -> bool:
        """Whether nibabel reads it."""
        return self.file_ending in NIFTI

    def select(self, names: Sequence[str], option: str) -> list[str]:
        """Return `names` sorted, each checked to be a case.

        Raises:
            UsageError: If one does not exist or is named twice.
        """
        for name in names:
            if name not in self.cases:
                raise UsageError(f"{option}: {unknown_name('case', name, self.cases)}")
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if list(names).count(name) > 1})
            raise UsageError(f"{option} names {', '.join(twice)} more than once.")
        return sorted(names)


def read_dataset(folder: Path) -> RawDataset:
    """Read the structure of a raw folder; no voxel is looked at.

    Raises:
        DataError: If `dataset.json` or a folder is missing, or if what they say does not fit together.
    """
    content = _read_description(folder)
    listed = content.get("dataset")
    cases = _cases_of_list(folder, listed) if isinstance(listed, dict) else _cases_of_folders(folder, content)
    if not cases:
        raise DataError(
            f"{folder / 'imagesTr'} holds no image that ends in _0000{content['file_ending']}. "
            "Name each file CASE_CHANNEL with four digits, for example case1_0000.nii.gz, or mend file_ending in "
            "dataset.json."
        )
    channels = len(content["channel_names"])
    for case in cases.values():
        holds_all = len(case.images) == 1 and content["file_ending"].lower() in _PICTURES
        if len(case.images) != channels and not holds_all:
            raise DataError(
                f"{case.name} has {len(case.images)} channel files ({', '.join(file.name for file in case.images)}); "
                f"dataset.json knows {channels} channels ({', '.join(content['channel_names'].values())}). "
                "Add or remove files, or mend channel_names."
            )
    labelled = [case for case in cases.values() if case.label.is_file()]
    if not labelled:
        raise DataError(
            f"{folder} has no labels: none of its {len(cases)} images has a mask in labelsTr. Fine-tuning needs "
            "labelled "
            "cases; `medssl pretrain` learns from images alone."
        )
    if content["file_ending"] in NIFTI:
        # The axes that pretraining saw: RAS+, reversed. Other readers keep the axes of the file.
        content["overwrite_image_reader_writer"] = "NibabelIOWithReorient"
    return RawDataset(folder, content, dict(sorted(cases.items())))


def require_labels(dataset: RawDataset, names: Sequence[str], *, chosen: bool) -> None:
    """Refuse cases without a mask.

    Args:
        dataset: The data set.
        names: The cases that will be used.
        chosen: Whether the user named them.

    Raises:
        DataError: If one has no mask.
    """
    missing = [name for name in names if not dataset.cases[name].label.is_file()]
    if missing:
        remedy = (
            "Add the masks"
            if chosen
            else "Add the masks, remove the images, or name cases with --train-cases and --validation-cases"
        )
        raise DataError(
            f"{len(missing)} of {len(names)} cases have no mask in labelsTr: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''} (expected {missing[0]}{dataset.file_ending}). {remedy}."
        )


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise DataError(
            f"{folder} does not exist. --dataset takes an nnU-Net raw folder: imagesTr, labelsTr, dataset.json."
        )
    if not path.is_file():
        raise DataError(f"{path} is missing. --dataset takes an nnU-Net raw folder: imagesTr, labelsTr, dataset.json.")
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} holds a {type(content).__name__}; it must be an object with labels, channel_names, file_ending."
        )
    if "channel_names" not in content and isinstance(content.get("modality"), dict):
        content["channel_names"] = content.pop("modality")
    for key, example in (
        ("channel_names", '{"0": "MR"}'),
        ("labels", '{"background": 0, "organ": 1}'),
        ("file_ending", '".nii.gz"'),
    ):
        if key not in content:
            raise DataError(f'{path} has no "{key}". Add it, for example {example}.')
    _check_channels(path, content["channel_names"])
    _check_labels(path, content["labels"])
    return content


def _check_channels(path: Path, names: Any) -> None:
    if not isinstance(names, dict) or sorted(names) != sorted(str(number) for number in range(len(names))) or not names:
        raise DataError(f'{path}: channel_names must number the channels from "0", got {names!r}.')


def _check_labels(path: Path, labels: Any) -> None:
    if not isinstance(labels, dict) or "background" not in labels:
        raise DataError(
            f'{path}: labels must map names to numbers and hold "background": 0, got {labels!r}. '
            'Decathlon files have it the other way round: write {"background": 0, "organ": 1}.'
        )
    values: set[int] = set()
    for name, value in labels.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in items) or not items:
            raise DataError(
                f"{path}: label {name!r} has the value {value!r}; it must be a number from 0, or a list of them."
            )
        values.update(items)
    if labels["background"] != 0 or sorted(values) != list(range(len(values))):
        raise DataError(
            f"{path}: label values must be 0, 1, 2, ... without gaps and background 0, got {sorted(values)}."
        )
    if len(values) < 2:
        raise DataError(f"{path} knows no label besides the background. Add what shall be segmented.")


def _cases_of_folders(folder: Path, content: dict[str, Any]) -> dict[str, Case]:
    images = folder / "imagesTr"
    if not images.is_dir():
        raise DataError(
            f"{images} is missing. --dataset takes an nnU-Net raw folder: imagesTr, labelsTr, dataset.json."
        )
    ending = str(content["file_ending"])
    pattern = re.compile(r"(.+)_(\d{4})" + re.escape(ending))
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(images.iterdir()):
        match = pattern.fullmatch(path.name)
        if match and not path.name.startswith("."):
            found.setdefault(match.group(1), {})[int(match.group(2))] = path
    cases = {}
    for name, files in found.items():
        if sorted(files) != list(range(len(files))):
            raise DataError(
                f"{name} has the channels {sorted(files)}; they must run from 0 without gaps. "
                f"Missing: {name}_{min(set(range(len(files))) - set(files)):04d}{ending}."
            )
        cases[name] = Case(
            name, tuple(files[channel] for channel in sorted(files)), folder / "labelsTr" / f"{name}{ending}"
        )
    return cases


def _cases_of_list(folder: Path, listed: dict[str, Any]) -> dict[str, Case]:
    cases = {}
    for name, entry in listed.items():
        try:
            images = tuple(folder / os.path.expandvars(image) for image in entry["images"])
            label = folder / os.path.expandvars(entry["label"])
        except (TypeError, KeyError) as error:
            raise DataError(
                f'{folder / "dataset.json"}: the entry of {name} needs "images" (a list) and "label".'
            ) from error
        for image in images:
            if not image.is_file():
                raise DataError(f"{name}: {image} does not exist. Mend dataset.json or put the file there.")
        cases[name] = Case(str(name), images, label)
    return cases
