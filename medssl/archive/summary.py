"""What a run of `index` or `convert` did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medssl.archive.codes import explain
from medssl.errors import EXIT_ALL_REFUSED, EXIT_OK, EXIT_SOME_REFUSED


@dataclass(frozen=True)
class IndexSummary:
    """Counts of an index.

    Attributes:
        out: Where it is.
        files: Files and links found.
        volumes: Accepted volumes.
        files_in_volumes: Files that are part of one.
        related: Files that are related objects, by kind.
        refused: Files that are refused, by code.
        flags: Volumes that carry a quality flag, by flag.
        headers_read: Headers read in this run; the others were known.
        volumes_decoded: Volumes decoded in this run; the others were known.
        converted: NIfTI files in `out`, for `convert`.
    """

    out: Path
    files: int
    volumes: int
    files_in_volumes: int
    related: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    flags: dict[str, int] = field(default_factory=dict)
    headers_read: int = 0
    volumes_decoded: int = 0
    converted: int | None = None

    @property
    def exit_code(self) -> int:
        """Return 0 if nothing was refused, 4 if nothing was accepted, else 3."""
        if not self.volumes:
            return EXIT_ALL_REFUSED
        return EXIT_SOME_REFUSED if self.refused else EXIT_OK

    def to_json(self) -> dict[str, Any]:
        """Return the counts as plain types."""
        return {**asdict(self), "out": str(self.out), "exit_code": self.exit_code}

    def __rich__(self) -> str:
        """Return the same lines for rich, which would otherwise print the fields."""
        return str(self).replace("[", r"\[")

    def __str__(self) -> str:
        """Return the counts in lines, each code with its meaning and remedy."""
        lines = [
            f"{self.files} files: {self.files_in_volumes} in {self.volumes} volumes, "
            f"{sum(self.related.values())} related, {sum(self.refused.values())} refused "
            f"({self.headers_read} headers read, {self.volumes_decoded} volumes decoded in this run)"
        ]
        for title, counts in (("refused", self.refused), ("related", self.related), ("flag", self.flags)):
            lines += [f"  {title} {code}: {count}  {explain(code)}" for code, count in sorted(counts.items())]
        if not self.volumes:
            lines.append("No volume was accepted. refused.parquet names each file and its reason.")
        return "\n".join(lines)
