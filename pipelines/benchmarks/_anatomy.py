"""What `landmarks.py` and `overlap.py` share: cases that are seen and unseen, short pretrainings, and intervals."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medssl.preprocessing.run import preprocess
from medssl.preprocessing.store_files import STORE_FILE
from medssl.pretraining.run import pretrain

DATA = Path(os.environ.get("MEDSSL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
SEED = 0
#: Draws of the bootstrap.
DRAWS = 10_000


@dataclass(frozen=True)
class Cases:
    """A data set by its cases' names.

    Args:
        folder: nnU-Net raw folder.
        seen: Cases to pretrain on.
        unseen: Cases that no model is shown in training.
    """

    folder: Path
    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    @staticmethod
    def of(name: str, unseen: int) -> Cases:
        """Return a data set of `DATA` whose last cases by name are unseen."""
        folder = DATA / name
        names = sorted(path.name.removesuffix("_0000.nii.gz") for path in (folder / "imagesTr").glob("*_0000.nii.gz"))
        if len(names) <= unseen:
            raise SystemExit(f"{folder} has {len(names)} images; more than {unseen} are needed. Set MEDSSL_DATA.")
        return Cases(folder, tuple(names[:-unseen]), tuple(names[-unseen:]))

    def image(self, case: str) -> Path:
        """Return a case's image."""
        return self.folder / "imagesTr" / f"{case}_0000.nii.gz"

    def label(self, case: str) -> Path:
        """Return a case's label."""
        return self.folder / "labelsTr" / f"{case}.nii.gz"


def store_of(cases: Cases, names: Sequence[str], spacing: float, out: Path) -> Path:
    """Make a store of some cases unless it is there."""
    if not (out / STORE_FILE).is_file():
        listed = ", ".join(f"'{name}'" for name in names)
        chosen = f"volume_id IN ({listed})"
        preprocess(cases.folder, out, select=chosen, spacing=(spacing,) * 3, workers=0, resume=out.exists(), quiet=True)
    return out


def pretrained(method: str, store: Path, out: Path, steps: int, overrides: Sequence[str]) -> Path:
    """Pretrain unless it is done; a run that was cut off goes on."""
    began = (out / "recipe.yaml").is_file()
    print(f"{time.strftime('%H:%M:%S')} {'going on with' if began else 'pretraining'} {out.name}", flush=True)
    if began:
        return pretrain(None, store, out, resume=True, quiet=True)
    common = ("network=resenc-xs", f"seed={SEED}", "validate_every=0", "pictures_every=0")
    return pretrain(method, store, out, steps=steps, overrides=(*common, *overrides), quiet=True)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what was kept in a file, or make it and keep it."""
    if not path.is_file():
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made))
    return json.loads(path.read_text())


def interval(values: Sequence[Any], statistic: Callable[[Any], float]) -> tuple[float, float, float]:
    """Return a statistic of values, one for each patient, with its 95 % interval from resampled patients."""
    rows = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(SEED).integers(len(rows), size=(DRAWS, len(rows)))
    low, high = np.percentile([statistic(rows[draw]) for draw in draws], [2.5, 97.5])
    return statistic(rows), float(low), float(high)
