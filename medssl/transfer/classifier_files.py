"""A classifier as a file: a checkpoint of every method's form, with its head, classes and temperature beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medssl.errors import CheckpointError
from medssl.files import sha256_of
from medssl.networks.architecture import Architecture
from medssl.networks.build import build_from_architecture
from medssl.networks.classifier import Classifier
from medssl.training.checkpoint import SCHEMA_VERSION, find_checkpoint, load_checkpoint
from medssl.training.environment import library_versions
from medssl.training.nnssl_plan import adaptation_plan

KIND = "classification"


@dataclass
class TrainedClassifier:
    """A classifier that was read from a file.

    Args:
        classifier: In evaluation mode, on the CPU.
        classes: Names of the classes, in order.
        kind: `multiclass`, `multilabel` or `ordinal`.
        temperature: Divides the logits.
        patch_size: What the network sees.
        fit: How a whole image is brought to the patch; a key of `medssl.transfer.image_fit.FITS`.
        channels: Channels of an image.
        input: What a new image needs to become like those of the training; see `medssl.transfer.images`.
        modalities: Those that were trained on.
        step: Steps of its training.
        sha256: SHA-256 of the file.
    """

    classifier: Classifier
    classes: tuple[str, ...]
    kind: str
    temperature: float
    patch_size: tuple[int, ...]
    fit: str
    channels: int
    input: dict[str, Any]
    modalities: tuple[str, ...]
    step: int
    sha256: str


def checkpoint_content(
    plan: Architecture,
    network_name: str | None,
    classifier: Classifier,
    weights: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    citations: list[Any],
) -> dict[str, Any]:
    """Return the content of a checkpoint.

    Args:
        plan: The network's architecture.
        network_name: Its name in the registry, if it has one.
        classifier: Encoder and head.
        weights: State dict of the U-Net.
        facts: `recipe`, `step`, `patch_size`, `spacing_mm`, `modalities`, `data_hash`, `trains_decoder` and
            `classification` (classes, target kind, temperature, input).
        citations: Papers to cite.
    """
    channels = classifier.encoder.in_channels
    return {
        "network_weights": dict(weights),
        "nnssl_adaptation_plan": adaptation_plan(
            plan,
            in_channels=channels,
            patch_size=facts["patch_size"],
            spacing_mm=facts["spacing_mm"],
            modalities=facts["modalities"],
        ),
        "citations": citations,
        "medssl": {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "method": KIND,
            "architecture": {
                "name": network_name,
                "dimensions": plan.dimensions,
                "in_channels": channels,
                "network_class_name": plan.network_class_name,
                "arch_kwargs": plan.arch_kwargs,
                "kw_requires_import": list(plan.kw_requires_import),
            },
            "head": dict(classifier.head.state_dict()),
            "library_versions": library_versions(),
            **facts,
        },
    }


def load_classifier(run_or_file: Path) -> TrainedClassifier:
    """Read a classifier from a finished RUN or one of its checkpoints.

    Raises:
        CheckpointError: If it is missing, damaged, or no classifier.
    """
    path = find_checkpoint(run_or_file)
    content = load_checkpoint(path)
    facts = content.get("medssl") or {}
    if facts.get("kind") != KIND:
        raise CheckpointError(f"{path} is no classifier: give the RUN of `medssl finetune classification`.")
    try:
        own, plan = facts["classification"], Architecture.from_json(facts["architecture"])
        channels = int(facts["architecture"]["in_channels"])
        network = build_from_architecture(plan, channels, channels, seed=0)
        classifier = Classifier(
            network, len(own["classes"]), own["target_kind"], stages=own["stages"], pooling=own["pooling"],
            dropout=own["dropout"],
        )  # fmt: skip
        network.load_state_dict(content["network_weights"])
        classifier.head.load_state_dict(facts["head"])
        return TrainedClassifier(
            classifier=classifier.eval(),
            classes=tuple(own["classes"]),
            kind=own["target_kind"],
            temperature=float(own["temperature"]),
            patch_size=tuple(facts["patch_size"]),
            fit=own["fit"],
            channels=channels,
            input=dict(own["input"]),
            modalities=tuple(facts["modalities"]),
            step=int(facts["step"]),
            sha256=sha256_of(path),
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its description of the classifier cannot be used ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Train it again with this version."
        ) from error


def load_members(run_or_file: Path) -> list[TrainedClassifier]:
    """Read the classifiers whose probabilities are averaged: those of all folds, or the one that is given.

    Raises:
        CheckpointError: If one is missing or damaged, a fold is not finished, or folds differ in what they are shown.
    """
    folds = number_of_folds(run_or_file)
    if folds is None:
        return [load_classifier(run_or_file)]
    if not json.loads((run_or_file / "run.json").read_text()).get("finished"):
        raise CheckpointError(
            f"{run_or_file}: not all of its {folds} folds are trained. Finish them with --resume, or give one fold."
        )
    members = [load_classifier(folder) for folder in fold_folders(run_or_file, folds)]
    for member in members[1:]:
        for name in ("classes", "kind", "patch_size", "fit", "channels", "input"):
            if getattr(member, name) != getattr(members[0], name):
                raise CheckpointError(f"{run_or_file}: the folds differ in {name}. Train them again together.")
    return members


def fold_folders(out: Path, folds: int) -> list[Path]:
    """Return the RUN of each fold."""
    return [out / f"fold_{number}" for number in range(folds)]


def number_of_folds(run: Path) -> int | None:
    """Return how many folds lie in a classification RUN, or None where it is one run or no RUN."""
    try:
        folds = json.loads((run / "run.json").read_text()).get("folds")
    except (OSError, ValueError, AttributeError):
        return None
    return int(folds) if isinstance(folds, int) else None


def is_classification(run: Path) -> bool:
    """Whether a path is a classification RUN or a checkpoint of one."""
    if run.is_dir():
        try:
            return bool(json.loads((run / "run.json").read_text()).get("kind") == KIND)
        except (OSError, ValueError, AttributeError):
            return False
    if run.suffix != ".pth" or not run.is_file():
        return False
    content = load_checkpoint(run, numpy_scalars=True)
    return bool((content.get("medssl") or {}).get("kind") == KIND)


def state_of(classifier: Classifier) -> dict[str, Tensor]:
    """Return a copy of all weights on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in classifier.state_dict().items()}


def check_weights(weights: Mapping[str, Tensor], where: Path) -> None:
    """Refuse weights that are not finite.

    Raises:
        CheckpointError: Naming the first key.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{where}: {name} holds NaN or infinite weights. Take an earlier checkpoint.")
