"""The training loop: steps, not epochs; readable from top to bottom; the same for every method.

Nothing in a step waits for the device: terms of the loss are summed there and read every `log_every` steps. The batch
and its augmentation are functions of (seed, step), so a run that is resumed goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor

from medssl.data.batch import Batch, Views
from medssl.errors import MedsslError
from medssl.files import write_bytes
from medssl.progress import progress
from medssl.training.checkpoint import FOLDER, checkpoint_name, remove_old, save_checkpoint
from medssl.training.distributed import mean_across_ranks
from medssl.training.engine import Engine
from medssl.training.guards import CollapseGuard, check_finite
from medssl.training.method import Method, Step
from medssl.training.metrics import MetricsWriter
from medssl.training.pictures import draw_grid, pictures_of_views
from medssl.training.schedules import end_of_plateau
from medssl.training.settings import TrainingSettings
from medssl.training.signals import Signals
from medssl.training.state import LoopState, Window

logger = logging.getLogger(__name__)

#: Checkpoint from before the anneal of an `infinite` schedule: where another run can go on.
PLATEAU = "plateau.pth"

Content = Callable[[dict[str, Tensor], int, dict[str, Any] | None], dict[str, Any]]


class Loader(Protocol):
    """What the loop asks of a loader of batches."""

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `start_step` and on, without end."""
        ...


class Interrupted(MedsslError):
    """A signal ended the run after it had saved; the exit code is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Job:
    """What is to be trained, on what, and where it goes.

    Args:
        method: What is minimised. Its `network` is what a checkpoint exports.
        settings: How the loop runs.
        loader: Batches of the training volumes.
        validation: Batches of the validation volumes, or None.
        run: The RUN.
        content: Makes a checkpoint's content of the exported weights, the steps done, and the state that a resumed
            run needs (None in the final checkpoint).
        name: Title of the progress bar.
        optimiser: Makes the optimiser, in place of the one of the settings.
        rates: Learning rate of each of its groups at a step, in place of the schedule of the settings.
        look: Looks at the method every `look_every` steps and returns figures for metrics.jsonl; called with the engine
            and the steps done, on every rank.
        look_every: None takes `validate_every` of the settings.
    """

    method: Method
    settings: TrainingSettings
    loader: Loader
    validation: Loader | None
    run: Path
    content: Content
    name: str
    optimiser: Callable[[Method], torch.optim.Optimizer] | None = None
    rates: Callable[[int], Sequence[float]] | None = None
    look: Callable[[Engine, int], dict[str, float]] | None = None
    look_every: int | None = None


def train(job: Job, fabric: Fabric, *, state: dict[str, Any] | None = None, quiet: bool = False) -> Path:
    """Run a job to its last step and return the final checkpoint.

    Args:
        job: What is to be trained.
        fabric: Devices and precision; launched.
        state: What `LoopState.capture` returned, to go on from there.
        quiet: Show no progress.

    Raises:
        TrainingStopped: If a guard stopped the run.
        Interrupted: If a signal did; the checkpoint is written.
    """
    return _Loop(job, fabric, state, quiet).run()


class _Loop:
    def __init__(self, job: Job, fabric: Fabric, state: dict[str, Any] | None, quiet: bool) -> None:
        self.job, self.settings, self.fabric, self.quiet = job, job.settings, fabric, quiet
        self.engine = Engine(job.method, self.settings, fabric, optimiser=job.optimiser, rates=job.rates)
        self.method = self.engine.method
        guard = CollapseGuard(self.settings.guards)
        self.state = LoopState(self.method, self.engine.optimiser, self.engine.ema, guard)
        if state is not None:
            self.state.restore(state, fabric.device)
        self.engine.start()
        # Signals are agreed on by the processors, so that agreeing does not wait for the devices.
        self.processors: Any = dist.new_group(backend="gloo") if fabric.world_size > 1 else None
        self.metrics: MetricsWriter | None = None
        self.views: Views = []
        self.end_of_plateau = end_of_plateau(self.settings.schedule, self.settings.steps)
        self.spacing_mm, self.modality = torch.ones(3), "MR"
        self.look_every = self.settings.validate_every if job.look_every is None else job.look_every
        self.waited = 0.0

    def run(self) -> Path:
        settings, state = self.settings, self.state
        self.started = time.monotonic() - state.seconds
        self.saved_at = self.logged_at = time.monotonic()
        with ExitStack() as stack:
            self.signals = stack.enter_context(Signals())
            if self._is_main:
                self.metrics = stack.enter_context(MetricsWriter(self.job.run, state.step))
            advance = stack.enter_context(
                progress(self.job.name, settings.steps, quiet=self.quiet or not self._is_main)
            )
            advance(state.step)
            batches = self.job.loader.batches(state.step * settings.accumulate)
            while state.step < settings.steps:
                self._step(batches)
                state.step += 1
                due = [settings.log_every, settings.health_every, settings.validate_every, self.look_every]
                note = self._log() if any(map(self._due, due)) else ""
                if self._due(settings.pictures_every):
                    self._draw()
                advance(1, note)
                self._save_or_stop()
        return self.job.run / FOLDER / checkpoint_name(state.step)

    def _step(self, batches: Iterator[Batch]) -> None:
        """Compute one step of the optimiser."""
        now = Step(self.state.step, self.settings.steps)
        self.state.window.add(self.engine.step(now, self._parts(batches)))

    def _parts(self, batches: Iterator[Batch]) -> Iterator[Views]:
        """Yield the views of each batch of a step; the last ones stay for whoever looks at them later."""
        for part in range(self.settings.accumulate):
            batch = self._next(batches)
            self.spacing_mm, self.modality = batch.spacing_mm[0], batch.modality[0]
            self.views = self.engine.views(batch)
            # What was read around the patch is not needed any more; the step needs the memory.
            del batch
            if self.state.step == 0 and part == 0:
                self._draw_first(self.views)
            yield self.views

    def _next(self, batches: Iterator[Batch]) -> Batch:
        before = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - before
        return batch

    def _due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.settings.steps)

    def _log(self) -> str:
        """Write one row of metrics; here the device is waited for."""
        settings, state = self.settings, self.state
        row = state.window.means()
        state.seconds = time.monotonic() - self.started
        check_finite(row, state.step, self.engine.rate)
        steps = state.window.count
        state.window.clear()
        row |= {"lr": self.engine.rate, "time": round(state.seconds, 3)}
        passed = time.monotonic() - self.logged_at
        row |= {"steps_per_second": steps / max(passed, 1e-9), "waiting_for_data": self.waited / max(passed, 1e-9)}
        if self.fabric.device.type == "cuda":
            row["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self._due(settings.health_every):
            row |= {f"health/{name}": value for name, value in self._health().items()}
        if self.job.validation is not None and self._due(settings.validate_every):
            row |= self._validate(self.job.validation)
        if self.job.look is not None and self._due(self.look_every):
            row |= self.job.look(self.engine, state.step)
        if self.metrics is not None:
            self.metrics.write(state.step, row)
        state.guard.check({name: value for name, value in row.items() if name.startswith("health/")}, state.step)
        self.waited, self.logged_at = 0.0, time.monotonic()
        return f"loss {row['loss']:.4g}"

    def _health(self) -> dict[str, float]:
        figures: dict[str, float] = self.engine.watch(partial(self.method.health, self.views))
        # The mean over ranks, so that a guard stops all of them or none.
        values = mean_across_ranks(torch.tensor(list(figures.values()), device=self.fabric.device))
        return dict(zip(figures, values.tolist(), strict=True))

    def _validate(self, loader: Loader) -> dict[str, float]:
        window = Window()
        batches = loader.batches(0)
        for _ in range(self.settings.validation_batches):
            views = self.engine.views(next(batches))
            terms = self.engine.watch(partial(self.method.losses, views, Step(self.state.step, self.settings.steps)))
            window.add({"loss": self.engine.weigh(terms), **terms})
        return {f"validation/{name}": value for name, value in window.means().items()}

    def _draw_first(self, views: Views) -> None:
        if self._is_main:
            path = self.job.run / "views.png"
            self._picture(pictures_of_views(views), path, "views", "What the network sees at step 0")

    def _draw(self) -> None:
        # On every rank: a head may look at the rows of all.
        images = self.engine.watch(partial(self.method.pictures, self.views))
        if images and self._is_main:
            path = self.job.run / "pictures" / f"step_{self.state.step:06d}.png"
            self._picture(images, path, "pictures", f"After {self.state.step} steps")

    def _picture(self, images: dict[str, Tensor], path: Path, name: str, title: str) -> None:
        try:
            png, size = draw_grid(images, self.spacing_mm.tolist(), title, modality=self.modality)
        except ImportError as error:
            logger.info("No pictures: %s", error)
            return
        write_bytes(path, png)
        if self.metrics is not None:
            self.metrics.picture(self.state.step, name, png, size)

    def _save_or_stop(self) -> None:
        settings, state = self.settings, self.state
        finished = state.step == settings.steps
        since = time.monotonic() - self.saved_at
        wish = self.signals.save_asked or since > settings.save_minutes * 60
        stop, save = self._agree(self.signals.stopped_by or 0, wish)
        if state.step == self.end_of_plateau and not finished:
            self._save(False, PLATEAU)
        if finished or stop or save or state.step % settings.save_every == 0:
            self._save(finished)
            self.signals.save_asked = False
            self.saved_at = time.monotonic()
        if stop and not finished:
            raise Interrupted(
                f"Stopped by signal {stop} after step {state.step}; a checkpoint is saved. Go on with --resume.",
                128 + stop,
            )

    def _agree(self, stop: int, save: bool) -> tuple[int, bool]:
        """Return the signal and the wish to save that any rank has, the same on all."""
        if self.fabric.world_size == 1:
            return stop, save
        agreed = torch.tensor([stop, int(save)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.processors)
        return int(agreed[0]), bool(agreed[1])

    def _save(self, finished: bool, name: str | None = None) -> None:
        state = self.state
        # Weights that are not finite must never replace good ones.
        check_finite(state.window.means(), state.step, self.engine.rate)
        state.seconds = time.monotonic() - self.started
        captured = state.capture()
        if self._is_main:
            content = self.job.content(self.engine.exported_weights(), state.step, None if finished else captured)
            save_checkpoint(self.job.run / FOLDER / (name or checkpoint_name(state.step)), content)
            remove_old(self.job.run / FOLDER, self.settings.keep)
        self.fabric.barrier()

    @property
    def _is_main(self) -> bool:
        return bool(self.fabric.is_global_zero)
