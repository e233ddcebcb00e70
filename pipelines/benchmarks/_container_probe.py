"""Runs inside the container: one probe by name, which says on one line what it met."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import torch

MEGABYTES = 2**20


def imports() -> str:
    """Load what breaks first for a user without a name or a home."""
    import matplotlib.pyplot
    import monai
    import nnunetv2
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    matplotlib.pyplot.figure()
    return f"imported {monai.__name__}, {nnunetv2.__name__}, {matplotlib.__name__}; inductor's cache {cache_dir()}"


def network() -> str:
    """Reach out to an address that is reserved for documentation."""
    try:
        socket.create_connection(("192.0.2.1", 80), 5).close()
    except OSError as error:
        return str(error)
    return "connected"


def write() -> str:
    """Write beside the program, into the model and into the input."""
    met = set()
    for folder in ("/opt/medssl", "/", "/model", "/input"):
        try:
            Path(folder, "written").write_text("")
        except OSError as error:
            met.add(error.strerror)
        else:
            met.add(f"wrote into {folder}")
    return ", ".join(sorted(met))


def capabilities() -> str:
    """Read what this process may do beyond its user."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return ", ".join(f"{name} {int(lines[name], 16)}" for name in ("CapEff", "CapBnd", "NoNewPrivs"))


def readers() -> str:
    """Read crops of pretraining in two processes, more at a time than the shared memory holds."""
    from medssl.data.loader import STEPS_AHEAD, CropLoader
    from medssl.data.sampling import CropSettings
    from medssl.preprocessing.store import Store

    settings = CropSettings(patch_size=(160, 160, 160), batch_size=2)
    with CropLoader(Store.open("/input"), settings, seed=0, workers=2) as loader:
        batches = loader.batches()
        size = 0
        for _ in range(STEPS_AHEAD + 1):
            image = next(batches).image
            size = image.numel() * image.element_size()
    return f"read batches of {size // MEGABYTES} MB, {STEPS_AHEAD} ahead"


def fine_tuning() -> str:
    """Make batches of fine-tuning in two processes, more at a time than the shared memory holds."""
    from medssl.transfer.batches import StepBatches

    for batch in StepBatches(_Large(), seed=0, stream="probe").stream_from(0, 8, workers=2, pin_memory=False):
        size = sum(part.numel() * part.element_size() for part in (batch["data"], *batch["target"]))
    return f"made batches of {size // MEGABYTES} MB"


class _Large:
    """Stands for nnU-Net's loader with two crops of 128^3 and their labels at two scales."""

    def generate_train_batch(self) -> dict[str, Any]:
        labels = [torch.zeros(2, 1, side, side, side) for side in (128, 64)]
        return {"data": torch.rand(2, 1, 128, 128, 128), "target": labels}


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write(f"{globals()[sys.argv[1]]()}\n")
