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
            "entropy", "entropy_minimisation", "EntropyMinimisation", BOTH, "Grandvalet and Bengio, NIPS 2004",
            "Be sure on unlabelled images",
        ),
        _entry(
            "pseudo-labels", "pseudo_labels", "PseudoLabels", BOTH, "Lee, ICML workshop 2013",
            "Learn from the own predictions that are sure",
        ),
        _entry(
            "mean-teacher", "mean_teacher", "MeanTeacher", BOTH, "Tarvainen and Valpola, NeurIPS 2017",
            "Agree with an averaged network on perturbed images",
        ),
        _entry(
            "uncertainty-teacher", "uncertainty_teacher", "UncertaintyTeacher", DENSE, "UA-MT, Yu et al., MICCAI 2019",
            "Mean teacher where several passes of the teacher agree",
        ),
        _entry(
            "ict", "interpolation", "Interpolation", BOTH, "ICT, Verma et al., IJCAI 2019",
            "Predict between two images what lies between their predictions",
        ),
        _entry(
            "mixmatch", "mixmatch", "MixMatch", BOTH, "Berthelot et al., NeurIPS 2019",
            "Mix labelled images and sharpened guesses",
        ),
        _entry(
            "fixmatch", "fixmatch", "FixMatch", BOTH, "Sohn et al., NeurIPS 2020",
            "Learn on a strong view what is sure on a weak one",
        ),
        _entry(
            "unimatch", "unimatch", "UniMatch", DENSE, "Yang et al., CVPR 2023",
            "FixMatch with two strong views and dropped features",
        ),
        _entry(
            "semixup", "semixup", "Semixup", IMAGES, "Huy Hoang Nguyen et al., IEEE TMI 2020",
            "Agree along and off the line between images",
        ),
        _entry(
            "cps", "cross_pseudo", "CrossPseudo", BOTH, "CPS, Chen et al., CVPR 2021",
            "Two networks label for each other",
        ),
        _entry(
            "bcp", "copy_paste", "CopyPaste", DENSE, "BCP, Bai et al., CVPR 2023",
            "Paste labelled into unlabelled images and back",
        ),
        _entry(
            "mc-net", "mutual_decoders", "MutualDecoders", DENSE, "MC-Net+, Wu et al., Medical Image Analysis 2022",
            "Three unlike decoders agree with each other's sharpened masks",
        ),
        _entry(
            "tracoco", "tracoco", "TraCoCo", DENSE, "Liu et al., IEEE TMI 2024",
            "Two networks agree on voxels whatever surrounds them",
        ),
        _entry(
            "self-training", "self_training", "SelfTraining", BOTH, "T-similarity, Odonnat et al., AISTATS 2024",
            "Rounds of pseudo-labels, chosen where diverse heads agree",
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
