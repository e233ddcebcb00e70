"""Does every recipe run as its head says, and what does it reach?

Command: `python pipelines/benchmarks/recipes.py --workdir W` (hours on two cores; `--only NAME` runs one).

The commands at the head of each `pipelines/*.yaml` are run as they stand, in a work folder, on the data of
`MEDSSL_DATA`. Kept are the first and the last loss, the last figures of the method's health, and the time. A recipe
whose work folder holds its results already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import RESULTS, print_table, write_results

PIPELINES = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("MEDSSL_DATA", PIPELINES.parents[1] / "shared" / "data"))
# A copied command finds `medssl` on its path; here it is this interpreter's.
# Exit code 3 means done, with some input refused.
SHELL = 'set -euo pipefail\nmedssl() { "$PYTHON" -m medssl "$@" || [ $? -eq 3 ]; }\npython() { "$PYTHON" "$@"; }\n'


def main() -> None:
    """Run the recipes and write what they reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where stores and runs are made and found again")
    parser.add_argument("--only", nargs="+", help="names of recipes, without .yaml")
    options = parser.parse_args()
    rows = []
    for path in sorted(PIPELINES.glob("*_mae.yaml")):
        kept = options.workdir / "results" / f"{path.stem}.json"
        if not kept.is_file() and options.only is not None and path.stem not in options.only:
            continue
        if not kept.is_file():
            print(f"{time.strftime('%H:%M:%S')} {path.name}", flush=True)
            row = run(path, options.workdir / path.stem)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(row))
        rows.append(json.loads(kept.read_text()))
    print_table(rows)
    print(f"Written: {write_results('recipes', {'rows': rows}).relative_to(RESULTS.parents[2])}")


def run(recipe: Path, folder: Path) -> dict[str, Any]:
    """Run the commands of a recipe and return what its pretraining reached."""
    folder.mkdir(parents=True, exist_ok=True)
    script = SHELL + commands(recipe).replace("../shared/data", str(DATA)).replace("pipelines/", f"{PIPELINES}/")
    wall, cpu = time.monotonic(), _children_cpu()
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(f"{recipe.name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    (metrics,) = folder.glob("runs/*_mae/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    health = {name: value for row in rows for name, value in row.items() if name.startswith("health/error")}
    validation = [row["validation/loss"] for row in rows if "validation/loss" in row]
    return {
        "recipe": recipe.stem,
        "steps": rows[-1]["step"],
        "first loss": round(rows[0]["loss"], 3),
        "last loss": round(rows[-1]["loss"], 3),
        "validation loss": round(validation[-1], 3) if validation else "",
        "error to mean": round(health["health/error_to_mean"], 3),
        "error to neighbours": round(health["health/error_to_neighbours"], 3),
        "minutes": round((time.monotonic() - wall) / 60, 1),
        "processor minutes": round((_children_cpu() - cpu) / 60, 1),
    }


def commands(recipe: Path) -> str:
    """Return the commands at the head of a recipe: its comment up to the first empty line of it."""
    lines = []
    for line in recipe.read_text().splitlines():
        if not line.startswith("# "):
            break
        lines.append(line[2:])
    return "\n".join(lines)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
