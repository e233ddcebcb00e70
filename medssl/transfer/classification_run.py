"""What stands around the training loop of a classifier: start, looks at validation, checkpoints, calibration."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medssl.data.probabilities import Probabilities, write_probabilities
from medssl.data.target_table import SEPARATOR
from medssl.data.targets import Case, Targets, carried
from medssl.losses.classification import classification_error
from medssl.networks.build import build_from_architecture
from medssl.networks.classifier import Classifier
from medssl.training.checkpoint import FOLDER, load_checkpoint, save_checkpoint
from medssl.training.engine import Engine
from medssl.training.scores import classification_metrics
from medssl.training.temperature import fit_temperature, probabilities_of
from medssl.transfer.classification_files import write_transfer
from medssl.transfer.classification_images import Images
from medssl.transfer.classification_method import predict_logits, watched_logits
from medssl.transfer.classification_settings import ClassificationSettings
from medssl.transfer.classifier_files import check_weights, checkpoint_content, load_classifier
from medssl.transfer.image_batches import ImageSet
from medssl.transfer.overlay import overlay
from medssl.transfer.source import Source

logger = logging.getLogger(__name__)

#: The weights with the least validation loss so far, for `select: best`.
BEST = "best.pth"
#: The probabilities of the validation cases at temperature 1.
UNCALIBRATED = "uncalibrated.csv"
#: Parts that calibrate each other.
_PARTS = 5


class Trained(Protocol):
    """What is looked at and exported."""

    @property
    def classifier(self) -> Classifier:
        """Encoder and head."""
        ...

    @property
    def kind(self) -> str:
        """Kind of target."""
        ...


def build_classifier(
    images: Images, channels: int, source: Source | None, settings: ClassificationSettings, out: Path | None = None
) -> Classifier:
    """Return the classifier at the start of a run, the same for the same seed.

    Args:
        images: The network, kind of target and classes.
        channels: Channels of an image.
        source: Pretrained weights; with None all are drawn.
        settings: What is trained.
        out: RUN that `transfer.json` is written to.

    Raises:
        CheckpointError: If weights do not fit or are not finite.
    """
    network = build_from_architecture(images.plan, channels, channels, seed=settings.seed)
    targets, report = images.targets, None
    if source is not None:
        check_weights(source.weights, source.path)
        report = overlay(network, source.weights, decoder=source.trains_decoder)
    if out is not None:
        write_transfer(out, source, report)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        classifier = Classifier(
            network, len(targets.classes), targets.kind, stages=settings.stages, pooling=settings.pooling,
            dropout=settings.dropout,
        )  # fmt: skip
    classifier.freeze(settings.frozen)
    return classifier


class Look:
    """Measures all validation images now and then; remembers the best weights where they are asked for.

    Args:
        out: The RUN.
        method: What is trained.
        images: Validation images.
        patch: What the network sees.
        settings: Batch size, and whether the best are remembered.
        is_main: Whether this process writes.
    """

    def __init__(
        self,
        out: Path,
        method: Trained,
        images: ImageSet,
        patch: tuple[int, ...],
        settings: ClassificationSettings,
        is_main: bool,
    ) -> None:
        self.path, self.method, self.images = out / FOLDER / BEST, method, images
        self.patch, self.settings, self.is_main = patch, settings, is_main
        self.least = float("inf")
        if settings.select == "best" and self.path.is_file():
            self.least = float(load_checkpoint(self.path)["medssl"]["loss"])

    def __call__(self, engine: Engine, step: int) -> dict[str, float]:
        """Return the loss and the metrics over all classes."""
        logits = watched_logits(engine, self.method.classifier, self.images, self.patch, self.settings.batch_size)
        kind = self.method.kind
        loss = float(classification_error(torch.from_numpy(logits), self.images.targets, kind))
        if self.settings.select == "best" and loss < self.least:
            self.least = loss
            if self.is_main:
                classifier = self.method.classifier
                facts = {"loss": loss, "step": step, "head": classifier.head.state_dict()}
                save_checkpoint(self.path, {"network_weights": classifier.network.state_dict(), "medssl": facts})
        values = classification_metrics(probabilities_of(logits, kind), self.images.targets.numpy(), kind)  # type: ignore[arg-type]
        overall = {name: value for name, value in values.items() if "/" not in name}
        return {"validation/loss": loss, **{f"validation/{name}": value for name, value in overall.items()}}


class Export:
    """Makes the content of a checkpoint; in the last one stand the weights that were selected.

    Args:
        out: The RUN.
        images: Network, patch and what was done to the images.
        method: What is trained.
        settings: Its settings.
        recipe: The RUN's recipe, as plain values.
        source: The checkpoint it started from, or None.
        network: Name of the network, where it was named.
    """

    def __init__(
        self,
        out: Path,
        images: Images,
        method: Trained,
        settings: ClassificationSettings,
        recipe: Mapping[str, Any],
        source: Source | None,
        network: str | None,
    ) -> None:
        self.out, self.images, self.method, self.settings = out, images, method, settings
        # Paths may name a patient or a machine.
        paths = ("dataset", "labels", "checkpoint", "plans_from", "cache")
        self.recipe = {name: value for name, value in recipe.items() if name not in paths}
        self.source, self.network = source, network

    def __call__(self, weights: dict[str, Tensor], step: int, state: dict[str, Any] | None) -> dict[str, Any]:
        """Return the content after some steps; `state` is what a resumed run needs, None at the end."""
        settings, images = self.settings, self.images
        selected, head = step, None
        if state is None and settings.select == "best":
            best = load_checkpoint(self.out / FOLDER / BEST)
            weights, head, selected = best["network_weights"], best["medssl"]["head"], int(best["medssl"]["step"])
        classifier = self.method.classifier
        own = {
            "target_kind": images.targets.kind,
            "classes": list(images.targets.classes),
            "stages": list(classifier.stages),
            "pooling": classifier.pooling,
            "dropout": settings.dropout,
            "fit": images.facts["fit"],
            "input": images.facts["input"],
            "temperature": 1.0,
            "selected_step": selected,
        }
        facts = {
            "recipe": self.recipe,
            "step": step,
            "patch_size": list(images.patch),
            "spacing_mm": images.facts["spacing_mm"],
            "normalisation": images.store.info.get("normalisation"),
            "modalities": images.facts["modalities"],
            "data_hash": images.store.hash,
            # A decoder fits the encoder it was trained with.
            "trains_decoder": settings.mode == "linear" and self.source is not None and self.source.trains_decoder,
            "classification": own,
        }
        citations = [] if self.source is None else list(self.source.citations)
        content = checkpoint_content(images.plan, self.network, classifier, weights, facts, citations)
        if head is not None:
            content["medssl"]["head"] = head
        if state is not None:
            content["medssl"]["training"] = state
        return content


def finish(out: Path, last: Path, images: Images, settings: ClassificationSettings, device: torch.device) -> None:
    """Fit the temperature on validation, put it into the checkpoint, and write the probabilities.

    Those of a validation case are calibrated without its patient: by the temperature of the other four fifths of the
    patients, so that calibration is not measured on what it was fitted to. Five temperatures do not keep the order of
    the cases, so that `validation/uncalibrated.csv` has the probabilities before any. Cases of the split `test` are
    looked at here for the first time, with the temperature of all validation cases.

    Args:
        out: The RUN.
        last: Its last checkpoint.
        images: Its images.
        settings: Batch size.
        device: Where to compute.
    """
    classifier = load_classifier(last).classifier.to(device)
    targets, kind = images.targets, images.targets.kind

    def logits_of(part: ImageSet) -> NDArray[np.float64]:
        with torch.no_grad():
            return predict_logits(classifier, part, images.patch, settings.batch_size, device)

    validation = images.of("validation")
    logits, truth = logits_of(validation), validation.targets.numpy()
    temperature = fit_temperature(logits, truth, kind)  # type: ignore[arg-type]
    content = load_checkpoint(last)
    if content["medssl"]["classification"]["temperature"] != temperature:
        content["medssl"]["classification"]["temperature"] = temperature
        save_checkpoint(last, content)
    calibrated = _calibrated_apart(logits, truth, kind, validation.cases)
    _write(out / "validation" / "probabilities.csv", targets, validation.cases, calibrated)
    _write(out / "validation" / UNCALIBRATED, targets, validation.cases, probabilities_of(logits, kind))  # type: ignore[arg-type]
    if targets.of("test"):
        test = images.of("test")
        values = probabilities_of(logits_of(test), kind, temperature)  # type: ignore[arg-type]
        _write(out / "test" / "probabilities.csv", targets, test.cases, values)


def _calibrated_apart(
    logits: NDArray[np.float64], truth: NDArray[np.int64], kind: Any, cases: list[Case]
) -> NDArray[np.float64]:
    """Return probabilities, each calibrated on the patients of the other parts."""
    parts = np.array([hashlib.sha256(f"part|{case.shuffle_key}".encode()).digest()[0] % _PARTS for case in cases])
    result = probabilities_of(logits, kind)
    for part in np.unique(parts):
        inside = parts == part
        if not inside.all():
            temperature = fit_temperature(logits[~inside], truth[~inside], kind)
            result[inside] = probabilities_of(logits[inside], kind, temperature)
    return result


def _write(path: Path, targets: Targets, cases: list[Case], values: NDArray[np.float64]) -> None:
    labels = tuple(SEPARATOR.join(targets.classes[number] for number in carried(case)) for case in cases)
    write_probabilities(
        path,
        Probabilities(
            cases=tuple(case.name for case in cases),
            classes=targets.classes,
            values=values,
            patient_keys=tuple(case.patient_key for case in cases),
            targets=labels,
        ),
    )
