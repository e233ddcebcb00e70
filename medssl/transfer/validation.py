"""Masks of the validation cases by nnU-Net's own predictor, on the grid of their images."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from medssl.progress import progress
from medssl.transfer.nnunet import nnunet_environment

logger = logging.getLogger(__name__)


def predict_validation(
    trainer: Any, cases: Sequence[str], preprocessed: Path, out: Path, *, quiet: bool = False
) -> None:
    """Write `<case><file ending>` for each case that has none yet.

    Args:
        trainer: A trained `medSSLTrainer`.
        cases: Cases.
        preprocessed: Folder of their preprocessed data.
        out: Folder of the masks.
        quiet: Show no progress.
    """
    ending = trainer.dataset_json["file_ending"]
    out.mkdir(parents=True, exist_ok=True)
    pending = [case for case in cases if not (out / f"{case}{ending}").is_file()]
    if not pending:
        return
    with nnunet_environment(), progress("Predicting validation cases", len(pending), quiet=quiet) as advance:
        from nnunetv2.inference.export_prediction import export_prediction_from_logits
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        trainer.set_deep_supervision_enabled(False)
        predictor = nnUNetPredictor(
            perform_everything_on_device=trainer.device.type == "cuda", device=trainer.device, allow_tqdm=False
        )
        predictor.manual_initialization(
            trainer.network,
            trainer.plans_manager,
            trainer.configuration_manager,
            None,
            trainer.dataset_json,
            "nnUNetTrainer",
            trainer.inference_allowed_mirroring_axes,
        )
        data = nnUNetDatasetBlosc2(str(preprocessed), list(pending))
        for case in pending:
            image, _, _, properties = data.load_case(case)
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(image[:])).cpu()
            # The writer chooses the format by the ending, so the temporary name keeps it at the end.
            temporary = out / f".{uuid.uuid4().hex}"
            export_prediction_from_logits(
                logits,
                properties,
                trainer.configuration_manager,
                trainer.plans_manager,
                trainer.dataset_json,
                str(temporary),
                num_threads_torch=torch.get_num_threads(),
            )
            Path(f"{temporary}{ending}").replace(out / f"{case}{ending}")
            advance()
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
