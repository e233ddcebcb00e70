"""The trainer that fine-tunes inside stock nnU-Net 2.8.1.

`medssl finetune segmentation` drives it; plain nnU-Net finds it too:
`nnUNet_extTrainer=.../medssl/transfer/trainers nnUNetv2_train DATASET 3d_fullres 0 -p medSSLPlans -tr medSSLTrainer`,
with settings from the YAML file that `MEDSSL_FINETUNE` names.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from medssl.errors import CheckpointError, TrainingStopped
from medssl.files import write_text
from medssl.progress import progress
from medssl.training.checkpoint import load_checkpoint, save_checkpoint
from medssl.training.metrics import MetricsWriter
from medssl.training.signals import Signals
from medssl.transfer.augmenting import DeviceAugmentation, device_augmentation
from medssl.transfer.batches import KeptCases, StepBatches, make_repeatable
from medssl.transfer.laterality import inference_axes, set_mirroring, training_axes
from medssl.transfer.overlay import KeyReport, overlay
from medssl.transfer.schedule import depths_of, group_of
from medssl.transfer.settings import PURPOSES, TrainingSettings, settings_from_environment
from medssl.transfer.source import load_source

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 300.0
LINES_OF_LOSS = 2000
_NO_OUTPUT = ("background", "ignore")
_COUNTS = ("tp_hard", "fp_hard", "fn_hard")
# Compiling takes minutes; only long runs earn it back.
STEPS_WORTH_COMPILING = 20_000


class StoppedBySignal(TrainingStopped):
    """The run was told to stop and has saved where it is.

    Args:
        number: The signal.
        step: Steps done.
    """

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"Stopped by {name} after step {step}; a checkpoint is saved. Continue with --resume.")
        self.exit_code = 128 + number


class _Silent:
    """Stands in for the writer of figures on ranks that write none."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Do nothing."""


class medSSLTrainer(nnUNetTrainer):
    """nnU-Net's trainer by steps: schedules for pretrained weights, a laterality policy, repeatable batches."""

    inference_allowed_mirroring_axes: tuple[int, ...] | None
    driven = False  # True where medssl runs it: nnU-Net's own log file and folders are then not used.

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net's signature
    ) -> None:
        plans.setdefault("continue_training", False)
        super().__init__(plans, configuration, fold, dataset_json, device)
        # With two stages nnU-Net's weights of the outputs would sum to zero.
        self.enable_deep_supervision = len(self.configuration_manager.pool_op_kernel_sizes) > 2
        self.quiet = False
        self.save_every_seconds = SECONDS_BETWEEN_CHECKPOINTS
        self.step = 0
        self.elapsed = self.cpu_seconds = 0.0
        self.key_report: KeyReport | None = None
        self.on_first_batch: Callable[[dict[str, Any]], None] | None = None
        self.augmentation: DeviceAugmentation | None = None
        self.apply_settings(settings_from_environment())

    def apply_settings(self, settings: TrainingSettings) -> None:
        """Take other settings; call it before `initialize`."""
        self.settings = settings
        self.schedule = settings.make_schedule()
        self.initial_lr = settings.learning_rate
        self.weight_decay = settings.weight_decay
        self.num_iterations_per_epoch = settings.val_every
        self.num_val_iterations_per_epoch = settings.val_batches
        self.num_epochs = math.ceil(settings.steps / settings.val_every)
        self.inference_allowed_mirroring_axes = inference_axes(settings.laterality, self._dimensions)

    @property
    def _dimensions(self) -> int:
        return len(self.configuration_manager.patch_size)

    @property
    def _module(self) -> nn.Module:
        module = self.network.module if self.is_ddp else self.network
        return getattr(module, "_orig_mod", module)

    def initialize(self) -> None:
        """Build network, optimiser and loss from the seed; lay the pretrained weights over the network."""
        # A twin with the same seed starts with the same decoder and output layers.
        torch.manual_seed(self.settings.seed)
        super().initialize()
        if self.settings.checkpoint is not None:
            source = load_source(self.settings.checkpoint)
            wanted = self.settings.transfer_decoder
            self.key_report = overlay(
                self._module, source.weights, decoder=source.trains_decoder if wanted is None else wanted
            )
            logger.info("%s: %s", source.path.name, self.key_report.summary())
        self.depths = depths_of(self._module)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, None]:
        """Return the optimiser with a group per level of the network; the schedule sets their rates at each step."""
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            groups.setdefault(group_of(name.removeprefix("_orig_mod.")), []).append(parameter)
        named = [{"params": parameters, "name": name} for name, parameters in groups.items()]
        momentum = self.settings.momentum
        optimizer: torch.optim.Optimizer
        if self.settings.optimiser == "adamw":
            optimizer = torch.optim.AdamW(named, lr=self.initial_lr, weight_decay=self.weight_decay)
        else:
            optimizer = torch.optim.SGD(
                named, self.initial_lr, momentum, weight_decay=self.weight_decay, nesterov=momentum > 0
            )
        return optimizer, None

    def _do_i_compile(self) -> bool:
        if "nnUNet_compile" not in os.environ and self.settings.steps < STEPS_WORTH_COMPILING:
            return False
        return bool(super()._do_i_compile())

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, ...]:
        """Return nnU-Net's choices with the axes that the laterality policy lets training flip."""
        rotation, dummy_2d, initial_patch, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = inference_axes(self.settings.laterality, self._dimensions)
        return rotation, dummy_2d, initial_patch, training_axes(self.settings.laterality, self._dimensions)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the cases of the settings, or nnU-Net's split of the data set."""
        if self.settings.train_cases is None:
            train, validation = super().do_split()
            return list(train), list(validation)
        return list(self.settings.train_cases), list(self.settings.validation_cases or [])

    def get_dataloaders(self) -> tuple[StepBatches, StepBatches | None]:
        """Return training and validation batches by number; there are none for validation without cases for it."""
        rotation, dummy_2d, initial_patch, axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        scales = self._get_deep_supervision_scales()
        regions = self.label_manager.foreground_regions if self.label_manager.has_regions else None
        shared = {"foreground_labels": self.label_manager.foreground_labels, "regions": regions}
        shared["ignore_label"] = self.label_manager.ignore_label
        patch = self.configuration_manager.patch_size
        training: Any = None
        if self.settings.augmentation in PURPOSES:
            self.augmentation = self._device_augmentation(scales)
            initial_patch = self.augmentation.read_size
        else:
            training = self.get_training_transforms(
                patch, rotation, scales, axes, dummy_2d, self.configuration_manager.use_mask_for_norm, **shared
            )
            set_mirroring(training, self.settings.laterality, self._dimensions, self.dataset_json["labels"])
            make_repeatable(training)
        train_cases, validation_cases = self.do_split()
        train = self._batches("train", train_cases, initial_patch, training)
        if not validation_cases:
            return train, None
        return train, self._batches(
            "validation", validation_cases, patch, self.get_validation_transforms(scales, **shared)
        )

    def _device_augmentation(self, scales: Any) -> DeviceAugmentation:
        augmentation = device_augmentation(
            self.plans_manager,
            self.configuration_manager,
            self.label_manager,
            self.dataset_json,
            scales,
            laterality=self.settings.laterality,
            seed=self.settings.seed,
            stream=str(self.local_rank),
            purpose=PURPOSES[self.settings.augmentation],
        )
        # The network has not seen other axes flipped.
        allowed = inference_axes(self.settings.laterality, self._dimensions)
        axes = tuple(axis for axis in allowed if axis in augmentation.mirrored_axes)
        # nnU-Net takes None for no axis.
        self.inference_allowed_mirroring_axes = axes or None
        return augmentation

    def _batches(self, stream: str, cases: list[str], patch: Any, transforms: Any) -> StepBatches:
        loader = nnUNetDataLoader(
            KeptCases(Path(self.preprocessed_dataset_folder), cases),
            self.batch_size,
            patch,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            transforms=transforms,
        )
        return StepBatches(loader, self.settings.seed, f"{stream}/{self.local_rank}")

    def run_training(self) -> None:
        """Train from the present step to the last; a signal to stop saves a checkpoint first."""
        if not self.was_initialized:
            self.initialize()
        self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        if self.local_rank == 0:
            self._complete_model_folder()
        quiet = self.quiet or self.local_rank != 0
        started = saved = time.monotonic()
        before, cpu_before = self.elapsed, self.cpu_seconds - time.process_time()
        every = max(1, self.settings.steps // LINES_OF_LOSS)
        losses: list[float] = []
        with (
            Signals() as signals,
            self._metrics() as metrics,
            progress("Fine-tuning", self.settings.steps, quiet=quiet) as advance,
        ):
            advance(self.step)
            for batch in self._remaining_batches():
                loss, rate = self._one_step(batch)
                losses.append(loss)
                self.step += 1
                self.elapsed = before + time.monotonic() - started
                self.cpu_seconds = cpu_before + time.process_time()
                if self.step % every == 0:
                    metrics.write(self.step, {"time": self.elapsed, "loss": float(np.mean(losses)), "lr": rate})
                    losses = []
                advance(note=f"loss {loss:.3f}")
                ended = self.step == self.settings.steps
                look = ended or self.step % self.settings.val_every == 0
                if look and self.dataloader_val is not None:
                    metrics.write(self.step, {"time": self.elapsed} | self._look(self.dataloader_val))
                due = time.monotonic() - saved > self.save_every_seconds
                if not ended and (look or due or signals.save_asked or signals.stopped_by):
                    self.save_checkpoint(str(Path(self.output_folder, "checkpoint_latest.pth")))
                    saved, signals.save_asked = time.monotonic(), False
                if not ended and signals.stopped_by:
                    raise StoppedBySignal(signals.stopped_by, self.step)
        self._finish()

    def _remaining_batches(self) -> Iterator[dict[str, Any]]:
        batches = self.dataloader_train.stream_from(
            self.step, self.settings.steps, workers=self.settings.workers, pin_memory=self.device.type == "cuda"
        )
        if self.augmentation is not None:
            batches = map(self.augmentation, batches, itertools.count(self.step), itertools.repeat(self.device))
        if self.on_first_batch is not None:
            first = next(batches, None)
            if first is not None:
                self.on_first_batch(_on_cpu(first))
                yield first
        yield from batches

    def _metrics(self) -> AbstractContextManager[Any]:
        if self.local_rank != 0:
            return nullcontext(_Silent())
        return MetricsWriter(Path(self.output_folder_base if self.driven else self.output_folder), self.step)

    def _finish(self) -> None:
        self.save_checkpoint(str(Path(self.output_folder, "checkpoint_final.pth")))
        if self.local_rank == 0:
            for name in ("checkpoint_latest.pth.sha256", "checkpoint_latest.pth"):
                Path(self.output_folder, name).unlink(missing_ok=True)

    def _complete_model_folder(self) -> None:
        """Put plans and data set beside the folds, where nnU-Net's prediction looks for them."""
        for name, content in (("plans.json", self.plans_manager.plans), ("dataset.json", self.dataset_json)):
            write_text(Path(self.output_folder_base, name), json.dumps(content, indent=4) + "\n")

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Send nnU-Net's messages to the log, or to nnU-Net's own file when nnU-Net runs this trainer."""
        if self.driven:
            logger.debug("nnU-Net: %s", " ".join(map(str, args)))
        else:
            super().print_to_log_file(*args, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)

    def _one_step(self, batch: dict[str, Any]) -> tuple[float, float]:
        self.network.train()
        rates = self.schedule.rates(self.step, self.depths)
        # Under DDP the set of trained parameters must not change; a rate of zero keeps them as they are.
        still = self.schedule.encoder_stands_still(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
            for parameter in group["params"]:
                parameter.requires_grad_(self.is_ddp or not still or group["name"] == "decoder")
        loss = float(self.train_step(batch)["loss"])
        if not math.isfinite(loss):
            raise TrainingStopped(
                f"The loss became {loss} at step {self.step + 1} with a learning rate of {max(rates.values()):.2g}. "
                "Lower --learning-rate, or look for extreme intensities in the images."
            )
        return loss, max(rates.values())

    def _look(self, batches: StepBatches) -> dict[str, float]:
        self.network.eval()
        outputs = []
        for number in range(self.settings.val_batches):
            with torch.no_grad():
                outputs.append(self.validation_step(batches[number]))
        hit, false, absent = (np.sum([output[key] for output in outputs], axis=0) for key in _COUNTS)
        # Over all voxels of all crops: nnU-Net's pseudo Dice, a figure to watch and not a result.
        total = 2 * hit + false + absent
        dice = np.divide(2 * hit, total, out=np.full(len(hit), np.nan), where=total > 0)
        labels = {name: value for name, value in self.dataset_json["labels"].items() if name not in _NO_OUTPUT}
        # Outputs follow the order of the regions, or of the labels' values.
        names = list(labels) if self.label_manager.has_regions else sorted(labels, key=lambda name: labels[name])
        loss = float(np.mean([output["loss"] for output in outputs]))
        mean = float(np.nanmean(dice)) if np.any(np.isfinite(dice)) else float("nan")
        per_label = {f"pseudo_dice/{name}": float(value) for name, value in zip(names, dice, strict=True)}
        return {"validation_loss": loss, "pseudo_dice": mean} | per_label

    def save_checkpoint(self, filename: str) -> None:
        """Write a checkpoint that stock nnU-Net reads, whole or not at all, loadable with weights_only."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        arguments = {name: self.my_init_kwargs[name] for name in ("plans", "configuration", "fold", "dataset_json")}
        state = {
            "network_weights": self._module.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": {},
            "_best_ema": None,
            "current_epoch": self.step // self.settings.val_every,
            "init_args": arguments,
            # The network is the plans' alone, so stock nnU-Net needs no trainer of ours to predict.
            "trainer_name": "nnUNetTrainer",
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "medssl": {
                "kind": "segmentation",
                "step": self.step,
                "elapsed_s": self.elapsed,
                "cpu_s": self.cpu_seconds,
                "settings": self.settings.model_dump(mode="json", exclude={"checkpoint"}),
            },
        }
        save_checkpoint(Path(filename), state)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Continue from a checkpoint of this trainer: weights, momenta, scaler and step."""
        if not self.was_initialized:
            # The weights come from the checkpoint; the pretrained ones are not needed any more.
            self.settings = self.settings.model_copy(update={"checkpoint": None})
            self.initialize()
        content = filename_or_checkpoint
        if not isinstance(content, dict):
            content = load_checkpoint(Path(content), numpy_scalars=True)
        if "medssl" not in content or "optimizer_state" not in content:
            raise CheckpointError(f"{filename_or_checkpoint} was not written by medSSLTrainer: it cannot be continued.")
        self._module.load_state_dict(content["network_weights"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.grad_scaler is not None and content["grad_scaler_state"] is not None:
            self.grad_scaler.load_state_dict(content["grad_scaler_state"])
        self.step = int(content["medssl"]["step"])
        self.elapsed = float(content["medssl"]["elapsed_s"])
        self.cpu_seconds = float(content["medssl"]["cpu_s"])
        self.current_epoch = int(content["current_epoch"])
        self.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]


def _on_cpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: [tensor.cpu() for tensor in value] if isinstance(value, list) else value.cpu()
        for name, value in batch.items()
    }
