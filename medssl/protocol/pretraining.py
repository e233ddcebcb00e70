"""Where the weights of an arm come from; a pretraining is made once for each data set, on the images of its pool."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medssl.errors import UsageError
from medssl.files import sha256_of, write_json
from medssl.protocol.recipe import PretrainingSettings
from medssl.protocol.tasks import Task
from medssl.training.checkpoint import find_checkpoint


@dataclass(frozen=True)
class PretrainingJob:
    """One pretraining.

    Args:
        task: The data set.
        pool: Cases whose images are learned from.
        settings: What the recipe says of it.
        folder: Where its store and RUN are kept.
        seed: Of everything random.
        device: As in `medssl pretrain`.
        workers: As in `medssl pretrain`.
    """

    task: Task
    pool: Sequence[str]
    settings: PretrainingSettings
    folder: Path
    seed: int = 0
    device: str = "auto"
    workers: int | None = None

    def identity(self) -> dict[str, Any]:
        """Return what decides its result."""
        return {
            "pool": list(self.pool),
            "recipe": self.settings.recipe.read_text(),
            "settings": self.settings.model_dump(mode="json", exclude={"recipe"}),
        }


Pretrainer = Callable[[PretrainingJob], Path]


def pretrain_on_pool(job: PretrainingJob) -> Path:
    """Make the store of the pool, which arms of one spacing share, and pretrain on it; return the RUN."""
    from medssl.pretraining.run import pretrain
    from medssl.transfer.probe_images import read_labelled

    spacing = job.settings.spacing
    name = spacing if isinstance(spacing, str) else "x".join(f"{edge:g}" for edge in spacing)
    store = job.task.pool_store(job.pool, job.folder.parent / f"pool_{name}", job.settings, job.workers)
    run = job.folder / "run"
    begun = (run / "recipe.yaml").is_file()
    if run.exists() and not begun:
        # Killed before it said what it is.
        shutil.rmtree(run)
    given = {"seed": job.seed, **job.settings.settings}
    pretrain(
        None,
        store,
        run,
        recipe=job.settings.recipe,
        # JSON is YAML.
        overrides=[f"{name}={json.dumps(value)}" for name, value in given.items()],
        resume=begun,
        device=job.device,
        workers=job.workers,
        quiet=True,
        read_labelled=read_labelled,
    )
    return run


def checkpoint_of(job: PretrainingJob, pretrainer: Pretrainer) -> Path:
    """Return the checkpoint of a pretraining, made now unless it is there; what it took is noted once.

    Raises:
        UsageError: If it was made with other settings or on another pool.
    """
    note = job.folder / "done.json"
    identity = job.identity()
    if note.is_file():
        before = json.loads(note.read_text())
        for name, value in identity.items():
            if before["identity"].get(name) != value:
                raise UsageError(
                    f"{job.folder} was pretrained with another {name}. Use the same recipe, another name for the arm, "
                    "or another --out."
                )
        return find_checkpoint(job.folder / before["run"])
    job.folder.mkdir(parents=True, exist_ok=True)
    wall, cpu = time.monotonic(), time.process_time()
    begun = (job.folder / "run").exists()
    run = pretrainer(job)
    costs = {"wall_s": time.monotonic() - wall, "cpu_s": time.process_time() - cpu, "resumed": begun}
    content = {"identity": identity, "run": str(run.relative_to(job.folder)), "images": len(job.pool), "costs": costs}
    write_json(note, content)
    return find_checkpoint(run)


def weights_hash(checkpoint: Path | None) -> str | None:
    """Return the SHA-256 of the file that a checkpoint's path means, or None."""
    return None if checkpoint is None else sha256_of(find_checkpoint(checkpoint))
