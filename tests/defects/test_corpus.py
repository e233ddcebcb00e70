"""Every case of the defect corpus ends in a right volume or in a refusal with its code."""

from __future__ import annotations

from pathlib import Path

import pytest

from medssl.archive.codes import CODES
from medssl.archive.volume import Volume
from medssl.errors import InputRefused
from tests.defects import ours
from tests.defects.corpus import CORPUS
from tests.defects.truth import Defect


def ends(case: Defect, folder: Path, geometry: str) -> tuple[str, list[Volume]]:
    """Return `right`, `wrong` or the code, and the volumes."""
    try:
        volumes = ours.read(folder, case.kind, geometry)
    except InputRefused as refusal:
        return refusal.code, []
    return case.truth.judge([ours.as_found(volume) for volume in volumes]), volumes


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_a_defect_ends_in_a_right_volume_or_a_code(tmp_path: Path, case: Defect) -> None:
    folder = tmp_path / "case"
    case.write(folder)
    told: set[str] = set()
    for geometry in ("strict", "repair"):
        end, volumes = ends(case, folder, geometry)
        assert end == case.expected(geometry), (geometry, [volume.flags for volume in volumes])
        assert end == "right" or CODES[end].group == "refused"
        told |= {flag for volume in volumes for flag in volume.flags}
    assert set(case.flags) <= told <= set(CODES)


def test_the_corpus_has_its_size_and_each_case_a_name_of_its_own() -> None:
    names = [case.name for case in CORPUS]
    assert len(names) == len(set(names)) >= 40


def test_every_expected_refusal_tells_a_person_what_to_do() -> None:
    codes = {case.expected(geometry) for case in CORPUS for geometry in ("strict", "repair")} - {"right"}
    assert len(codes) > 20
    assert all(CODES[code].remedy for code in codes)


@pytest.mark.parametrize("case", [case for case in CORPUS if case.strict == "right"][:3], ids=lambda case: case.name)
def test_the_judge_sees_a_volume_that_lies_elsewhere(tmp_path: Path, case: Defect) -> None:
    case.write(tmp_path / "case")
    array, affine = ours.as_found(ours.read(tmp_path / "case", case.kind, "strict")[0])
    assert case.truth.judge([(array, affine)]) == "right"
    moved = affine.copy()
    moved[2, 3] += 1.0
    assert case.truth.judge([(array, moved)]) == "wrong"
    assert case.truth.judge([(array[..., ::-1], affine)]) == "wrong"
    assert case.truth.judge([(array + 1, affine)]) == "wrong"
