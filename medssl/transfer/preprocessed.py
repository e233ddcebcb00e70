"""Cases preprocessed by nnU-Net's own preprocessor, each written whole or not at all and found again later."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medssl.files import write_json
from medssl.transfer.fingerprint import for_each
from medssl.transfer.nnunet import nnunet_environment
from medssl.transfer.raw import Case, RawDataset

# The last one written marks a case as complete.
_ENDINGS = (".b2nd", "_seg.b2nd", ".pkl")


def preprocess_cases(
    dataset: RawDataset,
    plans: dict[str, Any],
    configuration: str,
    names: Sequence[str],
    folder: Path,
    *,
    with_labels: bool = True,
    workers: int | None = None,
    quiet: bool = False,
) -> Path:
    """Preprocess the cases that are not there yet.

    Args:
        dataset: The raw data set.
        plans: nnU-Net plans.
        configuration: Its configuration.
        names: Cases.
        folder: Folder of the data set's preprocessed data; a configuration has its own folder in it.
        with_labels: Read the masks; without, they may not exist, and `_seg` holds only nnU-Net's mark of what lies
            outside the content. A folder holds cases of one kind.
        workers: Processes; see `for_each`.
        quiet: Show no progress.

    Returns:
        The folder with `<case>.b2nd`, `<case>_seg.b2nd` and `<case>.pkl`.
    """
    target = folder / plans["configurations"][configuration]["data_identifier"]
    target.mkdir(parents=True, exist_ok=True)
    pending = [dataset.cases[name] for name in names if not _is_done(dataset.cases[name], target)]
    arguments = [(dataset.content, plans, configuration, case, target, with_labels) for case in pending]
    for_each(_preprocess, arguments, "Preprocessing", workers=workers, quiet=quiet)
    return target


def _preprocess(
    content: dict[str, Any], plans: dict[str, Any], configuration: str, case: Case, target: Path, with_label: bool
) -> None:
    with nnunet_environment():
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        manager = PlansManager(plans)
        settings = manager.get_configuration(configuration)
        preprocessor = settings.preprocessor_class(verbose=False)
        # In a folder of its own: nnU-Net tells the format of a data folder by the files in it.
        work = target / f".{uuid.uuid4().hex}"
        work.mkdir()
        try:
            label = str(case.label) if with_label else None
            preprocessor.run_case_save(
                str(work / case.name), [str(path) for path in case.images], label, manager, settings, content
            )
            for ending in _ENDINGS:
                (work / f"{case.name}{ending}").replace(target / f"{case.name}{ending}")
        finally:
            for path in work.iterdir():
                path.unlink()
            work.rmdir()
    write_json(_record(case, target), case.signature)


def _record(case: Case, target: Path) -> Path:
    return target / ".sources" / f"{case.name}.json"


def _is_done(case: Case, target: Path) -> bool:
    record = _record(case, target)
    if not record.is_file() or not all((target / f"{case.name}{ending}").is_file() for ending in _ENDINGS):
        return False
    return bool(json.loads(record.read_text()) == case.signature)
