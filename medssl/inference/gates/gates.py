"""The gates of one model: what `RUN/gates.json` holds, and how a case is judged by it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.errors import CheckpointError, UsageError
from medssl.files import write_json
from medssl.inference.gates.envelope import Envelope
from medssl.inference.gates.measured import Measured
from medssl.inference.gates.reference import Reference
from medssl.inference.gates.thresholds import Threshold
from medssl.inference.gates.verdict import Reason, Verdict

NAME = "gates.json"
SCHEMA_VERSION = 1
#: Scores that are set on validation cases; larger is stranger.
SCORES = ("embedding_distance", "disagreement", "entropy")
_CODES = {"embedding_distance": "embedding_far", "disagreement": "members_disagree", "entropy": "organ_uncertain"}
_WORDS = {
    "embedding_distance": "the features lie {value:.3g} from the training cases; accepted: {limit:.3g}",
    "disagreement": "mirrored predictions or folds disagree by {value:.3g} (1 - Dice); accepted: {limit:.3g}",
    "entropy": "the labelled voxels have an entropy of {value:.3g} of 1; accepted: {limit:.3g}",
}


@dataclass(frozen=True)
class Gates:
    """Everything that a case is judged by.

    Args:
        model: SHA-256 of each fold's checkpoint.
        envelope: What training cases span.
        reference: Where their features lie.
        thresholds: Of each score that could be calibrated.
        temperature: Divides logits before they become probabilities.
        step_size: Of the window when the scores were calibrated.
        mirroring_axes: Of the window then.
        facts: What the calibration rests on, for people and reports.
    """

    model: Mapping[str, str]
    envelope: Envelope
    reference: Reference
    thresholds: Mapping[str, Threshold]
    temperature: float
    step_size: float
    mirroring_axes: tuple[int, ...]
    facts: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the content of `gates.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "gates",
            "model": {"sha256": dict(self.model)},
            "options": {"step_size": self.step_size, "mirroring_axes": list(self.mirroring_axes)},
            "envelope": self.envelope.to_json(),
            "thresholds": {name: threshold.to_json() for name, threshold in self.thresholds.items()},
            "temperature": self.temperature,
            "calibration": dict(self.facts),
            "embedding": self.reference.to_json(),
        }

    def judge(self, case: str, found: Measured, *, step_size: float, mirroring_axes: tuple[int, ...]) -> Verdict:
        """Judge what is known of a case so far.

        Args:
            case: Its name.
            found: What was measured.
            step_size: Of the window now.
            mirroring_axes: Of the window now.
        """
        reasons = self.envelope.of_image(found) + self.envelope.of_input(found)
        scores = self.scores(found)
        skipped: list[str] = []
        same = math.isclose(step_size, self.step_size) and mirroring_axes == self.mirroring_axes
        for name, value in scores.items():
            threshold = self.thresholds.get(name)
            if threshold is None:
                skipped.append(f"{name}: it was not calibrated")
            elif name != "embedding_distance" and not same:
                skipped.append(f"{name}: calibrated with another --step-size or mirroring")
            elif value > threshold.review:
                level = "refused" if threshold.refuse is not None and value > threshold.refuse else "review"
                words = _WORDS[name].format(value=value, limit=threshold.review)
                reasons.append(Reason(_CODES[name], level, value, (None, threshold.review), words))  # type: ignore[arg-type]
        if found.volumes_ml:
            reasons += self.envelope.of_mask(found)
        measured = {
            "spacing_mm": found.spacing_mm,
            "extent_mm": found.extent_mm,
            "modality": found.modality,
            "orientation": found.orientation,
            "members": found.members,
            "confidence": found.confidence,
            "volumes_ml": found.volumes_ml,
            "parts": found.parts,
            **{name: scores.get(name) for name in SCORES},
        }
        return Verdict(case, tuple(reasons), measured, tuple(skipped))

    def scores(self, found: Measured) -> dict[str, float]:
        """Return the scores that were measured."""
        values = {
            "embedding_distance": None if found.embedding is None else self.reference.distance(found.embedding),
            "disagreement": None if found.overlap is None else 1 - found.overlap,
            "entropy": found.entropy,
        }
        return {name: value for name, value in values.items() if value is not None}


def write_gates(run: Path, gates: Gates) -> Path:
    """Write `gates.json` into a RUN and return its path."""
    write_json(run / NAME, gates.to_json())
    return run / NAME


def read_gates(run: Path, sha256: Mapping[str, str] | None = None) -> Gates | None:
    """Return the gates of a RUN, or None where it has none.

    Args:
        run: The RUN.
        sha256: Of each fold's checkpoint as it is now; None does not compare.

    Raises:
        CheckpointError: If the file is damaged or of another version.
        UsageError: If it was made for other weights.
    """
    path = run / NAME
    if not path.is_file():
        return None
    again = "Make it again with `medssl calibrate`, or predict with --gates off."
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema version {content['schema_version']}")
        gates = Gates(
            model=content["model"]["sha256"],
            envelope=Envelope.from_json(content["envelope"]),
            reference=Reference.from_json(content["embedding"]),
            thresholds={name: Threshold(**values) for name, values in content["thresholds"].items()},
            temperature=float(content["temperature"]),
            step_size=float(content["options"]["step_size"]),
            mirroring_axes=tuple(content["options"]["mirroring_axes"]),
            facts=content["calibration"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} of the model cannot be used ({type(error).__name__}: {error}). {again}"
        ) from (error)
    if sha256 is not None and dict(gates.model) != dict(sha256):
        raise UsageError(f"{path.name} of the model was made for other weights. {again}")
    return gates
