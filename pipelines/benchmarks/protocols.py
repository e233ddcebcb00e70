"""Does pretraining pay, by the protocol: hippocampus, PneumoniaMNIST, breast ultrasound, methods against each other.

    python pipelines/benchmarks/protocols.py --workdir W [--only NAME ...]

Runs the recipes `pipelines/protocol_*.yaml` with `medssl protocol`, each in its folder of W, and keeps tables and
curves as `results/protocol_*`. What a folder holds already is not made again: its own recipe is gone on with, which may
name fewer arms or other budgets than the one in `pipelines/` and is kept beside the tables. Hours on two cores.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import RESULTS, print_table, write_results

from medssl.config import read_yaml
from medssl.protocol.run import protocol

PIPELINES = Path(__file__).resolve().parents[1]
NUMBERS = ("value", "low", "high", "p", "p_holm", "rate")


def main() -> None:
    """Run the protocols and write what they reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workdir", type=Path, required=True, help="where runs are made and found again")
    parser.add_argument("--only", nargs="+", help="names of recipes, without protocol_ and .yaml")
    options = parser.parse_args()
    for path in sorted(PIPELINES.glob("protocol_*.yaml")):
        name = path.stem.removeprefix("protocol_")
        if options.only is not None and name not in options.only:
            continue
        out = options.workdir / name
        begun = (out / "recipe.yaml").is_file()
        protocol(None if begun else path, out, resume=begun)
        rows, differences = table(out / "table.csv"), table(out / "differences.csv")
        print_table([row for row in rows if row["tested"] == "True"])
        payload = {"budget": budget(read_yaml(out / "recipe.yaml")), "rows": rows, "differences": differences}
        print(f"Written: {write_results(path.stem, payload).relative_to(PIPELINES.parent)}")
        for curves in out.glob("curves_*.png"):
            shutil.copyfile(curves, RESULTS / f"{path.stem}.png")


def table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV, figures as numbers."""
    with path.open(newline="") as handle:
        return [
            {name: float(text) if name in NUMBERS and text else text for name, text in row.items()}
            for row in csv.DictReader(handle)
        ]


def budget(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the figures of a recipe, without the place of the data."""
    datasets = {
        name: {key: value for key, value in content.items() if key not in ("path", "targets")}
        for name, content in recipe["datasets"].items()
    }
    arms = {
        name: (arm.get("pretrain") or {}).get("settings", {})
        for name, arm in recipe["arms"].items()
    }  # fmt: skip
    names = ("labels", "seeds", "rates", "rate_seeds", "training")
    return {"datasets": datasets, "arms": arms, **{name: recipe[name] for name in names if name in recipe}}


if __name__ == "__main__":
    main()
