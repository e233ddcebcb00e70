"""What does a step of each semi-supervised method cost, in time and memory, relative to supervised training?

    python pipelines/benchmarks/semisupervised_costs.py [--only NAME ...]

Every registered method takes steps on resenc-xs with its defaults, float32, one thread, augmentation included, at nine
tenths of a run, where every ramp has risen: segmentation of patches of 32 x 32 x 32 with 2 labelled and 2 unlabelled
samples, classification of 64 x 64 with 8 and 8. Each method has a process of its own, which also runs the supervised
control, in turns. The control sees the labelled samples alone, as in a run, so that a ratio is what a user pays for the
unlabelled ones. Time is the processor's. Memory is by how much two steps raise the process's peak. Takes about ten
minutes of a core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

REPOSITORY = Path(__file__).resolve().parents[2]
#: Patch, classes, and samples of each part of a batch.
SIZES = {"segmentation": ((32, 32, 32), 2, 2), "classification": ((64, 64), 3, 8)}
TURNS = 5
CONTROL = "supervised"
STEPS = 1000


def main() -> None:
    """Run the benchmark, or one measurement of it in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--tiny", action="store_true", help="only show that it runs; nothing is written")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(_measure(*options.measure, tiny=options.tiny)))
        return
    from _common import print_table, write_results
    from _step_costs import in_process

    from medssl import registry_semisupervised as registry

    rows = []
    of_control: dict[str, float] = {}
    for name, entry in registry.SEMISUPERVISED.items():
        if options.only and name not in (*options.only, CONTROL):
            continue
        for task in entry.tasks:
            found = in_process(__file__, name, task, tiny=options.tiny)
            of_control.setdefault(task, found["mebibytes"])
            row = {
                "method": name, "task": task, "step, s": found["seconds"], "time / supervised": found["ratio"],
                "memory / supervised": round(found["mebibytes"] / of_control[task], 2),
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    print_table(rows)
    if not (options.tiny or options.only):
        sizes = {task: {"patch": size[0], "labelled": size[2], "unlabelled": size[2]} for task, size in SIZES.items()}
        payload = {"network": "resenc-xs", "sizes": sizes, "rows": rows}
        print(f"Written: {write_results('semisupervised_costs', payload).relative_to(REPOSITORY)}")


def _measure(name: str, task: str, *, tiny: bool) -> dict[str, float]:
    from _step_costs import beside

    found = beside(_stepping(name, task), lambda: _stepping(CONTROL, task), 1 if tiny else TURNS)
    return found | {"ratio": 1.0} if name == CONTROL else found


def _stepping(name: str, task: str) -> Callable[[], Any]:
    """Return what takes a step of a method, each on other random numbers."""
    import torch

    from medssl import registry_semisupervised as registry
    from medssl.augmentation.policy import policy_for
    from medssl.networks.build import build_network, freeze_unused_outputs
    from medssl.networks.classifier import Classifier
    from medssl.semisupervised.recipe import settle
    from medssl.semisupervised.task import ClassificationTask, SegmentationTask
    from medssl.training.devices import find_machine, launch
    from medssl.training.engine import Engine
    from medssl.training.method import Step

    torch.set_num_threads(1)
    patch, classes, _ = SIZES[task]
    machine = find_machine("cpu")
    settings = settle({"method": name, "steps": STEPS}, task, machine, "benchmark")
    kind = registry.semisupervised(name).load()
    networks = []
    for number in range(kind.network_count):
        unet = build_network("resenc-xs", dimensions=len(patch), out_channels=classes, seed=number)
        freeze_unused_outputs(unet)
        networks.append(unet if task == "segmentation" else Classifier(unet, classes, "multiclass"))
    chosen = SegmentationTask(classes) if task == "segmentation" else ClassificationTask(classes)
    first, *others = kind.purposes(settings.of_method())
    policy = policy_for(first, {"MR"}, patch)
    windows = [policy.read_size, *(policy.sibling(purpose).read_size for purpose in others)]
    window = tuple(max(edges) for edges in zip(*windows, strict=True))
    engine = Engine(kind(networks, chosen, policy, settings.of_method()), settings, launch(machine, "float32", "cpu"))
    engine.start()
    batch, indices = _batch(window, task, unlabelled=kind.uses_unlabelled), count(STEPS * 9 // 10)

    def step() -> Any:
        for part in (batch.labelled, batch.unlabelled):
            if part is not None:
                part.sample_index = part.sample_index + len(part)
        return engine.step(Step(next(indices), STEPS), [engine.views(batch)])

    return step


def _batch(window: tuple[int, ...], task: str, *, unlabelled: bool) -> Any:
    """Return labelled and unlabelled crops of smooth noise."""
    import torch
    from _gpu_timing import synthetic_batch

    from medssl.semisupervised.batch import PairedBatch
    from medssl.transfer.image_batches import ImageBatch

    _, classes, samples = SIZES[task]
    if task == "segmentation":
        labelled = synthetic_batch(window, samples, "cpu", labels=True)
        return PairedBatch(labelled, synthetic_batch(window, samples, "cpu") if unlabelled else None)
    parts = []
    for _ in range(2):
        slices = synthetic_batch((1, *window), samples, "cpu")
        parts.append(replace(slices, image=slices.image[:, :, 0]))
    target = torch.arange(samples) % classes
    return PairedBatch(ImageBatch(**vars(parts[0]), target=target), parts[1] if unlabelled else None)


if __name__ == "__main__":
    main()
