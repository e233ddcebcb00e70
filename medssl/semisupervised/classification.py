"""Semi-supervised classification: the inputs and the RUN of classification fine-tuning, and images without a class."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from pydantic import Field, create_model
from torch import Tensor

from medssl import registry_semisupervised as registry
from medssl.config import Settings, apply_overrides, check_settings, part_of, read_yaml
from medssl.data.target_files import read_unlabelled
from medssl.data.targets import Case, Targets
from medssl.errors import UsageError
from medssl.networks.classifier import Classifier
from medssl.preprocessing.store import Store
from medssl.semisupervised.batch import PairedLoader
from medssl.semisupervised.method import SemiSupervised
from medssl.semisupervised.recipe import check_task
from medssl.semisupervised.task import ClassificationTask
from medssl.training.layout import contiguous_weights
from medssl.training.loop import Job
from medssl.training.method import Method
from medssl.transfer.classification import Run, finetune_classification, loop_settings
from medssl.transfer.classification_method import Rates, fit_head_scale
from medssl.transfer.classification_run import Export, Look
from medssl.transfer.classification_settings import ClassificationSettings
from medssl.transfer.image_batches import ImageLoader, ImageOrder, ImageSet
from medssl.transfer.images import ImageOptions, fitted_store, volume_store

logger = logging.getLogger(__name__)


class OwnSettings(Settings):
    """What a semi-supervised classification is told beside its training and its method.

    Args:
        unlabelled_batch_size: Unlabelled images of a step; by default as many as labelled ones.
    """

    unlabelled_batch_size: int | None = Field(default=None, ge=1)


def semisupervise_classification(
    method: str,
    dataset: Path,
    checkpoint: Path | None,
    out: Path,
    *,
    unlabelled: Path | None = None,
    recipe: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Train a classifier on labelled images and on images whose class is not looked at.

    Args:
        method: A key of `medssl.registry_semisupervised.SEMISUPERVISED`.
        dataset: As for `medssl.transfer.classification.finetune_classification`, whose RUN it makes.
        checkpoint: Where the weights come from, or None for random ones.
        out: The RUN.
        unlabelled: A CSV, folder, .npz, INDEX or STORE of images; None takes the training images that `labelled` leaves
            over, without their class.
        recipe: YAML of settings: those of `ClassificationSettings`, of `OwnSettings` and of the method.
        settings: Settings as plain values, on top of the recipe.
        overrides: Settings `a.b=c` that win over both.
        **options: As for `finetune_classification`: labelled, network, patch_size, steps, seed and more.

    Raises:
        UsageError: If options do not fit together, or there are no unlabelled images.
        DataError: If a data set cannot be used; the row is named.
    """
    values = read_yaml(recipe) if recipe is not None else {}
    values = apply_overrides(values | dict(settings or {}), overrides)
    if values.pop("method", method) != method:
        logger.info("The recipe is of another method: %s is used.", method)
    kind: type[SemiSupervised] = registry.semisupervised(method).load()
    check_task(method, kind, "classification")
    model = create_model("Recipe", __base__=(registry.semisupervised(method).load_settings(), OwnSettings))
    mine = {name: value for name, value in values.items() if name in model.model_fields}
    rest = {name: value for name, value in values.items() if name not in model.model_fields}
    own = check_settings(model, mine, str(recipe or "settings"))
    learner = _Learner(method, kind, own, unlabelled)
    given = {name: value for name, value in options.items() if value is not None}
    given = rest | given
    if kind.uses_unlabelled and unlabelled is None and given.get("labelled") is None:
        raise UsageError(
            "There are no unlabelled images: every training image is used with its class. Name some with --unlabelled, "
            "or use fewer labels with --labelled."
        )
    return finetune_classification(dataset, checkpoint, out, learner=learner, **given)


@dataclass(frozen=True)
class _Learner:
    name: str
    kind: type[SemiSupervised]
    settings: Any
    unlabelled: Path | None

    def recipe(self) -> dict[str, Any]:
        """Return the method with its settings."""
        where = None if self.unlabelled is None else str(self.unlabelled)
        return {"semisupervised": {"method": self.name, "unlabelled": where, **self.settings.model_dump(mode="json")}}

    def run(self, job: Run, cache: Path, options: ImageOptions) -> Run:
        """Return the run that trains by the method.

        Raises:
            UsageError: If the kind of target does not fit, or nothing is left without a label.
        """
        targets = job.images.targets
        if targets.kind != "multiclass":
            raise UsageError(f"Semi-supervised methods need one class an image; these targets are {targets.kind}.")
        if job.settings.balance == "weights":
            raise UsageError("--balance weights is not for semi-supervised methods: use --balance sampling.")
        images = self._unlabelled(job, cache, options) if self.kind.uses_unlabelled else None
        return _Run(**vars(job), learner=self, unlabelled=images)

    def _unlabelled(self, job: Run, cache: Path, options: ImageOptions) -> ImageSet:
        images = job.images
        if self.unlabelled is None:
            labelled = {case.name for case in images.targets.cases}
            left = [case for case in job.whole.of("train") if case.name not in labelled]
            if not left:
                raise UsageError(
                    "Every training image is labelled: name others with --unlabelled, or lower --labelled."
                )
            return ImageSet(images.store, left, None, images.plan.dimensions)
        found = read_unlabelled(self.unlabelled)
        store, kept = self._fitted(found, job, cache, options)
        cases = [case for case in found.cases if case.name in kept]
        return ImageSet(store, cases, None, images.plan.dimensions)

    def _fitted(self, found: Targets, job: Run, cache: Path, options: ImageOptions) -> tuple[Store, set[str]]:
        """Return the store of the images, and those that are neither labelled nor looked at."""
        assert self.unlabelled is not None
        images = job.images
        store, ids = volume_store(found, self.unlabelled, cache, options)
        modalities = {str(store.row(name)["modality"]) for name in ids.values()}
        if options.modality is None and modalities != set(images.facts["modalities"]):
            raise UsageError(
                f"--unlabelled {self.unlabelled} holds {', '.join(sorted(modalities))}, the data set "
                f"{', '.join(images.facts['modalities'])}. Name both with --modality if that is wrong."
            )
        front = (1,) * (3 - len(images.patch))
        window = (*front, *images.policy.read_size)
        fitted = fitted_store(
            store, ids, cache, patch=(*front, *images.patch), window=window, fit=images.facts["fit"], options=options
        )
        channels = int(fitted.row(found.cases[0].name)["shape"][0])
        wanted = int(images.store.row(images.targets.cases[0].name)["shape"][0])
        if channels != wanted:
            raise UsageError(
                f"--unlabelled {self.unlabelled} holds images of {channels} channels, the data set of {wanted}. --grey "
                "averages the channels of both."
            )
        known = {part: _hashes(images.store, job.whole.of(part)) for part in ("train", "validation", "test")}
        kept = set()
        labelled = {case.name for case in images.targets.of("train")}
        for case in found.cases:
            content = _content(fitted, case.name)
            for part in ("validation", "test"):
                if content in known[part]:
                    raise UsageError(
                        f"--unlabelled {self.unlabelled} holds {case.where or case.name}, which is the {part} image "
                        f"{known[part][content]}: what is measured must not be learnt from. Remove it."
                    )
            if known["train"].get(content) in labelled:
                logger.warning("%s is labelled too: it is left out of the unlabelled images.", case.where or case.name)
                continue
            kept.add(case.name)
        if not kept:
            raise UsageError(
                f"--unlabelled {self.unlabelled} holds labelled images only: nothing is left to learn from."
            )
        return fitted, kept


@dataclass(frozen=True)
class _Trained:
    """The classifier that predicts, as what looks at and exports a classifier knows it."""

    semisupervised: SemiSupervised
    kind: str

    @property
    def classifier(self) -> Classifier:
        """Encoder and head."""
        found = self.semisupervised.predictor
        assert isinstance(found, Classifier)
        return found


class _Export(Export):
    """Exports the network that predicts, which may be a teacher."""

    def __call__(self, weights: dict[str, Tensor], step: int, state: dict[str, Any] | None) -> dict[str, Any]:
        """Return the content after some steps."""
        weights = contiguous_weights(self.method.classifier.network.state_dict())
        content = super().__call__(weights, step, state)
        content["medssl"]["semisupervised"] = self.recipe["semisupervised"]["method"]
        return content


@dataclass(frozen=True)
class _Run(Run):
    learner: _Learner
    unlabelled: ImageSet | None

    def method(self, train_set: ImageSet, fabric: Fabric, *, fresh: bool) -> Method:
        """Return the method on classifiers of its own."""
        kind, images = self.learner.kind, self.images
        networks = [self.classifier(train_set.channels, number) for number in range(kind.network_count)]
        if fresh:
            for network in networks:
                network.to(fabric.device)
                fit_head_scale(network, train_set, images.patch, self.settings.batch_size)
        own = registry.semisupervised(self.learner.name).load_settings()
        task = ClassificationTask(len(images.targets.classes))
        # Teachers are copies: the head's scale is fitted before they are made.
        return kind(networks, task, images.policy.sibling("weak"), part_of(self.learner.settings, own))

    def job(self, method: Method, train_set: ImageSet, fabric: Fabric) -> Job:
        """Return the work of the loop."""
        assert isinstance(method, SemiSupervised)
        settings, images, learner = self.settings, self.images, self.learner
        purposes = learner.kind.purposes(learner.settings)
        windows = [images.policy.sibling(purpose).read_size for purpose in purposes]
        window = tuple(max(edges) for edges in zip(*windows, strict=True))
        trained = _Trained(method, images.targets.kind)
        rates = _AllRates(method, settings)
        pairs = PairedLoader(self.loader(train_set, fabric, window), self._unlabelled_loader(fabric, window))
        return Job(
            method=method,
            settings=loop_settings(settings, fabric),
            loader=pairs,  # type: ignore[arg-type]
            validation=None,
            run=self.out,
            content=_Export(self.out, images, trained, settings, self.recipe, self.source, self.network),
            name=f"Training {learner.name}",
            optimiser=lambda _: rates.optimiser(),
            rates=rates,
            look=Look(self.out, trained, images.of("validation"), images.patch, settings, fabric.is_global_zero),
        )

    def _unlabelled_loader(self, fabric: Fabric, window: Sequence[int]) -> ImageLoader | None:
        if self.unlabelled is None:
            return None
        size = self.learner.settings.unlabelled_batch_size or self.settings.batch_size
        if size % fabric.world_size:
            raise UsageError(f"unlabelled_batch_size {size} cannot be divided among {fabric.world_size} processes.")
        # Another stream of numbers than the labelled images have.
        order = ImageOrder(self.unlabelled.cases, "natural", self.settings.seed + 1)
        return ImageLoader(
            self.unlabelled, order, window, size, fabric.device, fabric.global_rank, fabric.world_size
        )  # fmt: skip


class _AllRates:
    """Groups and rates of all networks of a method; what else it trains goes with the heads."""

    def __init__(self, method: SemiSupervised, settings: ClassificationSettings) -> None:
        self.settings = settings
        self.rates = [Rates(network, settings.make_schedule()) for network in method.networks]  # type: ignore[arg-type]
        grouped = {id(weight) for rates in self.rates for _, _, weights in rates.groups for weight in weights}
        self.others = [weight for weight in method.parameters() if weight.requires_grad and id(weight) not in grouped]

    def __call__(self, step: int) -> list[float]:
        """Return the rate of each group at a step."""
        found = [rate for rates in self.rates for rate in rates(step)]
        # The first group is the head's.
        return found + [found[0]] * bool(self.others)

    def optimiser(self) -> torch.optim.Optimizer:
        """Return one optimiser of everything that is trained."""
        made = [rates.optimiser(self.settings) for rates in self.rates]
        first = made[0]
        for other in made[1:]:
            for group in other.param_groups:
                first.add_param_group(group)
        if self.others:
            first.add_param_group({"params": self.others, "weight_decay": self.settings.weight_decay})
        return first


def _hashes(store: Store, cases: Sequence[Case]) -> dict[bytes, str]:
    return {_content(store, case.name): case.name for case in cases}


def _content(store: Store, name: str) -> bytes:
    return hashlib.sha256(store.read(name, (0, 0, 0), store.entry(name).shape[1:]).tobytes()).digest()
