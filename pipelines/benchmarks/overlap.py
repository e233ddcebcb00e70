"""Does VoCo know how much crops of unseen volumes overlap?

Command: `python pipelines/benchmarks/overlap.py --workdir W` (some tens of minutes on two cores; `--quick` a minute).

VoCo is pretrained for a short while on most cases of a data set. On crops of unseen cases the overlap that it guesses
is compared with the true one: Pearson's correlation over all pairs of target and base crops of a case, its mean over
cases, and its interval from resampling patients. Controls: the network before training, and the trained one with the
overlaps of another case. Crops that overlap share voxels, so that a network without training is not at 0. What is kept
of a work folder is not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from _anatomy import SEED, Cases, interval, kept, pretrained, store_of
from _common import RESULTS, print_table, write_results

from medssl.data.batch import Views
from medssl.data.draw import Draw
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.preprocessing.store import Store
from medssl.pretraining.recipe import recipe_model
from medssl.pretraining.run import build_method, policy_of
from medssl.pretraining.voco import VoCo, correlation
from medssl.training.checkpoint import load_checkpoint

METHOD = "voco"
#: Patches of each unseen case.
PATCHES = 8
# Voxels small enough for patches of several bases to fit into the smallest volume.
TASKS = {
    "hippocampus": (0.75, ("patch_size=[32,48,32]", "grid=[2,3,2]", "batch_size=4")),
    "left_atrium": (1.25, ("patch_size=[32,64,64]", "grid=[1,2,2]", "batch_size=4")),
}


def main() -> None:
    """Pretrain, look at unseen cases, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="where stores and runs are made and found again")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), help="data sets")
    parser.add_argument("--steps", type=int, default=2000, help="of each pretraining")
    parser.add_argument("--unseen", type=int, default=20, help="cases that are looked at")
    parser.add_argument("--quick", action="store_true", help="few steps and cases; writes no results")
    options = parser.parse_args()
    steps, unseen = (4, 3) if options.quick else (options.steps, options.unseen)
    rows = []
    for name in TASKS:
        if options.only is None or name in options.only:
            folder = options.workdir / name
            found = kept(
                folder / "correlations.json", lambda name=name, folder=folder: measure(name, folder, steps, unseen)
            )
            for way, values in found.items():
                mean, low, high = interval(values, lambda chosen: float(np.mean(chosen)))
                rows.append(
                    {
                        "data": name,
                        "way": way,
                        "correlation": round(mean, 3),
                        "95 % interval": f"{low:.3f} to {high:.3f}",
                        "patients": len(values),
                    }
                )
    print_table(rows)
    if not options.quick:
        print(f"Written: {write_results('overlap', {'steps': steps, 'rows': rows}).relative_to(RESULTS.parents[2])}")


def measure(name: str, folder: Path, steps: int, unseen: int) -> dict[str, list[float]]:
    """Return the correlation on each unseen case, by way."""
    spacing, overrides = TASKS[name]
    cases = Cases.of(name, unseen)
    store = store_of(cases, cases.seen, spacing, folder / "store")
    other = Store.open(store_of(cases, cases.unseen, spacing, folder / "unseen"))
    # The heads stand in the checkpoints before the last one.
    saving = (f"save_every={steps - 1}", "keep=3")
    final = pretrained(METHOD, store, folder / "run", steps, (*overrides, *saving))
    content = load_checkpoint(final.with_name(f"step_{steps - 1:08d}.pth"))["medssl"]
    settings = recipe_model(METHOD)(**content["recipe"])
    methods: dict[str, VoCo] = {}
    for way in ("VoCo", "untrained network"):
        method = build_method(VoCo, settings, policy_of(VoCo, settings, other), 1)
        assert isinstance(method, VoCo)
        if way == "VoCo":
            method.load_state_dict(content["training"]["method"])
        methods[way] = method.eval()
    guessed, true = {way: looks(method, other) for way, method in methods.items()}, overlaps(methods["VoCo"], other)
    found = {
        way: [correlation(one, real).item() for one, real in zip(by_case, true, strict=True)]
        for way, by_case in guessed.items()
    }
    shifted = true[1:] + true[:1]
    found["VoCo, overlaps of another case"] = [
        correlation(one, wrong).item() for one, wrong in zip(guessed["VoCo"], shifted, strict=True)
    ]
    return found


def looks(method: VoCo, store: Store) -> list[Tensor]:
    """Return the overlaps that a method guesses on each case. Shape of each: (PATCHES, N, M)."""
    with torch.inference_mode():
        return [method.guess(views) for views in patches(method, store)]


def overlaps(method: VoCo, store: Store) -> list[Tensor]:
    """Return the true overlaps of the same crops. Shape of each: (PATCHES, N, M)."""
    return [method.overlaps(views) for views in patches(method, store)]


def patches(method: VoCo, store: Store) -> Iterator[Views]:
    """Yield the crops of `PATCHES` patches of each case; the same ones each time."""
    settings = CropSettings(
        patch_size=method.policy.patch_size, batch_size=PATCHES, crops_per_volume=PATCHES,
        read_size=method.policy.read_size, spread=None,
    )  # fmt: skip
    with CropLoader(store, settings, seed=SEED, split="all") as loader:
        for _, batch in zip(store.ids, loader.batches(0), strict=False):
            yield method.views(batch, Draw(SEED, batch.sample_index))


if __name__ == "__main__":
    main()
