"""What a segment is in codes that other systems understand: from a label's name to category, type and side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, field_validator

from medssl.config import Settings, check_settings
from medssl.errors import UsageError

TABLE = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True)
class Concept:
    """A code: value, coding scheme and meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class SegmentCode:
    """What a segment is.

    Args:
        category: Of DICOM's context group 7150.
        type: What it shows.
        side: Left or right, where the name tells.
        known: Whether the name is in a table; else category and type are both the generic "Tissue".
    """

    category: Concept
    type: Concept
    side: Concept | None = None
    known: bool = True


CATEGORIES = {
    "anatomy": Concept("91723000", "SCT", "Anatomical Structure"),
    "tissue": Concept("85756007", "SCT", "Tissue"),
    "abnormal": Concept("49755003", "SCT", "Morphologically Abnormal Structure"),
}
#: Of a name that no table has: nothing more is known of a segment than that it is of the body. 3D Slicer does the same.
GENERIC = SegmentCode(CATEGORIES["tissue"], CATEGORIES["tissue"], known=False)
SIDES = {"left": Concept("7771000", "SCT", "Left"), "right": Concept("24028007", "SCT", "Right")}


class Entry(Settings):
    """One row of a table of codes.

    Attributes:
        category: `anatomy`, `tissue`, `abnormal`, or a code.
        type: Code value, coding scheme designator, meaning.
        side: `left`, `right`, or none; a name's own word overrides it.
        names: Other spellings of the name.
    """

    category: Literal["anatomy", "tissue", "abnormal"] | tuple[str, str, str]
    type: tuple[str, str, str]
    side: Literal["left", "right"] | None = None
    names: tuple[str, ...] = Field(default=())

    @field_validator("category", "type")
    @classmethod
    def _fits_dicom(cls, value: str | tuple[str, str, str]) -> str | tuple[str, str, str]:
        if isinstance(value, tuple):
            lengths = zip(value, (16, 16, 64), strict=True)
            if any(not 1 <= len(part) <= most or "\\" in part for part, most in lengths):
                raise ValueError(
                    "a code is [value, scheme, meaning] with 1 to 16, 16 and 64 characters and no backslash"
                )
        return value

    def code(self, side: str | None) -> SegmentCode:
        """Return the code, with the side that a label's name tells."""
        told = side or self.side
        category = CATEGORIES[self.category] if isinstance(self.category, str) else Concept(*self.category)
        return SegmentCode(category, Concept(*self.type), SIDES[told] if told else None)


class SegmentCodes:
    """Tables of codes; the user's comes first.

    Args:
        tables: Entries by their names as they were written.
    """

    def __init__(self, *tables: Mapping[str, Entry]) -> None:
        self._tables = [
            {plain(spelling): entry for name, entry in table.items() for spelling in (name, *entry.names)}
            for table in tables
        ]

    def of(self, label: str) -> SegmentCode:
        """Return the code of a label: of its whole name, else of the name without a word `left` or `right`."""
        name = plain(label)
        words = name.split()
        sides = [word for word in words if word in SIDES]
        bare = " ".join(word for word in words if word not in SIDES)
        for table in self._tables:
            if name in table:
                return table[name].code(None)
            if len(sides) == 1 and bare in table:
                return table[bare].code(sides[0])
        return GENERIC


def plain(name: str) -> str:
    """Return a name in lower case with single blanks for anything but letters and digits."""
    return " ".join(re.findall(r"[^\W_]+", name.lower()))


def read_codes(path: Path | None = None) -> SegmentCodes:
    """Return the built-in table, with a user's file before it.

    Args:
        path: A YAML file of the form of `segment_codes.yaml`.

    Raises:
        UsageError: If it does not exist or does not have that form.
    """
    if path is None:
        return SegmentCodes(_built_in())
    if not path.is_file():
        raise UsageError(f"--codes {path} is no file.")
    return SegmentCodes(_read(path), _built_in())


@cache
def _built_in() -> Mapping[str, Entry]:
    return _read(TABLE)


def _read(path: Path) -> dict[str, Entry]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a line `name: {{category: ..., type: [...]}}` for each label.")
    table = {}
    for name, values in content.items():
        if not isinstance(values, dict):
            raise UsageError(f"{path}, {name}: needs category and type, got {values!r}.")
        table[str(name)] = check_settings(Entry, values, f"{path}, {name}")
    return table
