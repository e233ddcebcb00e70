"""The benchmarks of reading run from end to end on tiny sizes, and what they print is sane."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from medssl.preprocessing.codec import CODECS

BENCHMARKS = Path(__file__).parents[2] / "pipelines" / "benchmarks"


def quick(name: str) -> list[list[str]]:
    """Return the printed lines of a benchmark, each split where its columns are."""
    command = [sys.executable, str(BENCHMARKS / name), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parents[1])
    assert done.returncode == 0, done.stderr
    return [line.split("  ") for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_every_program_reads_what_it_wrote() -> None:
    lines = [[cell.strip() for cell in line if cell.strip()] for line in quick("store_reading.py")]
    rows = [line for line in lines if line[0] == "synthetic" and len(line) > 2]
    errors = {row[2]: float(row[9]) for row in rows}
    assert {f"medssl {codec}" for codec in CODECS} <= errors.keys()
    lossy = {name for name in errors if name.startswith("medssl") and name != "medssl lossless"}
    assert all((errors[name] > 0) == (name in lossy) for name in errors)
    assert errors["medssl int16"] < errors["medssl float16"] < errors["medssl int8"]


@pytest.mark.slow
def test_every_kind_of_growth_is_measured() -> None:
    heads = [line[0].strip() for line in quick("growth.py") if line != [""]]
    assert [head for head in heads if head in ("crop", "batch", "workers", "volumes")][::2] == [
        "crop", "batch", "workers", "volumes",
    ]  # fmt: skip
