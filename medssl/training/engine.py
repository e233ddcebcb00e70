"""One step of the optimiser on the devices: views, losses, gradients, weights. Knows nothing of files, logs or time.

The loop and `medssl bench` run the same engine, so that what is measured is what trains. Nothing in a step makes the
host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medssl.data.batch import Batch, Views
from medssl.data.draw import Draw
from medssl.errors import unknown_name
from medssl.training.ema import AveragedWeights
from medssl.training.layout import (
    compile_network,
    contiguous_weights,
    give_up_compiling,
    lay_out_views,
    lay_out_weights,
)
from medssl.training.look_ahead import Snapshot
from medssl.training.method import Method, Step
from medssl.training.optimisers import build_optimiser
from medssl.training.schedules import rate_factor
from medssl.training.settings import TrainingSettings


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


class Engine:
    """A method on its device with its optimiser.

    Args:
        method: What is minimised; moved to the device and laid out in memory as the settings say.
        settings: How the loop runs.
        fabric: Devices and precision; launched.
        optimiser: Makes the optimiser of the method's weights, in place of the one of the settings.
        rates: Learning rate of each of its groups at a step, in place of the schedule of the settings.

    Attributes:
        optimiser: The optimiser, not wrapped: its state is what a checkpoint holds.
        ema: Averaged weights, or None.
        rate: Learning rate of the last step.
        compiled: Whether the network's forward is compiled; False from then on where the compiler fails.
    """

    def __init__(
        self,
        method: Method,
        settings: TrainingSettings,
        fabric: Fabric,
        *,
        optimiser: Callable[[Method], torch.optim.Optimizer] | None = None,
        rates: Callable[[int], Sequence[float]] | None = None,
    ) -> None:
        self.settings, self.fabric, self.rates = settings, fabric, rates
        self.method = method.to(fabric.device)
        self.channels_last = settings.memory_format == "channels_last"
        if self.channels_last:
            lay_out_weights(self.method)
        self.optimiser = optimiser(self.method) if optimiser else build_optimiser(settings.optimiser, self.method)
        self.peaks = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.ema = AveragedWeights(self.method.network, settings.ema) if settings.ema else None
        self.rate = 0.0
        self.compiled = settings.compile
        self._module: Any = None
        self._wrapped: Any = None

    def start(self) -> None:
        """Make it ready for steps; what a resumed run needs has been put in place before."""
        self._module, self._wrapped = self.fabric.setup(_Terms(self.method), self.optimiser)
        if self.compiled:
            compile_network(self.method.network)

    @torch.no_grad()
    def views(self, batch: Batch) -> Views:
        """Return what the method shows of a batch that lies on the device."""
        views = self.method.views(batch, Draw(self.settings.seed, batch.sample_index))
        if self.channels_last:
            lay_out_views(views)
        return views

    def step(self, now: Step, parts: Iterable[Views]) -> dict[str, Tensor]:
        """Compute one step of the optimiser.

        Args:
            now: Which step.
            parts: Views of the `accumulate` batches of the step; each is asked for when the one before is done.

        Returns:
            Terms of the loss and the norm of the gradient, on the device.
        """
        rates = self._rates(now.index)
        for group, rate in zip(self._wrapped.param_groups, rates, strict=True):
            group["lr"] = rate
        self.rate = rates[0]
        if self.method.look_ahead:
            parts = list(parts)
            self._look_ahead(now, parts)
        figures = self._descend(now, parts)
        self.method.after_step(now)
        if self.ema is not None:
            self.ema.update(self.method.network)
        return figures

    def _look_ahead(self, now: Step, parts: Sequence[Views]) -> None:
        """Take steps on the parts for what the method learns of them, and go back."""
        before = Snapshot(self.optimiser, self.method.student_buffers())
        for _ in range(self.method.look_ahead):
            self._descend(now, parts)
            self.method.after_step(now)
        before.restore()

    def _descend(self, now: Step, parts: Iterable[Views]) -> dict[str, Tensor]:
        """Move the weights once; return the figures of `step`."""
        figures: dict[str, Tensor] = {}
        count = self.settings.accumulate
        for part, views in enumerate(parts):
            with self.fabric.no_backward_sync(self._module, enabled=part < count - 1):
                terms = self._terms(_Work(views, now))
                loss = self.weigh(terms) / count
                self.fabric.backward(loss)
            found = {"loss": loss.detach()} | {name: term.detach() / count for name, term in terms.items()}
            figures = {name: figures[name] + value if name in figures else value for name, value in found.items()}
        if self.settings.clip_gradient is not None:
            figures["gradient_norm"] = self._clip(self.settings.clip_gradient)
        self._wrapped.step()
        self._wrapped.zero_grad(set_to_none=True)
        return figures

    def _rates(self, step: int) -> Sequence[float]:
        if self.rates is not None:
            return self.rates(step)
        factor = rate_factor(self.settings.schedule, step, self.settings.steps)
        return [peak * factor for peak in self.peaks]

    def weigh(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighed sum of the terms.

        Raises:
            UsageError: If a weight is given for a term that does not exist.
        """
        for name in self.settings.weights:
            if name not in terms:
                raise unknown_name("term of the loss", name, terms)
        weighed = [self.settings.weights.get(name, 1.0) * term for name, term in terms.items()]
        return torch.stack(weighed).sum()

    def watch(self, look: Callable[[], Any]) -> Any:
        """Look at the method without leaving a trace in it."""
        self.method.eval()
        # A look is rare: to compile a program of its own for it, without gradients, would not pay.
        plain: AbstractContextManager[Any] = nullcontext()
        if self.compiled:
            plain = torch.compiler.set_stance("force_eager")
        try:
            with torch.no_grad(), self.fabric.autocast(), plain:
                return look()
        finally:
            self.method.train()

    def exported_weights(self) -> dict[str, Tensor]:
        """Return the network's weights, averaged where an average is kept, as a checkpoint holds them."""
        network = self.method.network
        return contiguous_weights(network.state_dict() if self.ema is None else self.ema.state_of(network))

    def _terms(self, work: _Work) -> Any:
        if not self.compiled:
            return self._module(work)
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self._module(work)
        except TorchDynamoException as error:
            # A compiler that is missing or fails costs speed and must not cost the run.
            give_up_compiling(self.method.network, error)
            self.compiled = False
            return self._module(work)

    def _clip(self, most: float) -> Tensor:
        norm = self.fabric.clip_gradients(self._module, self._wrapped, max_norm=most, error_if_nonfinite=False)
        assert norm is not None
        return norm
