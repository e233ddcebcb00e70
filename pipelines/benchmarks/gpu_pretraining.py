"""How well does pretraining use a GPU: arithmetic, input, augmentation, memory, and beside nnU-Net's step?

    python pipelines/benchmarks/gpu_pretraining.py [--results COPY_OF_THE_JSON]

ResEnc-L, patch 160, batch 8, bfloat16, masked autoencoder; everything is made on the spot, no network is needed, and it
ends within nine minutes. What does not fit into the card is tried with a smaller batch and says so. Each section runs
in a process of its own; what fails or takes too long is named, and the rest goes on.

- `arithmetic`: multiplications and additions of the convolutions, counted from the shapes, per second of the whole
  step, over the rate that the card reaches in large bfloat16 matrix products; with and without compiling and
  channels_last.
- `real / fixed`: steps with reading and augmentation over steps on views that are there. Goal: at most 1.05.
- `augmentation`: the whole policies on batches that are there, over the fastest step. Goal: at most 5 %.
- `host waits`: what in a step or a policy would make the host wait for the device. Goal: never.
- `nnU-Net's step`: what is compared is the machinery of a step (autocast, scaler, optimiser, clipping, copies), on the
  same network, patch and batch and with a mean squared error in both; nnU-Net's loss, its deep supervision and its
  input are left out. float16 there, bfloat16 here, as each does by default. nnU-Net compiles by default.

Without a GPU it is skipped; `--device cpu --tiny` shows that every section runs, but for compiling.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from _common import print_table, write_results

SECTIONS = Path(__file__).with_name("_gpu_sections.py")
# A machine may be lent for ten minutes.
BUDGET_S = 520
NETWORK, PATCH, BATCH = "resenc-l", 160, 8
# Cheap ones first; compiling takes minutes.
STEPS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("medssl", "step", {"memory_format": "contiguous"}),
    ("medssl, channels_last", "step", {"memory_format": "channels_last"}),
    ("nnU-Net's step", "peer", {}),
)
COMPILED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("medssl, channels_last, compiled", "step", {"memory_format": "channels_last", "compile": True}),
    ("nnU-Net's step, compiled", "peer", {"compile": True}),
    ("medssl, compiled", "step", {"memory_format": "contiguous", "compile": True}),
)
GOALS = {"real / fixed": 1.05, "augmentation over step": 0.05, "host waits": "never"}


def main() -> None:
    """Run every section, print tables, write JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--results", type=Path, help="copy the JSON here too")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("Skipped: torch finds no GPU on this machine.")
        return
    bench = _Bench(options)
    rate = bench.section("rate", "rate", seconds=5.0, network=bench.network, patch=bench.patch)
    bench.content["card"] = rate
    for label, section, more in STEPS:
        bench.step(label, section, more)
    fastest = bench.fastest()
    batch = fastest["batch"] if fastest else bench.batch
    layout = "channels_last" if fastest and "channels_last" in fastest["arm"] else "contiguous"
    # Batches on their way need memory too: where they do not fit beside the largest step, half of it is taken.
    for samples in (batch, max(batch // 2, 1)):
        found = bench.section(
            "real input", "real", seconds=30.0, network=bench.network, patch=bench.patch, batch=samples,
            workers=options.workers, shape=bench.shape, memory_format=layout,
        )  # fmt: skip
        bench.content["input"] = found
        if "OutOfMemory" not in found.get("failed", ""):
            break
    found = bench.section("augmentation", "augmentation", seconds=16.0, patch=bench.patch, batch=batch)
    bench.content["augmentation"] = found.get("rows", found)
    bench.write()
    for label, section, more in COMPILED[: 0 if options.tiny else None]:
        bench.step(label, section, more)
    bench.show()


class _Bench:
    """Runs sections and keeps what they found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ends = time.monotonic() + BUDGET_S
        tiny = options.tiny
        self.network, self.patch, self.batch = ("resenc-xs", 32, 2) if tiny else (NETWORK, PATCH, BATCH)
        self.shape = [40, 44, 40] if tiny else [192, 224, 192]
        self.content: dict[str, Any] = {
            "network": self.network, "patch": self.patch, "batch": self.batch, "goals": GOALS, "steps": [],
        }  # fmt: skip

    def section(self, label: str, name: str, *, seconds: float, **more: Any) -> dict[str, Any]:
        """Run a section in a process of its own and return what it printed last."""
        left = self.ends - time.monotonic()
        if left < 15:
            return {"failed": "out of time"}
        given = {"device": self.options.device, "seconds": 0.05 if self.options.tiny else seconds, **more}
        began = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, str(SECTIONS), name, json.dumps(given)],
                capture_output=True, text=True, timeout=left, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"failed": "out of time"}
        print(f"{label}: {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            print(done.stderr[-3000:], flush=True)
            lines = done.stderr.strip().splitlines() or ["ended without a word"]
            return {"failed": lines[-1][:300]}
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return result

    def step(self, label: str, section: str, more: dict[str, Any]) -> None:
        """Time one kind of step and put it beside the card's rate."""
        row = self.section(
            label, section, seconds=12.0, network=self.network, patch=self.patch, batch=self.batch, **more
        )
        card = self.content["card"]
        if "samples per s" in row and "TFLOP per sample" in card:
            row["TFLOP/s"] = row["samples per s"] * card["TFLOP per sample"]
            row["arithmetic"] = row["TFLOP/s"] / card["matmul TFLOP/s"]
        self.content["steps"].append({"arm": label, **row})
        self.write()

    def fastest(self) -> dict[str, Any] | None:
        """Return the fastest of our steps so far."""
        ours = [row for row in self.content["steps"] if row["arm"].startswith("medssl") and "ms" in row]
        return max(ours, key=lambda row: row["samples per s"], default=None)

    def write(self) -> None:
        """Write what is known so far, with the augmentation beside the fastest step."""
        fastest = self.fastest()
        for row in self.content.get("augmentation") or ():
            if fastest and isinstance(row, dict) and "ms" in row:
                row["over step"] = row["ms"] / (fastest["ms"] * row["batch"] / fastest["batch"])
        if self.options.tiny:
            return
        path = write_results("gpu_pretraining", self.content)
        if self.options.results is not None:
            shutil.copyfile(path, self.options.results)

    def show(self) -> None:
        """Print the tables."""
        self.write()
        print(json.dumps(self.content["card"], indent=1))
        columns = (
            "arm", "compiled", "batch", "ms", "samples per s", "TFLOP/s", "arithmetic", "peak GiB", "first step s",
            "failed",
        )  # fmt: skip
        print_table([{name: row.get(name, "") for name in columns} for row in self.content["steps"]])
        print()
        print_table([{name: value for name, value in self.content["input"].items() if name != "ratios"}])
        print()
        rows = self.content["augmentation"]
        if isinstance(rows, list):
            print_table([{name: value for name, value in row.items() if name != "ms by transform"} for row in rows])
            for row in rows:
                slowest = sorted(row["ms by transform"].items(), key=lambda entry: entry[1], reverse=True)[:8]
                print(f"{row['purpose']} {row['modality']}: {', '.join(f'{name} {ms:.3g} ms' for name, ms in slowest)}")
        else:
            print(rows)
        print(f"Goals: {GOALS}")


if __name__ == "__main__":
    main()
