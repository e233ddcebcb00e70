"""Virtual steps: what goes back, what stays, and that a resumed run cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medssl.training.engine import Engine
from medssl.training.look_ahead import Snapshot
from medssl.training.method import Step
from medssl.training.optimisers import OptimiserSettings, build_optimiser
from medssl.training.settings import TrainingSettings
from tests.training.test_loop import Killed, Loaded, Toy, equal, kill, run, weights


class Ahead(Toy):
    """The toy with virtual steps and a teacher that keeps half of itself."""

    seen: Tensor

    def __init__(self, look_ahead: int, dropout: float = 0.3) -> None:
        super().__init__(dropout)
        self.look_ahead = look_ahead
        self.register_buffer("teacher", torch.zeros(4, 1, 3, 3))
        self.register_buffer("seen", torch.zeros(()))

    def losses(self, views: Any, step: Step) -> dict[str, Tensor]:
        self.seen += 1
        return super().losses(views, step) | {"teacher": (self.network[0].weight - self.teacher).square().mean()}  # type: ignore[index]

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        self.teacher.lerp_(self.network[0].weight.detach(), 0.5)  # type: ignore[index, operator]

    def student_buffers(self) -> list[Tensor]:
        return [self.seen]


def engine_of(method: Toy, **settings: Any) -> Engine:
    values = TrainingSettings(**{"steps": 10, "optimiser": {"learning_rate": 0.1}, **settings})
    engine = Engine(method, values, Fabric(accelerator="cpu", devices=1))
    engine.start()
    return engine


def steps(engine: Engine, count: int) -> None:
    batches = Loaded().batches()
    for index in range(count):
        parts = [engine.views(next(batches)) for _ in range(engine.settings.accumulate)]
        engine.step(Step(index, 10), iter(parts))


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("done", [0, 3])
def test_a_snapshot_puts_back_weights_buffers_and_the_optimisers_state(optimiser: str, done: int) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    found = build_optimiser(OptimiserSettings(name=optimiser, learning_rate=0.1), layers)  # type: ignore[arg-type]

    def move(count: int) -> None:
        for index in range(count):
            found.zero_grad()
            layers(torch.randn(5, 3, generator=torch.Generator().manual_seed(index))).square().mean().backward()
            found.step()

    move(done)
    before = Snapshot(found, list(layers.buffers()))
    move(2)
    first = {name: value.clone() for name, value in layers.state_dict().items()}
    before.restore()
    assert not equal(first, layers.state_dict())
    # Also of what an optimiser starts to keep at its first step: the same way again ends at the same place.
    move(2)
    assert equal(first, layers.state_dict())
    before.restore()
    move(2)
    assert equal(first, layers.state_dict())


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_the_student_makes_one_step_and_the_teacher_follows_all(optimiser: str) -> None:
    """One step with two virtual ones, spelled out with the engine's own plain steps."""
    settings = {"optimiser": {"name": optimiser, "learning_rate": 0.1}}
    ahead = engine_of(Ahead(2, dropout=0.0), **settings)
    steps(ahead, 1)
    plain = engine_of(Ahead(0, dropout=0.0), **settings)
    start = {name: value.clone() for name, value in plain.method.network.state_dict().items()}
    views = plain.views(next(Loaded().batches()))
    for _ in range(2):
        plain.step(Step(0, 10), [views])
    plain.method.network.load_state_dict(start)
    plain.optimiser.state.clear()
    plain.step(Step(0, 10), [views])
    assert equal(ahead.method.network.state_dict(), plain.method.network.state_dict())
    assert torch.equal(ahead.method.teacher, plain.method.teacher)  # type: ignore[arg-type]
    assert ahead.method.count == plain.method.count == 3
    # One of the student's own buffers went back.
    assert ahead.method.seen == 1 and plain.method.seen == 3


def test_the_average_of_the_loop_follows_real_steps_alone() -> None:
    ahead = engine_of(Ahead(3), ema=0.9)
    steps(ahead, 2)
    assert ahead.ema is not None and ahead.ema.updates == 2


def test_all_parts_of_an_accumulated_step_are_looked_at_again() -> None:
    ahead = engine_of(Ahead(2), accumulate=2)
    steps(ahead, 3)
    assert ahead.method.seen == 3 * 2 and ahead.method.count == 3 * 3


def test_no_virtual_step_leaves_a_run_as_it_is_bit_for_bit(tmp_path: Path) -> None:
    class Without(Ahead):
        """Has never heard of looking ahead."""

        def student_buffers(self) -> list[Tensor]:
            raise AssertionError("nothing is kept where nothing is put back")

    plain = run(tmp_path / "plain", method=Without(0))
    assert equal(weights(plain), weights(run(tmp_path / "again", method=Ahead(0))))
    assert not equal(weights(plain), weights(run(tmp_path / "ahead", method=Ahead(1))))


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_with_virtual_steps_equals_one_that_was_not_stopped(
    tmp_path: Path, step: int, optimiser: str
) -> None:
    settings: dict[str, Any] = {"optimiser": {"name": optimiser}, "save_every": 3}
    whole = run(tmp_path / "whole", method=Ahead(2), **settings)
    with pytest.raises(Killed):
        run(tmp_path / "broken", method=Ahead(2), loader=Loaded(at={step: kill}), **settings)
    assert equal(weights(whole), weights(run(tmp_path / "broken", method=Ahead(2), resume=True, **settings)))
