"""The small model and the inputs that the checks of the container use, made outside of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from _synthetic_store import synthetic_store

from medssl.files import sha256_of

SERIES = "dicom/hyperfine/anatomical/001"
REFUSED_SERIES = "dicom/failing/notavolume"
STEPS = 20
# Tiles side by side: what is compared are two runs, not quality.
PREDICT = ("predict", "--step-size", "1", "--device", "cpu", "--quiet")
Mounts = dict[str, tuple[Path, str]]


class Bench:
    """Inputs of the checks, made once.

    Args:
        scratch: Folder for them.
        data: The real data sets.
    """

    def __init__(self, scratch: Path, data: Path) -> None:
        self.scratch = scratch
        self.model, self.expected = scratch / "model", scratch / "expected"
        self.series, self.refused_input, self.mixed_input = data / SERIES, data / REFUSED_SERIES, scratch / "mixed"
        dataset = data / "hippocampus"
        cases = sorted(path.name.split(".")[0] for path in (dataset / "labelsTr").glob("*.nii.gz"))
        self._outside(
            "finetune", "segmentation", "--dataset", dataset, "--checkpoint", "none", "--network", "resenc-xs",
            "--train-cases", ",".join(cases[:3]), "--validation-cases", cases[3], "--patch-size", "32,32,32",
            "--batch-size", "2", "--steps", STEPS, "--val-every", STEPS, "--device", "cpu", "--out", self.model,
            "--quiet",
        )  # fmt: skip
        self._outside(*PREDICT, "--model", self.model, "--input", self.series, "--out", self.expected)
        shutil.copytree(self.series, self.mixed_input / "good")
        shutil.copytree(self.refused_input, self.mixed_input / "bad")
        self.store = synthetic_store(scratch / "store", volumes=4, shape=(24, 40, 24)).folder
        self.large_store = synthetic_store(scratch / "large_store", volumes=2, shape=(160, 160, 160)).folder

    def inputs(self) -> Mounts:
        """Return where model and series are mounted, both read-only."""
        return {"/model": (self.model, "ro"), "/input": (self.series, "ro")}

    def prediction(self, out: Path, source: Path | None = None) -> Mounts:
        """Return the mounts of a prediction."""
        return {**self.inputs(), "/input": (source or self.series, "ro"), "/output": (out, "rw")}

    def output(self, user: int, name: str) -> Path:
        """Return a new folder that belongs to the user of the container and to nobody else."""
        folder = self.scratch / f"{name}_{user}"
        folder.mkdir()
        os.chown(folder, user, user)
        folder.chmod(0o700)
        return folder

    def damaged_model(self) -> Path:
        """Return a copy of the model with one bit of its weights turned."""
        copy = Path(shutil.copytree(self.model, self.scratch / "damaged"))
        file = checkpoint(copy)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return copy

    def _outside(self, *arguments: str | int | Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(self.scratch / "config")}
        command = [sys.executable, "-m", "medssl", *map(str, arguments)]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def checkpoint(model: Path) -> Path:
    """Return the only checkpoint of a fine-tuned RUN."""
    return next(model.glob("fold_*/checkpoint_final.pth"))


def small_model_hash(model: Path) -> str:
    """Return the hash that `medssl doctor` must find."""
    return sha256_of(checkpoint(model))
