"""Starts the trainer in this process, without nnU-Net's search through its folders, and predicts validation cases."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medssl.errors import UsageError
from medssl.files import write_bytes, write_json
from medssl.transfer.nnunet import nnunet_environment
from medssl.transfer.raw import RawDataset
from medssl.transfer.settings import TrainingSettings

logger = logging.getLogger(__name__)


def resolve_device(name: str) -> torch.device:
    """Return the device of an option.

    Raises:
        UsageError: If it does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device takes auto, cpu, cuda or cuda:N, got '{name}'.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices. Use auto or cpu.")
    return device


def run_trainer(
    out: Path,
    plans: dict[str, Any],
    configuration: str,
    raw: RawDataset,
    settings: TrainingSettings,
    preprocessed: Path,
    device: torch.device,
    *,
    resume: bool,
    quiet: bool,
) -> None:
    """Train what is left to train and predict what is left to predict.

    Args:
        out: The RUN.
        plans: nnU-Net plans.
        configuration: Its configuration.
        raw: The data set.
        settings: What the trainer does.
        preprocessed: Folder of the preprocessed cases.
        device: Where to train.
        resume: Continue from the RUN's last checkpoint if there is one.
        quiet: Show no progress.
    """
    with _kept_random_state(), nnunet_environment(), _selected(device):
        trainer = _make_trainer(out, plans, configuration, raw, settings, preprocessed, device)
        trainer.quiet = quiet
        fold = Path(trainer.output_folder)
        final, latest = fold / "checkpoint_final.pth", fold / "checkpoint_latest.pth"
        found = next((path for path in (final, latest) if resume and path.is_file()), None)
        if found is not None:
            trainer.load_checkpoint(str(found))
            logger.info("Continuing at step %d of %d.", trainer.step, settings.steps)
        else:
            trainer.initialize()
            _write_transfer(out, trainer)
            trainer.on_first_batch = lambda batch: _write_views(
                out, batch, plans["configurations"][configuration]["spacing"]
            )
        if found != final:
            # Masks of an earlier state of the model would be taken for the final ones.
            for path in (out / "validation").glob(f"*{raw.file_ending}"):
                path.unlink()
            trainer.run_training()
        from medssl.transfer.validation import predict_validation

        predict_validation(trainer, settings.validation_cases or [], preprocessed, out / "validation", quiet=quiet)


def predict_with(
    weights: Mapping[str, Tensor],
    out: Path,
    plans: dict[str, Any],
    configuration: str,
    raw: RawDataset,
    settings: TrainingSettings,
    preprocessed: Path,
    device: torch.device,
    *,
    quiet: bool,
) -> None:
    """Predict the validation cases with weights that were trained elsewhere; arguments as in `run_trainer`."""
    with _kept_random_state(), nnunet_environment(), _selected(device):
        unpretrained = settings.model_copy(update={"checkpoint": None})
        trainer = _make_trainer(out, plans, configuration, raw, unpretrained, preprocessed, device)
        # One process predicts, however many have trained.
        trainer.is_ddp = False
        trainer.initialize()
        trainer.network.load_state_dict(weights)
        from medssl.transfer.validation import predict_validation

        predict_validation(trainer, settings.validation_cases or [], preprocessed, out / "validation", quiet=quiet)


def _make_trainer(
    out: Path,
    plans: dict[str, Any],
    configuration: str,
    raw: RawDataset,
    settings: TrainingSettings,
    preprocessed: Path,
    device: torch.device,
) -> Any:
    # nnU-Net's constructor makes a folder below nnUNet_results; the RUN's own folders are set right after it.
    with (
        tempfile.TemporaryDirectory() as scratch,
        nnunet_environment(nnUNet_results=scratch, nnUNet_preprocessed=scratch),
    ):
        from medssl.transfer.trainers.medssl_trainer import medSSLTrainer

        class Driven(medSSLTrainer):
            """The trainer in a RUN of medssl."""

            driven = True

        trainer = Driven(deepcopy(plans), configuration, 0, deepcopy(raw.content), device)
    # nnU-Net takes the first of the visible GPUs, whatever it is told.
    trainer.device = device
    trainer.output_folder_base = str(out)
    trainer.output_folder = str(out / "fold_0")
    trainer.preprocessed_dataset_folder_base = str(preprocessed.parent)
    trainer.preprocessed_dataset_folder = str(preprocessed)
    trainer.apply_settings(settings)
    (out / "fold_0").mkdir(exist_ok=True)
    return trainer


def _write_transfer(out: Path, trainer: Any) -> None:
    report = trainer.key_report
    if report is None:
        write_json(out / "transfer.json", {"checkpoint": None, "summary": "all weights start random"})
    else:
        write_json(
            out / "transfer.json",
            {"checkpoint": trainer.settings.checkpoint.name, "summary": report.summary(), **report.to_json()},
        )


def _write_views(out: Path, batch: dict[str, Any], spacing: list[float]) -> None:
    """Draw what the network sees at step 0: crops after augmentation and their labels."""
    from medssl.training.pictures import draw_grid

    image, target = batch["data"], batch["target"]
    label = (target[0] if isinstance(target, list) else target).float()
    if label.shape[1] > 1:
        # Regions come as one channel each; their number per voxel shows them all.
        label = label.sum(dim=1, keepdim=True)
    low, high = np.percentile(image[:, :1].numpy(), (0.5, 99.5))
    shown = label / max(float(label.max()), 1.0) * float(high - low) + float(low)
    in_mm = [1.0] * (3 - len(spacing)) + list(spacing)
    png, _ = draw_grid({"input": image, "label": shown}, in_mm, "What the network sees at step 0")
    write_bytes(out / "views.png", png)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    """Leave the global generators, which nnU-Net draws from, as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def _selected(device: torch.device) -> Iterator[None]:
    """Make a CUDA device the present one, for whatever is allocated without naming a device."""
    if device.type != "cuda" or not device.index:
        yield
        return
    with torch.cuda.device(device):
        yield
