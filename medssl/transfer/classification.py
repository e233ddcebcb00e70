"""Fine-tuning for classification: labelled images and a checkpoint in, a RUN with probabilities out."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from lightning.fabric import Fabric
from torch import Tensor

from medssl.config import apply_overrides, check_settings
from medssl.data.target_files import read_targets
from medssl.data.targets import Targets, draw_labelled
from medssl.errors import MedsslError, UsageError
from medssl.lock import claimed_folder
from medssl.networks.classifier import Classifier
from medssl.training.checkpoint import FOLDER, load_checkpoint, newest_intact
from medssl.training.devices import find_machine, launch, own_random_state
from medssl.training.loop import Job, train
from medssl.training.method import Method
from medssl.training.settings import TrainingSettings
from medssl.transfer import classification_files as files
from medssl.transfer.classification_folds import train_folds
from medssl.transfer.classification_images import Images, prepare_images
from medssl.transfer.classification_method import Classification, Rates, class_weights, fit_head_scale, hint_at_balance
from medssl.transfer.classification_run import BEST, Export, Look, build_classifier, finish
from medssl.transfer.classification_settings import ClassificationSettings, refuse_changes
from medssl.transfer.classifier_files import number_of_folds
from medssl.transfer.image_batches import ImageLoader, ImageOrder, ImageSet
from medssl.transfer.image_fit import check_fit
from medssl.transfer.images import ImageOptions
from medssl.transfer.source import Source, load_source


def finetune_classification(
    dataset: Path,
    checkpoint: Path | None,
    out: Path,
    *,
    labels: Path | None = None,
    kind: str = "auto",
    classes: Sequence[str] | None = None,
    folds: int | None = None,
    fold: int | None = None,
    labelled: int | None = None,
    ignore_unlabelled: bool = False,
    network: str | None = None,
    plans_from: Path | None = None,
    patch_size: Sequence[int] | None = None,
    fit: str = "whole",
    spacing: str | Sequence[float] = "median",
    normalisation: str = "by-modality",
    modality: str | None = None,
    grey: bool = False,
    laterality: str = "forbid",
    overrides: Sequence[str] = (),
    cache: Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    learner: Learner | None = None,
    **settings: Any,
) -> Path:
    """Train a classifier of whole images, 2D or 3D.

    Only training images teach; only validation images choose (the temperature, and with `select: best` the checkpoint);
    cases of the split `test` are left alone. Given the same options, seed, number of threads and CPU, two runs are
    equal bit for bit, also when one of them was killed and resumed.

    Each image is brought into a store once (orient, resample to one voxel size, normalise) and to the patch by `fit`:
    by default the whole image is shrunk where it is larger than the patch, never enlarged, and the rest is background.

    Args:
        dataset: A CSV, a folder for each class, a MedMNIST .npz, an INDEX or a STORE; see
            `medssl.data.target_files.read_targets`, also for `labels`, `kind`, `classes`, `folds`, `fold` and
            `ignore_unlabelled`.
        checkpoint: A pretraining RUN or a checkpoint file, or None for the scratch twin.
        out: The RUN.
        labels: CSV of labels for an INDEX or a STORE.
        kind: Kind of target.
        classes: Names of the classes in order.
        folds: Deal the patients out into so many folds.
        fold: Which of them validates; None trains all of them, each a RUN below `out`, see
            `medssl.transfer.classification_folds`.
        labelled: Use only so many of the training cases, drawn by the seed; fewer are always a part of more.
        ignore_unlabelled: Leave out images without a label.
        network: Network of a run from scratch.
        plans_from: Checkpoint whose network a run from scratch copies.
        patch_size: What the network sees; by default what just covers the median image, up to 256 in 2D and 96 in 3D.
        fit: `whole`, `stretch` or `crop`.
        spacing: `median` (of pictures: `native`), `native`, or millimetres (z, y, x).
        normalisation: `by-modality`, or one scheme for all.
        modality: Of all images; by default what the files say.
        grey: Average the channels.
        laterality: Left-right mirroring: `forbid` or `allow`; an image's class has no sides to swap.
        overrides: Settings `a.b=c` that win, for example `augmentation.overrides.spatial.rotation.probability=0`.
        cache: Folder for prepared images that several runs share; by default it lies in the RUN.
        device: auto, cpu, cuda or cuda:N.
        workers: Processes that prepare images.
        resume: Continue the RUN from its last checkpoint.
        overwrite: Replace the RUN.
        quiet: Show no progress.
        learner: What learns, in place of supervised training.
        **settings: See `medssl.transfer.classification_settings.ClassificationSettings`: mode, steps, val_every,
            batch_size, learning_rate, balance, select, seed and more.

    Returns:
        The RUN: `checkpoints`, `validation/probabilities.csv`, `transfer.json` (what became of each key) and the files
        of every RUN.

    Raises:
        UsageError: If options do not fit together.
        DataError: If the data set cannot be used; the row is named, and nothing was trained.
        CheckpointError: If the checkpoint is damaged, unsafe or does not fit.
        TrainingStopped: If the loss became NaN.
        Interrupted: If a signal ended the run, after it was saved.
    """
    dataset, out = Path(dataset), Path(out)
    if folds is not None and fold is None:
        parts = [
            read_targets(
                dataset, labels=labels, kind=kind, classes=classes, folds=folds, fold=number,
                ignore_unlabelled=ignore_unlabelled,
            )
            for number in range(max(folds, 1))
        ]  # fmt: skip

        def train_one(folder: Path, number: int) -> Path:
            return finetune_classification(
                dataset, checkpoint, folder, labels=labels, kind=kind, classes=classes, folds=folds, fold=number,
                labelled=labelled, ignore_unlabelled=ignore_unlabelled, network=network, plans_from=plans_from,
                patch_size=patch_size, fit=fit, spacing=spacing, normalisation=normalisation, modality=modality,
                grey=grey, laterality=laterality, overrides=overrides, cache=cache or out / "images", device=device,
                workers=workers, resume=resume, quiet=quiet, learner=learner, **settings,
            )  # fmt: skip

        return train_folds(out, parts, train_one, resume=resume, overwrite=overwrite)
    if resume and number_of_folds(out) is not None:
        raise UsageError(f"--resume: {out} holds {number_of_folds(out)} folds: leave --fold away to go on with them.")
    fold = fold or 0
    chosen = _settings(settings, laterality, overrides)
    check_fit(fit)
    template = _template(checkpoint, plans_from, network)
    whole = read_targets(
        dataset, labels=labels, kind=kind, classes=classes, folds=folds, fold=fold, ignore_unlabelled=ignore_unlabelled
    )
    targets = whole if labelled is None else draw_labelled(whole, labelled, chosen.seed)
    weights = class_weights(targets, chosen)
    if chosen.balance == "none" and not quiet:
        hint_at_balance(targets)
    machine = find_machine(device)
    options = ImageOptions(
        spacing if isinstance(spacing, str) else tuple(spacing), normalisation, modality, grey, workers, quiet
    )
    patch = None if patch_size is None else tuple(patch_size)
    recipe = {
        **files.recipe_head(dataset, labels, checkpoint, template, plans_from, network),
        "kind": targets.kind,
        "classes": list(targets.classes),
        "folds": folds,
        "fold": fold if folds is not None else None,
        "labelled": labelled,
        "targets_sha256": targets.digest(),
        "patch_size": None if patch is None else list(patch),
        "fit": fit,
        "spacing": spacing if isinstance(spacing, str) else list(spacing),
        "normalisation": normalisation,
        "modality": modality,
        "grey": grey,
        "cache": None if cache is None else str(cache),
        **chosen.model_dump(mode="json"),
        **({} if learner is None else learner.recipe()),
    }
    with claimed_folder(out, resume=resume, overwrite=overwrite, owned=files.is_ours):
        if resume and (out / files.RECIPE).is_file():
            refuse_changes(yaml.safe_load((out / files.RECIPE).read_text()), recipe, str(out))
        files.claim(out, recipe)
        try:
            # All images, whichever are labelled: runs with fewer labels share a cache and have the same patch.
            images = prepare_images(
                whole, dataset, template, network, cache or out / "images", patch, fit, chosen, options
            )
            images = dataclasses.replace(images, targets=targets)
            job = Run(out, recipe, images, whole, None if checkpoint is None else template, network, chosen, weights)
            run = job if learner is None else learner.run(job, cache or out / "images", options)
        except MedsslError:
            if not resume:
                shutil.rmtree(out)
            raise
        fabric = launch(machine, _precision(chosen, machine.cuda), device)
        with own_random_state(chosen.seed, machine.cuda):
            run.go(fabric, resume=resume, quiet=quiet)
    return out


@dataclass(frozen=True)
class Run:
    """One run: what is known before its first step.

    Args:
        out: The RUN.
        recipe: Everything that decides it, as plain values.
        images: Its images; its targets are the labelled ones.
        whole: The targets of all images of the data set.
        source: Where the weights come from, or None.
        network: Name of the network, where it was named.
        settings: How it trains.
        weights: Factor of each class, or None.
    """

    out: Path
    recipe: dict[str, Any]
    images: Images
    whole: Targets
    source: Source | None
    network: str | None
    settings: ClassificationSettings
    weights: Tensor | None

    def go(self, fabric: Fabric, *, resume: bool, quiet: bool) -> None:
        """Train what is left to train, then calibrate and predict."""
        out, settings, images = self.out, self.settings, self.images
        train_set = images.of("train")
        found = resume and any((out / FOLDER).glob("step_*.pth"))
        last = newest_intact(out / FOLDER) if found else None
        state = None if last is None else load_checkpoint(last)["medssl"].get("training")
        if last is None:
            (out / FOLDER / BEST).unlink(missing_ok=True)
        method = self.method(train_set, fabric, fresh=last is None)
        files.write_start(out, self.recipe, images.targets, train_set.channels, images.patch, images.store)
        if last is None or state is not None:
            last = train(self.job(method, train_set, fabric), fabric, state=state, quiet=quiet)
        finish(out, last, images, settings, fabric.device)
        files.write_end(out, self.recipe)

    def classifier(self, channels: int, number: int = 0) -> Classifier:
        """Return a classifier at its start; each number has random weights of its own."""
        settings = self.settings.model_copy(update={"seed": self.settings.seed + number})
        return build_classifier(self.images, channels, self.source, settings, self.out)

    def method(self, train_set: ImageSet, fabric: Fabric, *, fresh: bool) -> Method:
        """Return what learns; fresh weights have the head's input standardised by the training images."""
        settings = self.settings
        classifier = self.classifier(train_set.channels)
        method = Classification(
            classifier, self.images.policy, self.images.targets.kind, self.weights, settings.smoothing
        )
        if fresh:
            method.to(fabric.device)
            fit_head_scale(classifier, train_set, self.images.patch, settings.batch_size)
        return method

    def loader(self, train_set: ImageSet, fabric: Fabric, window: Sequence[int]) -> ImageLoader:
        """Return the batches of labelled images."""
        settings = self.settings
        order = ImageOrder(train_set.cases, "balanced" if settings.balance == "sampling" else "natural", settings.seed)
        return ImageLoader(
            train_set, order, window, settings.batch_size, fabric.device, fabric.global_rank, fabric.world_size
        )

    def job(self, method: Method, train_set: ImageSet, fabric: Fabric) -> Job:
        """Return the work of the loop."""
        settings, images = self.settings, self.images
        assert isinstance(method, Classification)
        rates = Rates(method.classifier, settings.make_schedule())
        validation = images.of("validation")
        return Job(
            method=method,
            settings=loop_settings(settings, fabric),
            loader=self.loader(train_set, fabric, images.policy.read_size),
            validation=None,
            run=self.out,
            content=Export(self.out, images, method, settings, self.recipe, self.source, self.network),
            name="Fine-tuning classification",
            optimiser=lambda _: rates.optimiser(settings),
            rates=rates,
            look=Look(self.out, method, validation, images.patch, settings, fabric.is_global_zero),
        )


class Learner(Protocol):
    """What learns in place of supervised training."""

    def recipe(self) -> dict[str, Any]:
        """Return what it adds to the recipe."""
        ...

    def run(self, job: Run, cache: Path, options: ImageOptions) -> Run:
        """Return the run that trains by it."""
        ...


def _settings(values: dict[str, Any], laterality: str, overrides: Sequence[str]) -> ClassificationSettings:
    if laterality not in ("forbid", "allow"):
        raise UsageError(f"--laterality takes forbid or allow here, got '{laterality}': a class has no sides to swap.")
    given: dict[str, Any] = {"augmentation": {"laterality": laterality}}
    given |= {name: value for name, value in values.items() if value is not None}
    given = apply_overrides(given, overrides)
    settings = check_settings(ClassificationSettings, given, "finetune classification")
    settings = settings.model_copy(update={"val_every": min(settings.val_every, settings.steps)})
    settings.make_schedule()
    return settings


def _template(checkpoint: Path | None, plans_from: Path | None, network: str | None) -> Source | None:
    """Return the checkpoint that decides the network, or None if a name does."""
    if checkpoint is not None:
        if network is not None or plans_from is not None:
            raise UsageError(
                "--network and --plans-from are for a run from scratch (--checkpoint none); the checkpoint decides the "
                "network."
            )
        return load_source(Path(checkpoint))
    if (network is None) == (plans_from is None):
        raise UsageError(
            "A run from scratch needs either --network NAME or --plans-from CHECKPOINT (the twin of a fine-tuned run)."
        )
    return load_source(Path(plans_from)) if plans_from is not None else None


def _precision(settings: ClassificationSettings, cuda: bool) -> str:
    if settings.precision != "auto":
        return settings.precision
    return "bf16" if cuda else "float32"


def loop_settings(settings: ClassificationSettings, fabric: Fabric) -> TrainingSettings:
    """Return how the loop runs.

    Raises:
        UsageError: If the batch cannot be divided among the processes.
    """
    if settings.batch_size % fabric.world_size:
        raise UsageError(f"batch_size {settings.batch_size} cannot be divided among {fabric.world_size} processes.")
    return TrainingSettings(
        steps=settings.steps,
        seed=settings.seed,
        log_every=max(1, min(50, settings.steps // 100)),
        health_every=settings.steps,
        validate_every=settings.val_every,
        pictures_every=0,
        save_every=settings.val_every,
        devices=fabric.world_size,
    )
