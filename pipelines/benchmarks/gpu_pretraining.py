"""How long does a step of masked-autoencoder pretraining take on a GPU, and how much memory?

python pipelines/benchmarks/gpu_pretraining.py

Runs the product's own loop, loader and augmentation on a synthetic store (made on the spot, no network needed), for
some networks, patches and batches, in bfloat16. A run of few steps warms up, a longer one is timed; the difference is
the steady step. Skips without a GPU. There is no peer: nnssl's cost is its CPU augmentation, which would not run here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _common import print_table, write_results
from _synthetic_store import synthetic_store

WARM_UP = 20
# Stop adding arms after this many seconds: a lease may end at ten minutes.
BUDGET_S = 480


@dataclass(frozen=True)
class Arm:
    """One thing to time."""

    network: str
    patch: int
    batch: int
    precision: str = "bf16"
    steps: int = 60


ARMS = (
    Arm("resenc-s", 96, 8),
    Arm("resenc-s", 64, 16),
    Arm("resenc-l", 96, 4),
    Arm("resenc-l", 128, 4),
    Arm("resenc-l", 160, 2),
    Arm("resenc-l", 160, 8, steps=40),
    Arm("resenc-m", 128, 4),
    Arm("plain-unet", 128, 4),
    Arm("resenc-l", 96, 4, precision="float32"),
    Arm("resenc-xs", 48, 32),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--results", type=Path, help="copy the JSON here too")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("Skipped: torch finds no GPU on this machine.")
        return
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        store = synthetic_store(Path(scratch) / "store", volumes=8, shape=(192, 224, 192)).folder
        print(f"store made in {time.monotonic() - began:.0f} s", flush=True)
        for number, arm in enumerate(ARMS):
            if time.monotonic() - began > BUDGET_S:
                print(f"out of time: {len(ARMS) - number} arms left out")
                break
            row = measure(arm, store, Path(scratch) / f"run_{number}", options.workers)
            rows.append(row)
            print(row, flush=True)
    print_table(rows)
    path = write_results("gpu_pretraining", {"rows": rows})
    if options.results is not None:
        options.results.write_bytes(path.read_bytes())


def measure(arm: Arm, store: Path, out: Path, workers: int) -> dict[str, Any]:
    """Return the steady step time, throughput, memory and data wait of one arm."""
    import torch

    from medssl.pretraining.run import pretrain
    from medssl.training.metrics import read_metrics

    settings = [
        f"network={arm.network}", f"patch_size={[arm.patch] * 3}", f"batch_size={arm.batch}",
        f"precision={arm.precision}", f"log_every={WARM_UP}", "health_every=100000", "validate_every=0",
        "pictures_every=0", "save_every=100000", "save_minutes=1000", "schedule.warmup_steps=10",
    ]  # fmt: skip
    row: dict[str, Any] = {
        "network": arm.network, "patch": arm.patch, "batch": arm.batch, "precision": arm.precision,
    }  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        pretrain("mae", store, out, overrides=settings, steps=arm.steps, device="cuda", workers=workers, quiet=True)
    except torch.cuda.OutOfMemoryError:
        return {**row, "ms per step": "out of memory"}
    logged = read_metrics(out)
    # Rows are written after waiting for the device, so the time between the first and the last is that of the steps.
    steps, seconds = logged[-1]["step"] - logged[0]["step"], logged[-1]["time"] - logged[0]["time"]
    waited = [entry["waiting_for_data"] for entry in logged[1:]]
    return {
        **row,
        "ms per step": round(1000 * seconds / steps, 1),
        "samples per s": round(arm.batch * steps / seconds, 2),
        "Mvoxel per s": round(arm.batch * arm.patch**3 * steps / seconds / 1e6, 1),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "waiting for data": round(sum(waited) / len(waited), 3),
        "loss": round(logged[-1]["loss"], 3),
    }


if __name__ == "__main__":
    main()
