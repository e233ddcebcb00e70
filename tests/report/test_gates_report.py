"""What the report says of gates: their thresholds in a RUN, their verdicts in a prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl.errors import DataError
from medssl.inference.gates.envelope import fit_envelope
from medssl.inference.gates.gates import Gates, write_gates
from medssl.inference.gates.measured import Measured
from medssl.inference.gates.reference import fit_reference
from medssl.inference.gates.thresholds import Threshold
from medssl.report.page import report
from tests.report.runs import segmentation_run


def gates_of(spacing: float) -> Gates:
    """Return gates of three made-up training cases."""
    cases = [
        Measured(
            spacing_mm=(spacing, 1.0, 1.0),
            extent_mm=(30.0, 40.0, 50.0 + number),
            slices=30,
            modality="MR",
            orientation="RAS",
            normalised=[(-1.0, 0.0, 2.0 + number)],
            volumes_ml={"organ": 3.0 + number},
            parts={"organ": 1},
        )
        for number in range(3)
    ]
    envelope = fit_envelope(cases, channels=1, modality="MR", reorients=True, raw=False)
    facts: dict[str, Any] = {
        "validation_cases": 19,
        "validation_verdicts": {"accepted": 17, "review": 2, "refused": 0},
        "temperature": {"fitted": False, "why": "1 validation cases show a label; two or more are needed"},
        "not_calibrated": ["disagreement: one fold without mirroring has nothing to disagree with"],
    }
    reference = fit_reference(np.random.default_rng(0).normal(size=(5, 3)))
    thresholds = {"entropy": Threshold(0.25, None, 19, 1)}
    return Gates({"fold_0": "0" * 64}, envelope, reference, thresholds, 1.0, 0.5, (), facts)


def test_the_page_of_a_run_tells_thresholds_and_what_they_rest_on(tmp_path: Path) -> None:
    run = segmentation_run(tmp_path / "run", tmp_path / "Dataset004_Hippocampus")
    assert 'id="gates"' not in report(run).read_text()
    write_gates(run, gates_of(2.5))
    page = report(run).read_text()
    assert "Verdicts on the 19 validation cases: 17 accepted, 2 review, 0 refused." in page
    assert "Not calibrated: disagreement" in page and "voxel size, z</td><td>2.5 to 2.5 mm" in page
    (run / "gates.json").write_text("{")
    assert "gates.json of the model cannot be used" in report(run).read_text()


def prediction(folder: Path, gates: dict[str, Any] | None) -> Path:
    """Write the table of a prediction of two cases."""
    folder.mkdir()
    content = {
        "model": {"labels": {"organ": [1]}},
        "predictions": [{"case": name, "volumes_ml": {"organ": 3.25}} for name in ("calm", "odd<b>")],
        "refused": [{"source": "x.nii.gz", "code": "truncated", "detail": "half of it"}],
        "gates": gates,
    }
    (folder / "predictions.json").write_text(json.dumps(content))
    return folder


def test_the_page_of_a_prediction_puts_the_gravest_verdict_first(tmp_path: Path) -> None:
    reasons = [{"code": "spacing_unlike", "words": "z: 9 mm of voxel size; accepted: 1 to 2"}]
    verdicts = [
        {"case": "calm", "verdict": "accepted", "reasons": [], "not_checked": []},
        {"case": "odd<b>", "verdict": "refused", "reasons": reasons, "not_checked": ["entropy: why"]},
    ]
    counts = {"accepted": 1, "review": 0, "refused": 1}
    page = report(prediction(tmp_path / "out", {"mode": "report", "counts": counts, "verdicts": verdicts})).read_text()
    assert page.index("odd&lt;b&gt;") < page.index("calm") and "<b>\n" not in page
    assert "1 accepted, 0 to review, 1 refused" in page and "may have a mask all the same" in page
    assert "z: 9 mm of voxel size; accepted: 1 to 2" in page and "truncated: half of it" in page


def test_a_prediction_without_gates_says_so_and_a_damaged_table_is_named(tmp_path: Path) -> None:
    page = report(prediction(tmp_path / "out", None)).read_text()
    assert "were not judged" in page and "3.25" in page and "verdict</th>" not in page
    (tmp_path / "out" / "predictions.json").write_text('{"predictions": 1}')
    with pytest.raises(DataError, match="damaged"):
        report(tmp_path / "out")
