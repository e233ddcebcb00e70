"""Pretrain an encoder without labels: the Python twin of `medssl pretrain`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from medssl import registry
from medssl.augmentation.policy import Policy, policy_for
from medssl.config import apply_overrides, merged, read_yaml
from medssl.data.loader import CropLoader
from medssl.data.sampling import CropSettings, Split
from medssl.errors import UsageError
from medssl.networks.build import build_from_architecture, freeze_decoder, freeze_unused_outputs
from medssl.preprocessing.store import Store
from medssl.pretraining.continuing import (
    START,
    Start,
    check_start,
    check_state,
    fitting,
    keep_start,
    kept_start,
    read_start,
)
from medssl.pretraining.folder import (
    claim,
    newest_checkpoint,
    refuse_changes,
    spacing_of,
    stored_recipe,
    write_facts,
)
from medssl.pretraining.probes import OnlineProbes, Reader, read_probes
from medssl.pretraining.recipe import DEFAULT_METHOD, PretrainingSettings, exported, settle
from medssl.training.checkpoint import SCHEMA_VERSION, load_checkpoint
from medssl.training.devices import find_machine, launch, on_main, own_random_state
from medssl.training.environment import library_versions, processors
from medssl.training.loop import Job, train
from medssl.training.method import Method
from medssl.training.nnssl_plan import adaptation_plan
from medssl.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

#: What of a store's information says how a new volume becomes like those in it; nothing that names a volume.
_INPUT = ("normalisation", "spacing", "crop", "fingerprint", "codec")


def pretrain(
    method: str | None,
    store: Path,
    out: Path,
    *,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    steps: int | None = None,
    continue_from: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    workers: int | None = None,
    quiet: bool = False,
    read_labelled: Reader | None = None,
) -> Path:
    """Pretrain a network on the training volumes of a store and return the final checkpoint.

    On the CPU a run that was killed at any step and resumed ends with the same weights, bit for bit, as one that was
    not. SIGTERM and Ctrl-C save and end it (exit code 143 and 130); SIGUSR1 saves and goes on.

    Args:
        method: A key of `medssl.registry.METHODS`; None takes the recipe's, or `mae`.
        store: A store of `medssl preprocess`, or an nnU-Net preprocessed folder.
        out: The RUN.
        recipe: YAML of settings, see `medssl.pretraining.recipe.PretrainingSettings` and the method's own.
        overrides: Settings `a.b=c` that win over the recipe.
        steps: Steps of the optimiser; wins over both.
        continue_from: A RUN or checkpoint to start from, see `medssl.pretraining.continuing`; without a recipe the
            RUN's own is used.
        resume: Go on from the newest intact checkpoint of `out`; without a recipe its own recipe is used.
        overwrite: Replace the pretraining in `out`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        workers: Reader processes; by default what the machine has to spare.
        quiet: Show no progress.
        read_labelled: Reads the labelled data set that `probes.labels` may name; the command line gives
            `medssl.transfer.probe_images.read_labelled`, which lies behind pretraining in the stream of data.

    Raises:
        UsageError: If a setting is unknown or does not fit, or `out` is taken.
        DataError: If the store has no training volumes.
        TrainingStopped: If a guard stopped the run.
        Interrupted: If a signal did, after it was saved.
    """
    if method is not None:
        registry.method(method)
    source, out = Store.open(store), Path(out)
    before = stored_recipe(out) if resume else None
    if continue_from is not None and resume:
        raise UsageError("--continue-from starts a new run and --resume goes on with one: give one of them.")
    if resume and before is None and (out / START).is_file():
        raise UsageError(f"{out} was killed before it had begun: give --continue-from again, with --overwrite.")
    if continue_from is not None and out.resolve() in (continue_from.resolve(), *continue_from.resolve().parents):
        raise UsageError("--continue-from lies in --out, which --overwrite would remove. Give another --out.")
    if continue_from is not None and continue_from.is_dir():
        before = stored_recipe(continue_from)
        if before is not None and method not in (None, before.get("method")):
            # The other method's own settings say nothing to this one.
            before = {name: value for name, value in before.items() if name in PretrainingSettings.model_fields}
    values = given_values(recipe, overrides, before, method=method, steps=steps, workers=workers)
    start = None
    if continue_from is not None:
        start = read_start(continue_from, str(values.get("method", DEFAULT_METHOD)))
        values = merged(values, {"schedule": {"continued": start.state is not None}})
    devices = values.get("devices", 1)
    machine = find_machine(device, devices if isinstance(devices, int) else 1)
    settings = settle(values, source, machine, str(recipe or "settings"))
    if resume and before is not None:
        refuse_changes(out, before, settings, source)
    fabric = launch(machine, settings.precision, device)
    # All that can be refused is refused before anything is removed or written.
    kind = registry.method(settings.method).load()
    policy = policy_of(kind, settings, source)
    with make_loader(kind, settings, source, fabric, policy, "train", 0) as loader:
        channels = loader.channels
    if start is not None:
        check_state(start, build_method(kind, settings, policy, channels, start), settings.optimiser.name)
    probes = OnlineProbes([])

    def read() -> None:
        nonlocal probes
        probes = read_probes(settings, source, policy, channels, read_labelled)

    on_main(fabric, read)
    with (
        claim(out, fabric, resume=resume, overwrite=overwrite),
        own_random_state(settings.seed + fabric.global_rank, machine.cuda),
    ):
        return _run(settings, source, out, fabric, start=start, probes=probes, resume=resume, quiet=quiet)


def given_values(
    recipe: Path | None, overrides: Sequence[str], before: Mapping[str, Any] | None = None, **arguments: Any
) -> dict[str, Any]:
    """Return what a user gave for a recipe: the file, or without one `before`, then overrides, then arguments."""
    values = read_yaml(recipe) if recipe is not None else dict(before or {})
    values = apply_overrides(values, overrides)
    return values | {name: value for name, value in arguments.items() if value is not None}


def _run(
    settings: PretrainingSettings,
    store: Store,
    out: Path,
    fabric: Fabric,
    *,
    start: Start | None,
    probes: OnlineProbes,
    resume: bool,
    quiet: bool,
) -> Path:
    saved = on_main(fabric, lambda: newest_checkpoint(out)) if resume else None
    state = None
    if saved is not None:
        state = load_checkpoint(saved)["medssl"].get("training")
        if state is None:
            logger.warning("%s is finished already: nothing is left to do.", out)
            return saved
        logger.info("Going on from %s.", saved.name)
    elif start is not None:
        begun = start
        on_main(fabric, lambda: keep_start(out, begun))
    if resume:
        start = kept_start(out)
    if state is None and start is not None:
        state = start.state
    on_main(fabric, lambda: write_facts(out, settings, store, start.facts if start else None))
    kind = registry.method(settings.method).load()
    policy = policy_of(kind, settings, store)
    with ExitStack() as stack:
        readers = reader_processes(settings)
        loader = stack.enter_context(make_loader(kind, settings, store, fabric, policy, "train", readers))
        validation = None
        if settings.validate_every:
            validation = stack.enter_context(make_loader(kind, settings, store, fabric, policy, "validation", 0))
        method = build_method(kind, settings, policy, loader.channels, start)
        export = _Export(settings, store, method)
        job = Job(
            method, settings, loader, validation, out, export, f"Pretraining {settings.method}",
            look=probes, look_every=settings.probes.every,
        )  # fmt: skip
        return train(job, fabric, state=state, quiet=quiet)


def build_method(
    kind: type[Method], settings: PretrainingSettings, policy: Policy, in_channels: int, start: Start | None = None
) -> Method:
    """Return the method on a fresh network, the same for the same seed whatever was drawn before.

    Args:
        kind: The method.
        settings: The resolved recipe.
        policy: Of the method's first purpose.
        in_channels: Channels of the crops.
        start: Weights to begin with; output layers of another shape stay fresh.

    Raises:
        UsageError: If those are of another network.
    """
    own = settings.of_method()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = build_from_architecture(settings.architecture, in_channels, kind.output_channels(in_channels, own))
        if start is not None:
            check_start(start, settings.architecture, in_channels)
            network.load_state_dict(fitting(start.weights, network.state_dict()), strict=False)
        freeze_unused_outputs(network)
        if not kind.decoder_is_trained(own):
            freeze_decoder(network)
        return kind(network, policy, own)


def policy_of(kind: type[Method], settings: PretrainingSettings, store: Store) -> Policy:
    """Return the policy of the first purpose of a method, which knows the policies of the others.

    Raises:
        UsageError: If there is no policy for a modality of the store, or a setting of the policy does not fit.
    """
    first, *_ = kind.purposes(settings.of_method())
    return policy_for(first, store.modalities, settings.patch_size, settings.augmentation)


def make_loader(
    kind: type[Method],
    settings: PretrainingSettings,
    store: Store,
    fabric: Fabric,
    policy: Policy,
    split: Split,
    workers: int,
) -> CropLoader:
    """Return the loader that a recipe, the policies' read windows and the method's needs ask for."""
    sampling, own = settings.sampling, settings.of_method()
    needs = kind.needs_of(own)
    windows = [policy.read_size, *(policy.sibling(purpose).read_size for purpose in kind.purposes(own)[1:])]
    crops = CropSettings(
        patch_size=settings.patch_size,
        batch_size=settings.batch_size,
        read_size=tuple(max(edges) for edges in zip(*windows, strict=True)),
        foreground_probability=sampling.foreground_probability,
        crops_per_volume=max(sampling.crops_per_volume, needs.crops_per_volume),
        spread=sampling.spread,
        balance=sampling.balance,
        channels=sampling.channels,
        labels=needs.labels,
    )
    return CropLoader(
        store,
        crops,
        seed=settings.seed,
        workers=workers,
        rank=fabric.global_rank,
        world=fabric.world_size,
        device=fabric.device,
        split=split,
    )


def reader_processes(settings: TrainingSettings) -> int:
    """Return the reader processes: all but one processor, at most 8; one of two is better spent on training."""
    if settings.workers is not None:
        return settings.workers
    cores = processors()
    spare = cores // settings.devices - 1
    return 0 if spare < 2 else min(spare, 8)


class _Export:
    """Makes the content of a checkpoint.

    Args:
        settings: The resolved recipe.
        store: Where the volumes are; its hash is kept, nothing that names a volume.
        method: What is trained.
    """

    def __init__(self, settings: PretrainingSettings, store: Store, method: Method) -> None:
        self.settings, self.store, self.method = settings, store, method

    def __call__(self, weights: dict[str, Tensor], step: int, state: dict[str, Any] | None) -> dict[str, Any]:
        settings, plan = self.settings, self.settings.architecture
        spacing, modalities = spacing_of(self.store), sorted(self.store.modalities)
        entry = registry.method(settings.method)
        in_channels = self.method.encoder.in_channels
        ours = {
            "schema_version": SCHEMA_VERSION,
            "method": settings.method,
            "recipe": exported(settings),
            "step": step,
            "architecture": {
                "name": settings.network,
                "dimensions": plan.dimensions,
                "in_channels": in_channels,
                "network_class_name": plan.network_class_name,
                "arch_kwargs": plan.arch_kwargs,
                "kw_requires_import": list(plan.kw_requires_import),
            },
            "patch_size": list(settings.patch_size),
            "spacing_mm": spacing,
            "normalisation": self.store.info.get("normalisation"),
            "trains_decoder": self.method.decoder_is_trained(settings.of_method()),
            "modalities": modalities,
            "data_hash": self.store.hash,
            "averaged": settings.ema is not None,
            "library_versions": library_versions(),
        }
        heads = self.method.exported_heads()
        if heads:
            # Who uses them on new volumes has to make these like those of the store.
            known = {name: self.store.info[name] for name in _INPUT if name in self.store.info}
            ours |= {"heads": heads, "preprocessing": known}
        return {
            "network_weights": weights,
            "nnssl_adaptation_plan": adaptation_plan(
                plan,
                in_channels=in_channels,
                patch_size=settings.patch_size,
                spacing_mm=spacing,
                modalities=modalities,
            ),
            "citations": [{"type": "method", "name": settings.method, "apa_citations": [entry.source]}],
            "medssl": ours if state is None else {**ours, "training": state},
        }
