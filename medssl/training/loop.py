"""The training loop: steps, not epochs; readable from top to bottom; the same for every method.

Nothing in a step waits for the device: terms of the loss are summed there and read every `log_every` steps. The batch
and its augmentation are functions of (seed, step), so a run that is resumed goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor, nn

from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.errors import MedsslError, unknown_name
from medssl.files import write_bytes
from medssl.progress import progress
from medssl.training.checkpoint import FOLDER, checkpoint_name, remove_old, save_checkpoint
from medssl.training.distributed import mean_across_ranks
from medssl.training.ema import AveragedWeights
from medssl.training.guards import CollapseGuard, check_finite
from medssl.training.method import Method, Step
from medssl.training.metrics import MetricsWriter
from medssl.training.optimisers import build_optimiser
from medssl.training.pictures import draw_grid, pictures_of_views
from medssl.training.schedules import rate_factor
from medssl.training.settings import TrainingSettings
from medssl.training.signals import Signals
from medssl.training.state import LoopState, Window

logger = logging.getLogger(__name__)

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
    """

    method: Method
    settings: TrainingSettings
    loader: Loader
    validation: Loader | None
    run: Path
    content: Content
    name: str


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


class _Work:
    """Views and step on their way through Fabric and DDP.

    Fabric casts every tensor that it finds in the arguments of a forward to bfloat16, the target of a reconstruction
    too; in a class that it does not know it finds none.
    """

    __slots__ = ("step", "views")

    def __init__(self, views: Views, step: Step) -> None:
        self.views, self.step = views, step


class _Terms(nn.Module):
    """The forward that DDP needs: the method's losses."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, work: _Work) -> dict[str, Tensor]:
        return self.method.losses(work.views, work.step)


class _Loop:
    def __init__(self, job: Job, fabric: Fabric, state: dict[str, Any] | None, quiet: bool) -> None:
        self.job, self.settings, self.fabric, self.quiet = job, job.settings, fabric, quiet
        self.method = job.method.to(fabric.device)
        optimiser = build_optimiser(self.settings.optimiser, self.method)
        self.peaks = [float(group["lr"]) for group in optimiser.param_groups]
        ema = AveragedWeights(self.method.network, self.settings.ema) if self.settings.ema else None
        self.state = LoopState(self.method, optimiser, ema, CollapseGuard(self.settings.guards))
        if state is not None:
            self.state.restore(state, fabric.device)
        self.module, self.optimiser = fabric.setup(_Terms(self.method), optimiser)
        # Signals are agreed on by the processors, so that agreeing does not wait for the devices.
        self.processors: Any = dist.new_group(backend="gloo") if fabric.world_size > 1 else None
        self.metrics: MetricsWriter | None = None
        self.spacing_mm = torch.ones(3)
        self.rate = 0.0
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
                views = self._step(batches)
                state.step += 1
                due = [settings.log_every, settings.health_every, settings.validate_every]
                note = self._log(views) if any(map(self._due, due)) else ""
                if self._due(settings.pictures_every):
                    self._draw(views)
                advance(1, note)
                self._save_or_stop()
        return self.job.run / FOLDER / checkpoint_name(state.step)

    def _step(self, batches: Iterator[Batch]) -> Views:
        """Compute one step of the optimiser and return the views of its last batch."""
        settings, state = self.settings, self.state
        now = Step(state.step, settings.steps)
        factor = rate_factor(settings.schedule, state.step, settings.steps)
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.rate = self.peaks[0] * factor
        figures: dict[str, Tensor] = {}
        for part in range(settings.accumulate):
            batch = self._next(batches)
            views = self._views(batch)
            self.spacing_mm = batch.spacing_mm[0]
            if state.step == 0 and part == 0:
                self._draw_first(views)
            with self.fabric.no_backward_sync(self.module, enabled=part < settings.accumulate - 1):
                terms = self.module(_Work(views, now))
                loss = self._weigh(terms) / settings.accumulate
                self.fabric.backward(loss)
            parts = {"loss": loss.detach()} | {
                name: term.detach() / settings.accumulate for name, term in terms.items()
            }
            figures = {name: figures[name] + value if name in figures else value for name, value in parts.items()}
        if settings.clip_gradient is not None:
            figures["gradient_norm"] = self._clip(settings.clip_gradient)
        state.window.add(figures)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.method.after_step(now)
        if state.ema is not None:
            state.ema.update(self.method.network)
        return views

    def _next(self, batches: Iterator[Batch]) -> Batch:
        before = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - before
        return batch

    @torch.no_grad()
    def _views(self, batch: Batch) -> Views:
        return self.method.views(batch, Draw(self.settings.seed, batch.sample_index))

    def _weigh(self, terms: Mapping[str, Tensor]) -> Tensor:
        for name in self.settings.weights:
            if name not in terms:
                raise unknown_name("term of the loss", name, terms)
        weighed = [self.settings.weights.get(name, 1.0) * term for name, term in terms.items()]
        return torch.stack(weighed).sum()

    def _clip(self, most: float) -> Tensor:
        norm = self.fabric.clip_gradients(self.module, self.optimiser, max_norm=most, error_if_nonfinite=False)
        assert norm is not None
        return norm

    def _due(self, every: int) -> bool:
        return every > 0 and (self.state.step % every == 0 or self.state.step == self.settings.steps)

    def _log(self, views: Views) -> str:
        """Write one row of metrics; here the device is waited for."""
        settings, state = self.settings, self.state
        row = state.window.means()
        state.seconds = time.monotonic() - self.started
        check_finite(row, state.step, self.rate)
        steps = state.window.count
        state.window.clear()
        row |= {"lr": self.rate, "time": round(state.seconds, 3)}
        passed = time.monotonic() - self.logged_at
        row |= {"steps_per_second": steps / max(passed, 1e-9), "waiting_for_data": self.waited / max(passed, 1e-9)}
        if self.fabric.device.type == "cuda":
            row["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self._due(settings.health_every):
            row |= {f"health/{name}": value for name, value in self._health(views).items()}
        if self.job.validation is not None and self._due(settings.validate_every):
            row |= self._validate(self.job.validation)
        if self.metrics is not None:
            self.metrics.write(state.step, row)
        state.guard.check({name: value for name, value in row.items() if name.startswith("health/")}, state.step)
        self.waited, self.logged_at = 0.0, time.monotonic()
        return f"loss {row['loss']:.4g}"

    def _health(self, views: Views) -> dict[str, float]:
        figures: dict[str, float] = self._watch(partial(self.method.health, views))
        # The mean over ranks, so that a guard stops all of them or none.
        values = mean_across_ranks(torch.tensor(list(figures.values()), device=self.fabric.device))
        return dict(zip(figures, values.tolist(), strict=True))

    def _validate(self, loader: Loader) -> dict[str, float]:
        window = Window()
        batches = loader.batches(0)
        for _ in range(self.settings.validation_batches):
            views = self._views(next(batches))
            terms = self._watch(partial(self.method.losses, views, Step(self.state.step, self.settings.steps)))
            window.add({"loss": self._weigh(terms), **terms})
        return {f"validation/{name}": value for name, value in window.means().items()}

    def _watch(self, look: Callable[[], Any]) -> Any:
        """Look at the method without leaving a trace in it."""
        self.method.eval()
        try:
            with torch.no_grad(), self.fabric.autocast():
                return look()
        finally:
            self.method.train()

    def _draw_first(self, views: Views) -> None:
        if self._is_main:
            path = self.job.run / "views.png"
            self._picture(pictures_of_views(views), path, "views", "What the network sees at step 0")

    def _draw(self, views: Views) -> None:
        images = self._watch(partial(self.method.pictures, views)) if self._is_main else {}
        if images:
            path = self.job.run / "pictures" / f"step_{self.state.step:06d}.png"
            self._picture(images, path, "pictures", f"After {self.state.step} steps")

    def _picture(self, images: dict[str, Tensor], path: Path, name: str, title: str) -> None:
        try:
            png, size = draw_grid(images, self.spacing_mm.tolist(), title)
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

    def _save(self, finished: bool) -> None:
        state = self.state
        # Weights that are not finite must never replace good ones.
        check_finite(state.window.means(), state.step, self.rate)
        state.seconds = time.monotonic() - self.started
        captured = state.capture()
        if self._is_main:
            network = self.method.network
            weights = network.state_dict() if state.ema is None else state.ema.state_of(network)
            content = self.job.content(weights, state.step, None if finished else captured)
            save_checkpoint(self.job.run / FOLDER / checkpoint_name(state.step), content)
            remove_old(self.job.run / FOLDER, self.settings.keep)
        self.fabric.barrier()

    @property
    def _is_main(self) -> bool:
        return bool(self.fabric.is_global_zero)
