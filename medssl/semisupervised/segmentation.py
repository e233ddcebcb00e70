"""Semi-supervised segmentation: an nnU-Net raw data set and unlabelled images in, an nnU-Net model folder out."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import nn

from medssl import registry_semisupervised as registry
from medssl.augmentation.policy import policy_for
from medssl.config import apply_overrides, merged, read_yaml
from medssl.errors import DataError, UsageError
from medssl.files import write_json
from medssl.networks.architecture import Architecture
from medssl.networks.build import build_from_architecture, freeze_unused_outputs
from medssl.pretraining.folder import claim
from medssl.pretraining.run import reader_processes
from medssl.semisupervised.export import FINAL, Export, publish
from medssl.semisupervised.method import SemiSupervised
from medssl.semisupervised.recipe import SemiTrainingSettings, exported, settle
from medssl.semisupervised.streams import Streams, link_streams, make_loader, open_streams
from medssl.semisupervised.task import SegmentationTask
from medssl.training.checkpoint import FOLDER, load_checkpoint, newest_intact
from medssl.training.devices import Machine, find_machine, launch, on_main, own_random_state
from medssl.training.loop import Job, train
from medssl.training.settings import FREE_ON_RESUME
from medssl.transfer import runfiles
from medssl.transfer.augmenting import modality_of
from medssl.transfer.laterality import paired_labels
from medssl.transfer.overlay import KeyReport, overlay
from medssl.transfer.raw import RawDataset, read_dataset
from medssl.transfer.running import predict_with, resolve_device
from medssl.transfer.segmentation import settle_plans, template_of
from medssl.transfer.selection import Selection, select_cases
from medssl.transfer.settings import TrainingSettings
from medssl.transfer.source import Source

logger = logging.getLogger(__name__)


def semisupervise_segmentation(
    method: str,
    dataset: Path,
    checkpoint: Path | None,
    out: Path,
    *,
    unlabelled: Path | None = None,
    unlabelled_cases: Sequence[str] | None = None,
    recipe: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    learning_rate: float | None = None,
    transfer_decoder: bool | None = None,
    train_cases: Sequence[str] | None = None,
    validation_cases: Sequence[str] | None = None,
    labelled: int | None = None,
    seed: int | None = None,
    network: str | None = None,
    plans_from: Path | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    spacing: Sequence[float] | str | None = None,
    laterality: str = "forbid",
    cache: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Train a segmentation model on labelled cases and unlabelled images.

    Plans, spacing, normalisation and inference are those of `medssl finetune segmentation`, and so is the RUN. The
    error is on the network's finest output alone, without nnU-Net's deep supervision, as in the field. The last
    checkpoint is the model; nothing is chosen on the validation cases.

    Args:
        method: A key of `medssl.registry_semisupervised.SEMISUPERVISED`.
        dataset: nnU-Net raw folder; it is never changed.
        checkpoint: Where the weights come from, or None for random ones.
        out: The RUN, which is an nnU-Net model folder too.
        unlabelled: Folder of NIfTI images, nnU-Net raw folder or STORE; None takes the cases of the data set that are
            neither labelled nor looked at, without their masks.
        unlabelled_cases: Cases of the data set to take instead of all of those.
        recipe: YAML of settings, see `medssl.semisupervised.recipe.SemiTrainingSettings` and the method's own.
        settings: Settings as plain values, on top of the recipe.
        overrides: Settings `a.b=c` that win over both.
        steps: Steps of the optimiser.
        learning_rate: Peak rate; by default 3e-3 for AdamW and 1e-2 for SGD.
        transfer_decoder: Take the decoder too; None does so where it was trained.
        train_cases: Labelled cases.
        validation_cases: Cases to look at; an empty list for none.
        labelled: Use only so many of the labelled cases, drawn by the seed.
        seed: Of everything random.
        network: Network of a run from scratch.
        plans_from: Checkpoint whose network, patch and spacing a run from scratch copies.
        patch_size: Edges of a crop.
        batch_size: Labelled samples of a step; 2 by default.
        spacing: `median`, `pretraining`, or millimetres (z, y, x).
        laterality: Left-right mirroring: forbid, swap-labels or allow.
        cache: Folder for preprocessed data that several runs share; by default it lies in the RUN.
        device: auto, cpu, cuda or cuda:N.
        workers: Processes that preprocess and read.
        resume: Continue the RUN from its last checkpoint.
        overwrite: Replace the RUN.
        quiet: Show no progress.

    Raises:
        UsageError: If options do not fit together, there are no unlabelled images, or they are of another kind.
        DataError: If the data set cannot be used; case, values and remedy are named.
        CheckpointError: If the checkpoint is damaged, unsafe or does not fit.
        Interrupted: If a signal ended the run, after it was saved.
    """
    dataset, out = Path(dataset), Path(out)
    source = template_of(checkpoint, plans_from, network)
    raw = read_dataset(dataset)
    classes = _classes_of(raw)
    values = merged(_base(raw, laterality), read_yaml(recipe) if recipe is not None else {})
    values = merged(values, settings or {})
    values = apply_overrides(values, overrides)
    given = {"method": method, "steps": steps, "seed": seed, "batch_size": batch_size, "workers": workers}
    values |= {name: value for name, value in given.items() if value is not None}
    if learning_rate is not None:
        values = merged(values, {"optimiser": {"learning_rate": learning_rate}})
    devices = values.get("devices", 1)
    machine = find_machine(device, devices if isinstance(devices, int) else 1)
    resolved = settle(values, "segmentation", machine, str(recipe or "settings"))
    selection = select_cases(
        raw, train_cases=train_cases, validation_cases=validation_cases, labelled=labelled, seed=resolved.seed
    )
    if resolved.batch_size > len(selection.train):
        logger.warning(
            "A batch holds %d labelled samples and there are %d labelled cases: some crops of a batch come from one "
            "case. Set batch_size=%d, or label more.",
            resolved.batch_size, len(selection.train), len(selection.train),
        )  # fmt: skip
    plain = _nnunet_settings(resolved, selection, None if checkpoint is None or source is None else source.path)
    wanted = runfiles.recipe(
        raw, checkpoint, plain, source, network=network, plans_from=plans_from, patch_size=patch_size, spacing=spacing,
        cache=cache, unlabelled=unlabelled, unlabelled_cases=unlabelled_cases, transfer_decoder=transfer_decoder,
    ) | {"command": "medssl semisupervise", "semisupervised": _without_free(exported(resolved))}  # fmt: skip
    fabric = launch(machine, resolved.precision, device)
    preprocessed = (cache or out / "preprocessed") / raw.name
    kind: type[SemiSupervised] = registry.semisupervised(resolved.method).load()

    def prepare() -> str:
        """Make plans and links in the first process; return the plans' configuration."""
        runfiles.check_resumed(out, wanted)
        runfiles.write_claim(out, plain, resolved.method)
        try:
            plans = settle_plans(
                raw, selection, source, out, preprocessed, network, patch_size, batch_size, spacing, workers, quiet
            )
            configuration = next(iter(plans["configurations"]))
            link_streams(
                raw, selection, plans, configuration, preprocessed, out / "streams", unlabelled, unlabelled_cases,
                wanted=kind.uses_unlabelled, workers=workers, quiet=quiet,
            )  # fmt: skip
        except (DataError, UsageError):
            if not resume:
                shutil.rmtree(out)
            raise
        runfiles.write_start(
            out, wanted, raw, selection, plans, configuration, preprocessed, plain, shared=cache is not None,
            method=resolved.method,
        )  # fmt: skip
        return configuration

    with claim(out, fabric, resume=resume, overwrite=overwrite, owned=runfiles.is_ours):
        configuration = on_main(fabric, prepare)
        plans = json.loads((out / "plans.json").read_text())
        identifier = plans["configurations"][configuration]["data_identifier"]
        streams = open_streams(out / "streams", identifier, unlabelled, wanted=kind.uses_unlabelled)
        origin = source if checkpoint is not None else None
        run = _Run(out, raw, resolved, plans, configuration, streams, origin, transfer_decoder, classes)
        run.go(fabric, machine, resume=resume, quiet=quiet)
        if fabric.is_global_zero:
            weights = load_checkpoint(out / FINAL, numpy_scalars=True)["network_weights"]
            data, target = preprocessed / identifier, resolve_device(device)
            predict_with(weights, out, plans, configuration, raw, plain, data, target, quiet=quiet)
            runfiles.write_end(out, plain, resolved.method)
    return out


@dataclass(frozen=True)
class _Run:
    out: Path
    raw: RawDataset
    settings: SemiTrainingSettings
    plans: dict[str, Any]
    configuration: str
    streams: Streams
    source: Source | None
    transfer_decoder: bool | None
    classes: int

    def go(self, fabric: Fabric, machine: Machine, *, resume: bool, quiet: bool) -> None:
        """Train what is left to train."""
        out, settings = self.out, self.settings
        state, last = None, None
        if resume and on_main(fabric, lambda: any((out / FOLDER).glob("step_*.pth"))):
            last = on_main(fabric, lambda: newest_intact(out / FOLDER))
            state = load_checkpoint(last, numpy_scalars=True)["medssl"].get("training")
        if last is None or state is not None:
            # Masks of an earlier state of the model would be taken for the final ones.
            on_main(fabric, lambda: _remove(out / "validation", self.raw.file_ending))
            with own_random_state(settings.seed + fabric.global_rank, machine.cuda):
                last = self._train(fabric, state, quiet)
        if fabric.is_global_zero:
            publish(last, out)

    def _train(self, fabric: Fabric, state: dict[str, Any] | None, quiet: bool) -> Path:
        settings, own = self.settings, self.settings.of_method()
        kind: type[SemiSupervised] = registry.semisupervised(settings.method).load()
        content = self.plans["configurations"][self.configuration]
        patch = tuple(int(edge) for edge in content["patch_size"])
        first, *_ = kind.purposes(own)
        policy = policy_for(first, self.streams.labelled.modalities, patch, settings.augmentation)
        place = {"rank": fabric.global_rank, "world": fabric.world_size, "device": fabric.device}
        with ExitStack() as stack:
            workers = reader_processes(settings)
            labelled, unlabelled, pairs = make_loader(
                self.streams, kind, settings, policy, patch, workers, **place
            )  # fmt: skip
            for loader in (labelled, unlabelled):
                if loader is not None:
                    stack.enter_context(loader)
            networks, report = self._networks(kind, labelled.channels)
            on_main(fabric, lambda: self._write_transfer(report))
            task = SegmentationTask(self.classes, self.raw.content["labels"].get("ignore"))
            method = kind(networks, task, policy, own)  # type: ignore[arg-type]
            export = Export(settings, self.plans, self.configuration, self.raw.content, method, self.streams.labelled)
            job = Job(
                method, settings, pairs, None, self.out, export, f"Training {settings.method}", look_every=0,
            )  # fmt: skip
            return train(job, fabric, state=state, quiet=quiet)

    def _networks(self, kind: type[SemiSupervised], channels: int) -> tuple[list[nn.Module], KeyReport | None]:
        """Return the networks, each drawn from a seed of its own, with pretrained weights laid over them."""
        plan = Architecture.from_json(self.plans["configurations"][self.configuration]["architecture"])
        networks, report = [], None
        for number in range(kind.network_count):
            network = build_from_architecture(plan, channels, self.classes, seed=self.settings.seed + number)
            freeze_unused_outputs(network)
            if self.source is not None:
                decoder = self.source.trains_decoder if self.transfer_decoder is None else self.transfer_decoder
                report = overlay(network, self.source.weights, decoder=decoder)
            networks.append(network)
        return networks, report

    def _write_transfer(self, report: KeyReport | None) -> None:
        if report is None or self.source is None:
            write_json(self.out / "transfer.json", {"checkpoint": None, "summary": "all weights start random"})
            return
        facts = {"checkpoint": self.source.path.name, "summary": report.summary(), **report.to_json()}
        write_json(self.out / "transfer.json", facts)


def _classes_of(raw: RawDataset) -> int:
    """Return the number of classes with the background; an ignore label is none.

    Raises:
        UsageError: If labels are regions, which may overlap.
    """
    labels = raw.content["labels"]
    regions = [name for name, value in labels.items() if isinstance(value, list)]
    if regions:
        raise UsageError(
            f"{raw.folder}: {', '.join(regions)} are regions of several labels. Semi-supervised methods need classes "
            "that exclude each other: write one value for each label."
        )
    return len([name for name in labels if name != "ignore"])


def _base(raw: RawDataset, laterality: str) -> dict[str, Any]:
    augmentation: dict[str, Any] = {"laterality": laterality, "modality": modality_of(raw.content["channel_names"])}
    if laterality == "swap-labels":
        augmentation["swap_labels"] = paired_labels(raw.content["labels"])
    return {"augmentation": augmentation}


def _nnunet_settings(settings: SemiTrainingSettings, selection: Selection, checkpoint: Path | None) -> TrainingSettings:
    """Return the settings as nnU-Net's trainer, which predicts the validation cases, knows them."""
    optimiser = settings.optimiser
    return TrainingSettings(
        steps=settings.steps, val_every=settings.steps, learning_rate=optimiser.learning_rate or 0.0,
        optimiser=optimiser.name, laterality=settings.augmentation.laterality, augmentation="medssl",
        seed=settings.seed, checkpoint=checkpoint, train_cases=selection.train, validation_cases=selection.validation,
    )  # fmt: skip


def _without_free(values: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe without what may differ between a run and its continuation."""
    return {name: value for name, value in values.items() if name not in FREE_ON_RESUME}


def _remove(folder: Path, ending: str) -> None:
    for mask in folder.glob(f"*{ending}"):
        mask.unlink()
