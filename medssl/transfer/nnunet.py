"""Drives the stock nnU-Net in this process: its environment, its printing, its classes; nothing of it is changed."""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from medssl.errors import DataError
from medssl.transfer.raw import RawDataset

logger = logging.getLogger(__name__)

# nnU-Net decides these by looking at the host's name and by searching the disk; here the caller decides.
_ENVIRONMENT = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_wandb_enabled": "0"}


class _ToLog(io.TextIOBase):
    """Turns printed lines into log records."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.debug("nnU-Net: %s", text.strip())
        return len(text)


@contextmanager
def nnunet_environment(**variables: str) -> Iterator[None]:
    """Set nnU-Net's environment variables and send what it prints to the log; all is as before afterwards.

    Args:
        variables: Further variables, for example `nnUNet_results`.
    """
    wanted = {**_ENVIRONMENT, **variables}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with redirect_stdout(_ToLog()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def reader_of(dataset: RawDataset) -> Any:
    """Return nnU-Net's reader class for a data set.

    Raises:
        DataError: If nnU-Net reads no files of this ending.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    first = next(iter(dataset.cases.values()))
    try:
        return determine_reader_writer_from_dataset_json(dataset.content, str(first.images[0]), verbose=False)
    except RuntimeError as error:
        raise DataError(
            f"nnU-Net reads no {dataset.file_ending} files, or {first.images[0].name} is damaged. `medssl "
            "convert` writes NIfTI."
        ) from error


def safe_name(text: str) -> str:
    """Return text as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
