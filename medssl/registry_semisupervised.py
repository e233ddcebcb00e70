"""Names of semi-supervised methods and where they live, without importing torch; see `medssl.registry`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from medssl.errors import unknown_name
from medssl.registry import Entry

BOTH = ("segmentation", "classification")
DENSE = ("segmentation",)
IMAGES = ("classification",)


@dataclass(frozen=True)
class SemiSupervisedEntry(Entry):
    """One semi-supervised method.

    Args:
        tasks: What it is for.
    """

    tasks: tuple[str, ...] = BOTH

    def row(self) -> dict[str, Any]:
        """Return what a list of methods shows."""
        return {"name": self.name, "tasks": list(self.tasks), "summary": self.summary, "source": self.source}


def _entry(name: str, module: str, kind: str, tasks: tuple[str, ...], source: str, summary: str) -> SemiSupervisedEntry:
    place = f"medssl.semisupervised.{module}:{kind}"
    return SemiSupervisedEntry(
        name, place, "semi-supervised", (2, 3), "encoder and decoder", source, summary, f"{place}Settings", tasks=tasks
    )


SEMISUPERVISED: dict[str, SemiSupervisedEntry] = {
    entry.name: entry
    for entry in (
        _entry(
            "supervised", "supervised", "Supervised", BOTH, "the control",
            "Learn from the labelled images alone, with the same augmentation and steps",
        ),
        _entry(
            "mean-teacher", "mean_teacher", "MeanTeacher", BOTH, "Tarvainen and Valpola, NeurIPS 2017",
            "Agree with an averaged network on perturbed images",
        ),
    )
}  # fmt: skip


def semisupervised(name: str) -> SemiSupervisedEntry:
    """Return the entry of a semi-supervised method.

    Raises:
        UsageError: If there is none of that name; near names are listed.
    """
    if name not in SEMISUPERVISED:
        raise unknown_name("semi-supervised method", name, SEMISUPERVISED)
    return SEMISUPERVISED[name]
