"""Looks on while cases are predicted: measures each one at the places it passes, and keeps the verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medssl.errors import InputRefused, UsageError, unknown_name
from medssl.files import write_json
from medssl.inference.embedding import embed
from medssl.inference.frozen import Frozen, freeze
from medssl.inference.gates.certainty import Certainty
from medssl.inference.gates.gates import NAME, SCHEMA_VERSION, Gates, read_gates
from medssl.inference.gates.measured import Measured, measure_image, measure_mask, percentiles_of
from medssl.inference.gates.members import Members
from medssl.inference.gates.verdict import ACCEPTED, REFUSED, REVIEW, Reason, Verdict, in_words
from medssl.inference.grid import Grid
from medssl.inference.model import SegmentationModel
from medssl.inference.preprocess import Prepared
from medssl.inference.source import Image
from medssl.inference.volumes import volumes_of_arrays
from medssl.inference.window import Observer

Array = NDArray[Any]
MODES = ("report", "enforce", "off")


class Watch:
    """Sees one case pass and does nothing; the gates' own watch measures."""

    observer: Observer | None = None

    def image(self, image: Image) -> None:
        """See the case as it was read, before preprocessing changes it."""

    def prepared(self, prepared: Prepared) -> None:
        """See the network's input."""

    def rows(self, rows: Iterable[Array]) -> Iterable[Array]:
        """See the averaged logits pass."""
        return rows

    def mask(self, mask: Array, grid: Grid) -> None:
        """See the labels. Shape: (Z, Y, X) in the reader's axes."""


class Measuring(Watch):
    """Measures a case.

    Args:
        model: What predicts.
        frozen: Its encoder.
        temperature: Divides logits before they become probabilities.
    """

    def __init__(self, model: SegmentationModel, frozen: Frozen, temperature: float = 1.0) -> None:
        regions = bool(model.labels.has_regions)
        self.model, self.frozen = model, frozen
        self.members = Members(regions)
        self.certainty = Certainty(regions, temperature)
        self.observer = self.members
        self.found = Measured()

    def image(self, image: Image) -> None:
        """Measure geometry and intensities."""
        self.found = measure_image(image)

    def prepared(self, prepared: Prepared) -> None:
        """Measure the input's intensities and where the encoder puts it."""
        self.found.normalised = percentiles_of(prepared.data)
        volumes = volumes_of_arrays([prepared.data], ["case"])
        self.found.embedding = embed(self.frozen, volumes).features[0].astype(np.float64)

    def rows(self, rows: Iterable[Array]) -> Iterator[Array]:
        """Measure how sure the network is."""
        yield from self.certainty.pass_on(rows)
        self.found.overlap, self.found.members = self.members.overlap(), max(self.members.count, 1)
        self.found.entropy, self.found.confidence = self.certainty.entropy(), self.certainty.confidence()

    def mask(self, mask: Array, grid: Grid) -> None:
        """Measure the labels."""
        self.found.volumes_ml, self.found.parts = measure_mask(mask, grid, self.model.label_values)


class Gatekeeper:
    """Judges the cases of one prediction.

    Args:
        gates: The model's, or None where there are none or they are off.
        mode: `report`, `enforce` or `off`.
        model: What predicts.
        step_size: Of the window.
        mirroring_axes: Of the window.
    """

    def __init__(
        self,
        gates: Gates | None,
        mode: str,
        model: SegmentationModel,
        step_size: float,
        mirroring_axes: tuple[int, ...],
    ) -> None:
        self.gates, self.mode, self.model = gates, mode, model
        self.window = {"step_size": step_size, "mirroring_axes": mirroring_axes}
        self.verdicts: list[Verdict] = []
        self._frozen = None if gates is None else encoder_of(model)

    def watch(self, case: str) -> Watch:
        """Return what looks at a case."""
        if self.gates is None or self._frozen is None:
            return Watch()
        return _Guard(self, case, Measuring(self.model, self._frozen, self.gates.temperature))

    def judge(self, case: str, found: Measured) -> Verdict:
        """Return the word on what is known of a case so far."""
        assert self.gates is not None
        return self.gates.judge(case, found, **self.window)  # type: ignore[arg-type]

    def refused(self, case: str, code: str, detail: str) -> None:
        """Note an input that was refused, unless the gates themselves did."""
        if self.gates is None or any(verdict.case == case for verdict in self.verdicts):
            return
        known = "channel_count" if code == "channels_incomplete" else "not_read"
        self.verdicts.append(Verdict(case, (Reason(known, "refused", code, "", f"{code}: {detail}"),)))

    def facts(self) -> dict[str, Any] | None:
        """Return the content of the output's `gates.json`; None without gates."""
        if self.gates is None:
            return None
        counts = Counter(verdict.verdict for verdict in self.verdicts)
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "verdicts",
            "mode": self.mode,
            "counts": {name: counts[name] for name in (ACCEPTED, REVIEW, REFUSED)},
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
        }

    def write(self, out: Path) -> None:
        """Write the verdicts into the output folder, if there are gates."""
        facts = self.facts()
        if facts is not None:
            write_json(out / NAME, facts)


def open_gatekeeper(
    run: Path, mode: str, model: SegmentationModel, step_size: float, mirroring_axes: tuple[int, ...]
) -> Gatekeeper:
    """Return the gatekeeper of a prediction.

    Args:
        run: The model's folder.
        mode: `report` judges where the model has gates, `enforce` demands that it has, `off` does not look.
        model: What predicts.
        step_size: Of the window.
        mirroring_axes: Of the window.

    Raises:
        UsageError: If there is no such mode, `enforce` finds no gates, or they are of other weights.
        CheckpointError: If `gates.json` is damaged.
    """
    if mode not in MODES:
        raise unknown_name("mode of --gates", mode, MODES)
    gates = None if mode == "off" else read_gates(run, model.sha256)
    if gates is None and mode == "enforce":
        raise UsageError("--gates enforce: the model has no gates.json. Make it with `medssl calibrate RUN`.")
    return Gatekeeper(gates, mode, model, step_size, mirroring_axes)


def encoder_of(model: SegmentationModel) -> Frozen:
    """Return the encoder of the first fold as what features come from."""
    return freeze(model.networks[0], model.patch_size, device=model.device)


class _Guard(Watch):
    """Measures a case, and stops a strange one where gates are enforced."""

    def __init__(self, keeper: Gatekeeper, case: str, measuring: Measuring) -> None:
        self.keeper, self.case, self.measuring = keeper, case, measuring
        self.observer = measuring.observer

    def image(self, image: Image) -> None:
        self.measuring.image(image)
        self._check()

    def prepared(self, prepared: Prepared) -> None:
        self.measuring.prepared(prepared)
        self._check()

    def rows(self, rows: Iterable[Array]) -> Iterable[Array]:
        return self.measuring.rows(rows)

    def mask(self, mask: Array, grid: Grid) -> None:
        self.measuring.mask(mask, grid)
        self.keeper.verdicts.append(self.keeper.judge(self.case, self.measuring.found))

    def _check(self) -> None:
        """Stop the case before the network's work is spent on it.

        Raises:
            InputRefused: With `outside_training`.
        """
        if self.keeper.mode != "enforce":
            return
        verdict = self.keeper.judge(self.case, self.measuring.found)
        if verdict.verdict == REFUSED:
            self.keeper.verdicts.append(verdict)
            raise InputRefused("outside_training", in_words(verdict.reasons))


def described(facts: dict[str, Any]) -> Sequence[str]:
    """Return the verdicts of `Gatekeeper.facts` as lines for the terminal; accepted ones only as a number."""
    counts = ", ".join(f"{count} {name}" for name, count in facts["counts"].items())
    lines = [f"Gates: {counts}"]
    for verdict in facts["verdicts"]:
        if verdict["verdict"] != ACCEPTED:
            words = "; ".join(reason["words"] for reason in verdict["reasons"])
            lines.append(f"{verdict['verdict']}: {verdict['case']}: {words}")
    return lines
