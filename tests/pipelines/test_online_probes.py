"""The benchmark of online probes runs from end to end, and what it prints is sane."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "pipelines" / "benchmarks" / "online_probes.py"


@pytest.mark.slow
def test_the_share_of_looking_is_a_part_of_the_time() -> None:
    done = subprocess.run([sys.executable, str(BENCHMARK), "--tiny"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("quality "))
    share = float(row[4])
    assert 0 < share < 0.2
