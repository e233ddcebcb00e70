"""A slice of what `pipelines/benchmarks/fuzz.py` does with 100,000 damaged files, and that it would tell."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "pipelines" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_damaged_headers_end_in_a_volume_or_a_documented_code() -> None:
    import fuzz

    report = fuzz.fuzz(300, seed=7)
    assert report.count == 300 and report.findings == []
    assert report.ends["volume"] > 30 and len(report.ends) > 6
    assert 0 < report.peak_mb < 400


def test_what_is_late_is_tried_again_with_more_of_the_clock() -> None:
    import fuzz

    # A process cannot start in this time; the second time it has 20 times of it.
    report = fuzz.fuzz(3, seed=7, hang=0.25)
    assert report.count == 3 and report.late + sum("hang" in what for _, what in report.findings) >= 1


def test_seed_and_number_decide_the_damage() -> None:
    import _fuzz

    assert len({_fuzz.damaged(3, number) for number in range(40)}) == 40
    assert [_fuzz.damaged(3, number) for number in range(40)] == [_fuzz.damaged(3, number) for number in range(40)]
    assert _fuzz.damaged(3, 5) != _fuzz.damaged(4, 5)


def test_whole_files_are_volumes(tmp_path: Path) -> None:
    import _fuzz

    ends = {}
    for name, content in _fuzz.sources().items():
        (tmp_path / "x").write_bytes(content)
        ends[name] = _fuzz._read(tmp_path / "x", "strict")[0]
    assert {name for name, end in ends.items() if end != "volume"} == {"slice", "pet"}


@pytest.mark.parametrize(
    ("end", "fault", "peak_mb", "told"),
    [
        ("volume", "", 100.0, ""),
        ("truncated", "", 100.0, ""),
        ("decode_crashed", "", 100.0, ""),
        ("KeyError", "", 100.0, "no documented code"),
        ("volume", "accepted with voxels that are not finite", 100.0, "not finite"),
        ("decode_timeout", "", 100.0, "hang"),
        ("decode_memory", "", 0.0, "memory"),
        ("volume", "", 2000.0, "memory"),
    ],
)
def test_escapes_hangs_and_memory_are_told(end: str, fault: str, peak_mb: float, told: str) -> None:
    import fuzz
    from _fuzz import Read

    finding = fuzz._finding(Read(end, fault, peak_mb, 1.0), 1024.0, 10.0)
    assert fuzz._finding(Read("volume", "", 1.0, 0.0, seconds=11.0), 1024.0, 10.0) == "hang"
    assert (told in finding) and bool(finding) == bool(told)
