"""What is known of the public data sets that this field trains and reports on: one checked manifest for each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from medssl.config import Settings, check_settings, merged
from medssl.errors import DataError, unknown_name

#: Where manifests lie: inside an installed package, beside it in a checkout.
_PLACES = (Path(__file__).resolve().parents[1], Path(__file__).resolve().parents[2])
FOLDER = "data_manifests"
#: What stands in place of a licence that nobody read at its source.
ASK = "ask the source"

SplitName = Literal["train", "validation", "test", "unlabelled"]


class Licence(Settings):
    """On what terms the data may be used.

    Attributes:
        name: Name of the licence, or `ask the source`.
        url: Where it is stated.
        terms: What it asks for beside the licence's own text.
        reported: What copies of the data say, where the source's own words were not read.
        verified: Whether the name was read at the source.
    """

    name: str = ASK
    url: str = ""
    terms: str = ""
    reported: str = ""
    verified: bool

    @model_validator(mode="after")
    def _only_what_was_read(self) -> Self:
        if self.verified == (self.name == ASK):
            raise ValueError(f"a licence is either verified and named, or not verified and '{ASK}'")
        return self


class Split(Settings):
    """How the literature divides the data.

    Attributes:
        text: The division in words.
        source: Where its lists are.
        lists: Cases or patients of a split, as far as the lists are public; every other labelled case is `train`.
    """

    text: str
    source: str = ""
    lists: dict[SplitName, tuple[str, ...]] = {}


class Part(Settings):
    """Files of one kind within a layout.

    Patterns are relative to any folder at or below the source. `*` stands for anything within a name, `**/` for any
    folders, `{case}` for the case, `{class}` for the class, `{label}` for the label of a mask with one structure.

    Attributes:
        split: The release's own split.
        images: Pattern of the images; one for each channel where channels are separate files.
        masks: Pattern of the masks; empty where there are none. Several masks of a case are united.
        case: Regular expression of a case's name within the pattern.
        name: Name of a case in the output.
        count: Cases of the release; None where it is not known.
        optional: Whether the part may be absent as a whole.
        masks_optional: Whether the masks may be absent as a whole.
    """

    split: SplitName = "train"
    images: tuple[str, ...]
    masks: str = ""
    case: str = r"[^/]+?"
    name: str = "{case}"
    count: int | None = Field(default=None, ge=1)
    optional: bool = False
    masks_optional: bool = False

    @field_validator("images", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("case")
    @classmethod
    def _compiles(cls, value: str) -> str:
        return _regular_expression(value)


class Layout(Settings):
    """One form in which the data are passed on.

    Attributes:
        title: Its name in messages.
        writes: What is made of it: an nnU-Net raw data set, an INDEX, images with a table of classes, or an .npz.
        parts: Its files.
        dicom: Whether an image is a folder with one DICOM series.
        values: Stored value of a mask and the value that is written; empty where they are the same.
        outline: Whether masks are outlines of an ellipse, to be filled.
    """

    title: str
    writes: Literal["nnunet", "index", "images", "npz"]
    parts: tuple[Part, ...] = Field(min_length=1)
    dicom: bool = False
    values: dict[int, int] = {}
    outline: bool = False

    @model_validator(mode="after")
    def _cases_can_be_told_apart(self) -> Self:
        for part in self.parts:
            patterns = (*part.images, *([part.masks] if part.masks else []))
            if self.writes != "index" and not all("{case}" in pattern for pattern in patterns):
                raise ValueError(f"each pattern of '{self.title}' needs {{case}}, got {patterns}")
        if self.writes == "images" and not all("{class}" in part.images[0] for part in self.parts):
            raise ValueError(f"'{self.title}' writes a table of classes, so its patterns need {{class}}")
        return self


class Arrays(Settings):
    """What a MedMNIST .npz holds.

    Attributes:
        sizes: Edge lengths that are published.
        colours: 1 for grey values, 3 for red, green and blue.
        samples: Number of images of each split, by the prefix of its arrays.
    """

    sizes: tuple[int, ...]
    colours: Literal[1, 3] = 1
    samples: dict[Literal["train", "val", "test"], int]


class Manifest(Settings):
    """One data set.

    Attributes:
        name: What the user calls it.
        title: Its full name.
        task: What its labels are for.
        dimensions: 2 or 3.
        modality: DICOM's codes.
        channels: Names for nnU-Net, one for each channel.
        body_part: What is shown.
        licence: The terms.
        ask: Where to ask for the data.
        paper: What to cite.
        layouts: Forms in which the data are passed on.
        arrays: For an .npz, what it holds.
        labels: Values of the written masks.
        classes: Names of the classes in the order of their numbers.
        target: How classes are meant.
        patient: Regular expression on a case's written name; its group is the patient. Empty where names do not tell.
        split: The literature's division.
        checksums: MD5 or SHA-256 of a file by its name, as published.
        leaks: Known leaks and defects.
        unverified: What was not read at its source.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_]*$")
    title: str
    task: Literal["segmentation", "classification", "images"]
    dimensions: Literal[2, 3]
    modality: tuple[str, ...] = Field(min_length=1)
    channels: tuple[str, ...] = ()
    body_part: str
    licence: Licence
    ask: str
    paper: str
    layouts: tuple[Layout, ...] = Field(min_length=1)
    arrays: Arrays | None = None
    labels: dict[str, int] = {}
    classes: tuple[str, ...] = ()
    target: Literal["multiclass", "multilabel", "ordinal"] = "multiclass"
    patient: str = ""
    split: Split
    checksums: dict[str, str] = {}
    leaks: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    @field_validator("patient")
    @classmethod
    def _names_one_group(cls, value: str) -> str:
        if value and re.compile(_regular_expression(value)).groups != 1:
            raise ValueError(f"the patient's rule needs one group, got {value!r}")
        return value

    @field_validator("checksums")
    @classmethod
    def _are_digests(cls, value: dict[str, str]) -> dict[str, str]:
        for name, digest in value.items():
            if not re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", digest):
                raise ValueError(f"{name}: {digest!r} is neither an MD5 nor a SHA-256")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        written = {layout.writes for layout in self.layouts}
        if "nnunet" in written:
            if sorted(self.labels.values()) != list(range(len(self.labels))) or self.labels.get("background") != 0:
                raise ValueError("labels must be 0, 1, 2, ... with background 0")
            if not self.channels:
                raise ValueError("a segmentation needs the names of its channels")
        for layout in self.layouts:
            if not set(layout.values.values()) <= set(self.labels.values()):
                raise ValueError(f"'{layout.title}' writes values that labels does not name")
        if "npz" in written and self.arrays is None:
            raise ValueError("an .npz needs arrays")
        if written & {"npz", "images"} and not self.classes:
            raise ValueError("a classification needs classes")
        return self

    @property
    def cases(self) -> int | None:
        """Number of cases of the release, as far as it is known."""
        if self.arrays is not None:
            return sum(self.arrays.samples.values())
        counts = [part.count for part in self.layouts[0].parts]
        return None if any(count is None for count in counts) else sum(count or 0 for count in counts)

    def row(self) -> dict[str, Any]:
        """Return what a list of data sets shows."""
        return {
            "name": self.name,
            "task": self.task,
            "images": f"{'+'.join(self.modality)} {self.dimensions}D",
            "cases": "?" if self.cases is None else str(self.cases),
            "licence": self.licence.name,
            "title": self.title,
        }


@cache
def manifests() -> Mapping[str, Manifest]:
    """Return every manifest by its name.

    Raises:
        DataError: If the folder is missing, a file cannot be read, or a name is given twice.
        UsageError: If a file does not fit the schema.
    """
    found: dict[str, Manifest] = {}
    for path in sorted(manifest_folder().glob("*.yaml")):
        for entry in read_file(path):
            if entry.name in found:
                raise DataError(f"{path} gives the name '{entry.name}' a second time. Rename one of the two.")
            found[entry.name] = entry
    return dict(sorted(found.items()))


def manifest(name: str) -> Manifest:
    """Return one manifest.

    Raises:
        UsageError: If there is none of that name; near names are listed.
    """
    if name not in manifests():
        raise unknown_name("data set", name, manifests())
    return manifests()[name]


def manifest_folder() -> Path:
    """Return the folder of the manifests.

    Raises:
        DataError: If the installation lacks it.
    """
    for place in _PLACES:
        if (place / FOLDER).is_dir():
            return place / FOLDER
    raise DataError(f"This installation has no {FOLDER}: install medssl again from its wheel or a whole checkout.")


def read_file(path: Path) -> list[Manifest]:
    """Read a file with one data set, or with several (`sets`) that share what stands above them.

    Raises:
        DataError: If it is no YAML mapping.
        UsageError: If it does not fit the schema.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold `name: value` lines, not a {type(content).__name__}.")
    sets = content.pop("sets", None)
    if sets is None:
        return [check_settings(Manifest, content, str(path))]
    return [
        check_settings(Manifest, {"name": name, **merged(content, own)}, f"{path}, {name}")
        for name, own in sets.items()
    ]


def _regular_expression(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression: {error}") from error
    return value
