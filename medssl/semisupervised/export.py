"""The checkpoint of a semi-supervised segmentation: ours, and nnU-Net's at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from medssl import registry_semisupervised as registry
from medssl.files import atomic_path, sha256_of, write_text
from medssl.networks.architecture import Architecture
from medssl.preprocessing.store import Store
from medssl.semisupervised.method import SemiSupervised
from medssl.semisupervised.recipe import SemiTrainingSettings, exported
from medssl.training.checkpoint import SCHEMA_VERSION
from medssl.training.environment import library_versions
from medssl.training.layout import contiguous_weights
from medssl.training.nnssl_plan import adaptation_plan
from medssl.transfer.laterality import inference_axes

#: Where nnU-Net looks for the model.
FINAL = Path("fold_0", "checkpoint_final.pth")


class Export:
    """Makes the content of a checkpoint: the network that predicts, under nnU-Net's names.

    Args:
        settings: The resolved recipe.
        plans: nnU-Net plans.
        configuration: Their configuration.
        dataset: Content of `dataset.json`.
        method: What is trained.
        store: Of the labelled cases; its hash is kept.
    """

    def __init__(
        self,
        settings: SemiTrainingSettings,
        plans: dict[str, Any],
        configuration: str,
        dataset: dict[str, Any],
        method: SemiSupervised,
        store: Store,
    ) -> None:
        self.settings, self.plans, self.configuration, self.dataset = settings, plans, configuration, dataset
        self.method, self.store = method, store

    def __call__(self, weights: dict[str, Tensor], step: int, state: dict[str, Any] | None) -> dict[str, Any]:
        """Return the content after some steps; `weights` are the averaged ones where the loop keeps an average."""
        settings, method = self.settings, self.method
        content = self.plans["configurations"][self.configuration]
        plan = Architecture.from_json(content["architecture"])
        if settings.ema is None:
            weights = contiguous_weights(method.task.unet_of(method.predictor).state_dict())
        modalities, channels = sorted(self.store.modalities), method.encoder.in_channels
        ours = {
            "schema_version": SCHEMA_VERSION,
            "kind": "segmentation",
            "method": settings.method,
            "recipe": exported(settings),
            "step": step,
            "architecture": {
                "name": None,
                "dimensions": plan.dimensions,
                "in_channels": channels,
                "network_class_name": plan.network_class_name,
                "arch_kwargs": plan.arch_kwargs,
                "kw_requires_import": list(plan.kw_requires_import),
            },
            "patch_size": list(content["patch_size"]),
            "spacing_mm": list(content["spacing"]),
            "normalisation": list(content["normalization_schemes"]),
            "trains_decoder": True,
            "modalities": modalities,
            "data_hash": self.store.hash,
            "library_versions": library_versions(),
        }
        entry = registry.semisupervised(settings.method)
        laterality = settings.augmentation.laterality
        arguments = {"plans": self.plans, "configuration": self.configuration, "fold": 0, "dataset_json": self.dataset}
        return {
            "network_weights": weights,
            "nnssl_adaptation_plan": adaptation_plan(
                plan,
                in_channels=channels,
                patch_size=content["patch_size"],
                spacing_mm=content["spacing"],
                modalities=modalities,
            ),
            "citations": [{"type": "method", "name": settings.method, "apa_citations": [entry.source]}],
            # The network is the plans' alone, so stock nnU-Net needs no trainer of ours to predict.
            "trainer_name": "nnUNetTrainer",
            "init_args": arguments,
            "inference_allowed_mirroring_axes": inference_axes(laterality, plan.dimensions) or None,
            "medssl": ours if state is None else {**ours, "training": state},
        }


def publish(last: Path, out: Path) -> None:
    """Put the last checkpoint where nnU-Net looks for it, whole or not at all."""
    target = out / FINAL
    target.parent.mkdir(exist_ok=True)
    with atomic_path(target) as temporary:
        shutil.copyfile(last, temporary)
    write_text(target.with_name(target.name + ".sha256"), f"{sha256_of(target)}  {target.name}\n")
