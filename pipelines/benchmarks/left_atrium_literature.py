"""What do semi-supervised methods reach by the literature's left-atrium protocol, and what does that protocol leak?

    python pipelines/benchmarks/left_atrium_literature.py --prepare ../shared/data/left_atrium --packed P.npz
    python pipelines/benchmarks/left_atrium_literature.py --packed P.npz --workdir W [--only NAME ...] [--labelled 8 16]

The protocol: V-Net, crops of 112 x 112 x 80 voxels, quarter turns and mirrorings in the plane, SGD, the last checkpoint
of the student (of two networks the first); windows of that size every 18 x 18 x 4 voxels, the mean of their
probabilities, Dice, Jaccard, 95HD and ASD in voxels. The first N of the public list are labelled. The leaks of this
protocol, and what is done differently here, are printed with the table and beside the published rows.

The first command needs nibabel; its file, about 43 MB, is all that a GPU machine needs beside medssl. The second one
trains and tests one run after the other, each in a folder of W: what is done is not done again, what was interrupted is
gone on with. Mixed precision (bfloat16) on a GPU; at full size, a CPU takes days. Runs of at least 6000 steps go into
the JSON, all that W holds. `--quick` shows on made data that everything runs; it writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from _common import print_table, write_results
from _left_atrium import HELD_OUT, made, prepare, segment, subset, unpacked, voxel_scores
from _left_atrium_table import DEVIATIONS, LEAKS, PUBLISHED, rows_of, show, shown
from lightning.fabric import Fabric
from torch import Tensor, nn

from medssl import registry_semisupervised as registry
from medssl.augmentation.policy import policy_for
from medssl.config import apply_overrides
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings
from medssl.evaluation.segmentation import largest_part
from medssl.files import write_json
from medssl.networks.architecture import architecture
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.networks.vnet import VNet
from medssl.preprocessing.store import Store
from medssl.pretraining.run import reader_processes
from medssl.semisupervised.batch import PairedLoader
from medssl.semisupervised.method import SemiSupervised
from medssl.semisupervised.recipe import SemiTrainingSettings, exported, settle
from medssl.semisupervised.task import SegmentationTask
from medssl.training.checkpoint import FOLDER, find_checkpoint, load_checkpoint, newest_intact
from medssl.training.devices import find_machine, launch, own_random_state
from medssl.training.environment import library_versions
from medssl.training.layout import contiguous_weights
from medssl.training.loop import Job, train
from medssl.transfer.overlay import overlay

METHODS = ("supervised", "mean-teacher", "uncertainty-teacher", "cps", "bcp", "tracoco")
FULL_STEPS = 6000
STUDENT = {"predict_with": "student"}
#: What a method is told beside its defaults. V-Net itself drops channels.
OWN: dict[str, dict[str, Any]] = {
    "mean-teacher": STUDENT,
    "uncertainty-teacher": STUDENT | {"dropout": 0.0},
    "bcp": STUDENT,
}


@dataclass(frozen=True)
class Scale:
    """Sizes (z, y, x) and numbers of a run.

    Args:
        patch: What the network sees.
        wide: What TraCoCo places its two crops in.
        stride: Distance of the windows of a test.
        filters: Channels of V-Net's first stage.
        held_out: Volumes that are tested.
        together: Windows in one call.
    """

    patch: tuple[int, int, int] = (80, 112, 112)
    wide: tuple[int, int, int] = (88, 132, 148)
    stride: tuple[int, int, int] = (4, 18, 18)
    filters: int = 16
    held_out: int = HELD_OUT
    together: int = 8


QUICK = Scale((16, 16, 16), (20, 24, 24), (4, 8, 8), filters=2, held_out=2)


def options_of(given: Sequence[str] | None) -> argparse.Namespace:
    """Return what the user said; `given` stands in for the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prepare", type=Path, metavar="DATASET", help="nnU-Net raw folder to pack, and nothing else")
    parser.add_argument("--packed", type=Path, help="the file that --prepare makes")
    parser.add_argument("--workdir", type=Path, help="where runs are made and found again")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, help="methods")
    parser.add_argument("--labelled", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--steps", type=int, default=FULL_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--network", default="vnet", help="vnet, or a network of medssl")
    parser.add_argument("--checkpoint", type=Path, help="pretrained weights for a network of medssl")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="settings of training and method")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="only show that it runs; nothing is written")
    options = parser.parse_args(given)
    if options.prepare is not None and options.packed is None:
        parser.error("--prepare needs --packed, the file to write.")
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Prepare, or run what is not done yet and print the tables."""
    options = options_of(given)
    if options.prepare is not None:
        prepare(options.prepare, options.packed)
        print(f"Written: {options.packed}, {options.packed.stat().st_size / 1e6:.1f} MB")
        return
    if options.quick:
        options.labelled, options.steps = [2], min(options.steps, 2)
        with tempfile.TemporaryDirectory() as scratch:
            store = made(Path(scratch) / "store", 6, (20, 24, 24))
            show([Run(Path(scratch), store, name, 2, QUICK, options).done() for name in options.only])
        return
    if options.packed is None or options.workdir is None:
        raise SystemExit("Name --packed and --workdir, or show that it runs with --quick.")
    store = unpacked(options.packed, options.workdir / "store")
    runs = [
        Run(options.workdir, store, name, count, Scale(), options)
        for count in options.labelled
        for name in options.only
    ]  # fmt: skip
    found = []
    for run in runs:
        found.append(run.done())
        print_table([shown(row) for row in rows_of(found)[-2:]])
    show(found)
    kept = [json.loads(path.read_text()) for path in sorted(options.workdir.glob("*/scores.json"))]
    full = [run for run in kept if run["steps"] >= FULL_STEPS]
    if full:
        payload = {
            "protocol": {"patch (x, y, z)": [112, 112, 80], "stride (x, y, z)": [18, 18, 4], "tested": HELD_OUT},
            "leaks": LEAKS, "deviations": DEVIATIONS, "published": PUBLISHED, "rows": rows_of(full), "runs": full,
        }  # fmt: skip
        print(f"Written: {write_results('left_atrium_literature', payload).name}")


class Run:
    """One method with some labels: trained, tested, and kept in a folder of its own.

    Args:
        workdir: Where that folder is.
        store: All volumes.
        method: Name of the method.
        labelled: How many volumes of the public list have labels.
        scale: Sizes.
        options: What the user said.
    """

    def __init__(
        self, workdir: Path, store: Store, method: str, labelled: int, scale: Scale, options: argparse.Namespace
    ) -> None:
        self.store, self.method, self.labelled, self.scale, self.options = store, method, labelled, scale, options
        pretrained = "" if options.checkpoint is None else "_pretrained"
        self.name = f"{method}_{labelled}_{options.network}{pretrained}_seed{options.seed}"
        self.out = workdir / self.name
        order: list[str] = store.info["order"]
        left = len(order) - scale.held_out
        if not 0 < labelled < left:
            raise SystemExit(f"--labelled {labelled}: {left} volumes are for training, and some must stay unlabelled.")
        self.known, self.others, self.tested = order[:labelled], order[labelled:left], order[left:]
        self.machine = find_machine(options.device)
        self.settings = settle(self._values(), "segmentation", self.machine, "left_atrium_literature")

    def _values(self) -> dict[str, Any]:
        still = {"probability": 0.0}
        turns = {"rotation": still, "scale": still, "rot90": {"probability": 0.75, "axes": ["z"]}}
        spatial = {**turns, "mirror": {"probability": 0.5, "axes": ["y", "x"]}}
        values = {
            "method": self.method,
            "steps": self.options.steps,
            "seed": self.options.seed,
            "batch_size": 2,
            "labelled_policy": "weak",
            "foreground_probability": 0.0,
            "augmentation": {"laterality": "allow", "overrides": {"spatial": spatial}},
            "optimiser": {"name": "sgd", "learning_rate": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
            "schedule": {"name": "poly", "power": 0.9},
            "clip_gradient": None,
            "pictures_every": 0,
            "save_minutes": 2.0,
            "keep": 1,
            **OWN.get(self.method, {}),
        }
        return apply_overrides(values, self.options.set)

    def done(self) -> dict[str, Any]:
        """Return the scores; train and test first where that is not done."""
        path, recipe = self.out / "scores.json", {**exported(self.settings), "network": self.options.network}
        self.out.mkdir(parents=True, exist_ok=True)
        kept = self.out / "recipe.json"
        recipe["workers"] = None
        if kept.is_file() and json.loads(kept.read_text()) != json.loads(json.dumps(recipe)):
            raise SystemExit(f"{self.out} was begun with other settings: name another --workdir.")
        write_json(kept, recipe)
        if not path.is_file():
            fabric = launch(self.machine, self.settings.precision, self.options.device)
            last = self.trained(fabric)
            write_json(path, self._facts(fabric) | {"cases": self.scores(last, fabric.device)})
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def trained(self, fabric: Fabric) -> Path:
        """Return the last checkpoint; go on from the newest one where the run was interrupted."""
        state = None
        if any((self.out / FOLDER).glob("step_*.pth")):
            last = newest_intact(self.out / FOLDER)
            state = load_checkpoint(last)["medssl"]["training"]
            if state is None:
                return last
        settings = self.settings
        kind: type[SemiSupervised] = registry.semisupervised(self.method).load()
        with own_random_state(settings.seed, self.machine.cuda), ExitStack() as stack:
            networks = [self.network(settings.seed + number) for number in range(kind.network_count)]
            policy = policy_for("weak", {"MR"}, self.scale.patch, settings.augmentation)
            method = kind(networks, SegmentationTask(2), policy, settings.of_method())  # type: ignore[arg-type]
            loaders = self._loaders(fabric, unlabelled=kind.uses_unlabelled)
            for loader in loaders:
                if loader is not None:
                    stack.enter_context(loader)
            job = Job(
                method, settings, PairedLoader(*loaders), None, self.out, Content(method, settings), self.name,  # type: ignore[arg-type]
                look_every=0,
            )  # fmt: skip
            return train(job, fabric, state=state)

    def network(self, seed: int) -> nn.Module:
        """Return a network that starts from a seed, or from pretrained weights but for its output."""
        name, checkpoint = self.options.network, self.options.checkpoint
        if name == "vnet":
            if checkpoint is not None:
                raise SystemExit("--checkpoint is for networks of medssl, not for vnet.")
            return VNet(filters=self.scale.filters, seed=seed)
        architecture(name, 3).check_patch(self.scale.patch)
        network = build_network(name, dimensions=3, out_channels=2, seed=seed)
        freeze_unused_outputs(network)
        if checkpoint is not None:
            weights = load_checkpoint(find_checkpoint(checkpoint), numpy_scalars=True)["network_weights"]
            print(overlay(network, weights, decoder=True).summary())
        return network

    def _loaders(self, fabric: Fabric, *, unlabelled: bool) -> tuple[CropLoader, CropLoader | None]:
        settings, streams = self.settings, self.out / "streams"
        shared: dict[str, Any] = {"foreground_probability": settings.foreground_probability}
        place: dict[str, Any] = {"workers": reader_processes(settings), "device": fabric.device, "split": "all"}
        crops = CropSettings(patch_size=self.scale.patch, batch_size=settings.batch_size, labels=True, **shared)
        store = subset(self.store, self.known, streams / "labelled", labels=True)
        first = CropLoader(store, crops, seed=settings.seed, **place)
        if not unlabelled:
            return first, None
        # The sampler keeps what it places inside of a volume: two crops of it never show padding.
        size = self.scale.wide if self.method == "tracoco" else self.scale.patch
        crops = CropSettings(patch_size=size, batch_size=settings.unlabelled_batch_size or 2, **shared)
        store = subset(self.store, self.others, streams / "unlabelled", labels=False)
        return first, CropLoader(store, crops, seed=settings.seed + 1, **place)

    def scores(self, checkpoint: Path, device: torch.device) -> dict[str, Any]:
        """Return the scores of each tested volume, of the whole prediction and of its largest part."""
        network = self.network(0)
        network.load_state_dict(load_checkpoint(checkpoint)["network_weights"])
        network.to(device).eval()
        found = {}
        for case in self.tested:
            stop = self.store.row(case)["shape"][1:]
            image, truth = self.store.read(case, (0, 0, 0), stop)[0], self.store.read_label(case, (0, 0, 0), stop)
            assert truth is not None
            mask = segment(network, image, self.scale.patch, self.scale.stride, device, self.scale.together)
            found[case] = {
                "whole": voxel_scores(mask, truth > 0), "largest part": voxel_scores(largest_part(mask), truth > 0)
            }  # fmt: skip
        return found

    def _facts(self, fabric: Fabric) -> dict[str, Any]:
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        cuda = fabric.device.type == "cuda"
        return {
            "method": self.method, "labelled": self.labelled, "network": self.options.network,
            "pretrained": self.options.checkpoint is not None, "seed": self.options.seed, "steps": self.options.steps,
            "seconds a step": round(json.loads(lines[-1])["time"] / self.options.steps, 4),
            "device": torch.cuda.get_device_name() if cuda else "CPU", "precision": self.settings.precision,
            "libraries": library_versions(), "finished": time.strftime("%Y-%m-%d"),
        }  # fmt: skip


class Content:
    """Makes the content of a checkpoint: the network that predicts."""

    def __init__(self, method: SemiSupervised, settings: SemiTrainingSettings) -> None:
        self.method, self.settings = method, settings

    def __call__(self, weights: dict[str, Tensor], step: int, state: dict[str, Any] | None) -> dict[str, Any]:
        """Return it after some steps; `state` is None after the last one."""
        weights = contiguous_weights(self.method.predictor.state_dict())
        return {"network_weights": weights, "medssl": {"method": self.settings.method, "step": step, "training": state}}


if __name__ == "__main__":
    main()
