"""The loop, on a method and a loader of a few lines."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from medssl.data.batch import Batch, View, Views
from medssl.data.draw import Draw
from medssl.errors import TrainingStopped, UsageError
from medssl.training.checkpoint import load_checkpoint, newest_intact
from medssl.training.loop import Interrupted, Job, train
from medssl.training.method import Method, Needs, Step
from medssl.training.metrics import read_metrics
from medssl.training.settings import TrainingSettings


class Toy(Method):
    """Restores noise with one convolution and dropout; counts its steps in a buffer, like a queue would."""

    needs: ClassVar[Needs] = Needs()

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(dropout), nn.Conv2d(4, 1, 1))
        self.register_buffer("count", torch.zeros(()))
        self.std = 1.0

    def views(self, batch: Batch, draw: Draw) -> Views:
        image = batch.image + 0.1 * draw.noise_like(batch.image)
        return [
            View(
                image=image, inside=torch.ones_like(image, dtype=torch.bool), to_source_mm=torch.zeros(len(batch), 3, 4)
            )
        ]

    def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
        output = self.network(views[0].image)
        return {"square": (output - 1).square().mean(), "size": output.abs().mean()}

    def after_step(self, step: Step) -> None:
        self.count += 1

    def health(self, views: Views) -> dict[str, float]:
        return {"feature_std": self.std}


class Loaded:
    """Batches as a function of the step; `at` calls something when a step's batch is asked for."""

    def __init__(self, size: int = 4, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.size, self.at = size, at or {}

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        step = start_step
        while True:
            self.at.get(step, lambda: None)()
            index = torch.arange(step * self.size, (step + 1) * self.size)
            image = torch.stack([torch.sin(torch.arange(64.0).view(1, 8, 8) + float(i)) for i in index])
            yield Batch(
                image=image,
                sample_index=index,
                sample_id=index,
                origin_mm=torch.zeros(self.size, 3),
                spacing_mm=torch.ones(self.size, 3),
                valid=torch.zeros(self.size, 3, 2, dtype=torch.int64),
                background=torch.zeros(self.size),
                modality=("MR",) * self.size,
                patient_key=("p",) * self.size,
            )
            step += 1


def run(
    out: Path, *, method: Method | None = None, loader: Loaded | None = None, resume: bool = False, **settings: Any
) -> Path:
    """Train the toy in a RUN, seeded anew as a fresh process would be."""
    torch.manual_seed(int.from_bytes(os.urandom(2)) if resume else 7)
    values = TrainingSettings(
        **{"steps": 10, "log_every": 2, "health_every": 2, "save_every": 3, "pictures_every": 0, **settings}
    )
    job = Job(
        method=method or Toy(),
        settings=values,
        loader=loader or Loaded(),
        validation=None,
        run=out,
        content=lambda weights, step, state: {"network_weights": weights, "medssl": {"step": step, "training": state}},
        name="Toy",
    )
    state = load_checkpoint(newest_intact(out / "checkpoints"))["medssl"]["training"] if resume else None
    fabric = Fabric(accelerator="cpu", devices=1)
    return train(job, fabric, state=state, quiet=True)


def weights(path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_checkpoint(path)["network_weights"]
    return found


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


class Killed(BaseException):
    """Ends a run without a chance to save, as a kill does."""


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("step", [3, 4, 5, 7, 8, 9])
def test_a_resumed_run_equals_one_that_was_not_stopped_in_weights_and_metrics(
    tmp_path: Path, step: int, optimiser: str
) -> None:
    settings: dict[str, Any] = {
        "optimiser": {"name": optimiser},
        "ema": 0.9,
        "schedule": {"name": "cosine", "warmup_steps": 4},
    }
    whole = run(tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        run(tmp_path / "broken", loader=Loaded(at={step: kill}), **settings)
    resumed = run(tmp_path / "broken", resume=True, **settings)
    assert resumed.name == whole.name
    assert equal(weights(whole), weights(resumed))
    clock = {"time", "steps_per_second", "waiting_for_data"}
    rows = [
        [{name: value for name, value in row.items() if name not in clock} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [2, 4, 6, 8, 10]


def test_the_final_checkpoint_holds_no_state_and_the_others_do(tmp_path: Path) -> None:
    final = run(tmp_path, steps=9, save_every=4)
    assert load_checkpoint(final)["medssl"]["training"] is None
    assert load_checkpoint(tmp_path / "checkpoints" / "step_00000008.pth")["medssl"]["training"]["step"] == 8


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path, save_every=1, keep=2)
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("*.pth"))] == [
        "step_00000009.pth",
        "step_00000010.pth",
    ]


def test_minutes_are_a_reason_to_save(tmp_path: Path) -> None:
    run(tmp_path, save_every=1000, save_minutes=1e-9, keep=20)
    assert len(list((tmp_path / "checkpoints").glob("*.pth"))) == 10


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    large = run(tmp_path / "large", method=Toy(dropout=0), loader=Loaded(size=8))
    parts = run(tmp_path / "parts", method=Toy(dropout=0), loader=Loaded(size=4), accumulate=2)
    for name, value in weights(large).items():
        assert torch.allclose(value, weights(parts)[name], atol=1e-6)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("large", "parts")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_terms_are_weighed_and_all_are_logged(tmp_path: Path) -> None:
    run(tmp_path, weights={"size": 0.5}, optimiser={"learning_rate": 1e-12})
    row = read_metrics(tmp_path)[0]
    assert row["loss"] == pytest.approx(row["square"] + 0.5 * row["size"], rel=1e-5)
    assert {"lr", "time", "gradient_norm", "health/feature_std"} <= set(row)


def test_a_weight_of_a_term_that_does_not_exist_lists_near_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean square"):
        run(tmp_path, weights={"sqare": 1.0})


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    before = Toy().network.state_dict()
    final = run(
        tmp_path, steps=1, clip_gradient=1e-3, optimiser={"learning_rate": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    )
    change = torch.cat([(value - before[name]).flatten() for name, value in weights(final).items()])
    assert change.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_a_nan_stops_the_run_before_it_reaches_a_checkpoint(tmp_path: Path) -> None:
    method = Toy()

    def poison() -> None:
        with torch.no_grad():
            method.network[0].weight.fill_(float("nan"))  # type: ignore[index, union-attr, operator]

    with pytest.raises(TrainingStopped, match="NaN"):
        run(tmp_path, method=method, loader=Loaded(at={5: poison}), log_every=100, health_every=100, save_every=3)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.pth")] == ["step_00000003.pth"]


def test_a_collapse_stops_the_run(tmp_path: Path) -> None:
    method = Toy()
    method.std = 0.0
    with pytest.raises(TrainingStopped, match="Collapse"):
        run(tmp_path, method=method)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_and_stops_and_the_run_can_go_on(tmp_path: Path, number: int, code: int) -> None:
    whole = run(tmp_path / "whole")
    loader = Loaded(at={4: lambda: os.kill(os.getpid(), number)})
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="after step 5") as caught:
        run(tmp_path / "stopped", loader=loader)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    assert newest_intact(tmp_path / "stopped" / "checkpoints").name == "step_00000005.pth"
    assert equal(weights(run(tmp_path / "stopped", resume=True)), weights(whole))


def test_sigusr1_saves_and_goes_on(tmp_path: Path) -> None:
    run(tmp_path, loader=Loaded(at={4: lambda: os.kill(os.getpid(), signal.SIGUSR1)}), save_every=1000)
    assert (tmp_path / "checkpoints" / "step_00000005.pth").is_file()
    assert (tmp_path / "checkpoints" / "step_00000010.pth").is_file()


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loader=Loaded(at={4: twice}))


def test_validation_is_the_same_each_time_and_leaves_no_trace(tmp_path: Path) -> None:
    class Validated(Toy):
        """Tells whether it was in training mode."""

        def losses(self, views: Views, step: Step) -> dict[str, Tensor]:
            return {**super().losses(views, step), "mode": torch.tensor(float(self.training))}

    def with_validation(out: Path, every: int) -> Path:
        torch.manual_seed(7)
        settings = TrainingSettings(
            steps=6, log_every=2, health_every=2, pictures_every=0, validate_every=every, validation_batches=2,
            weights={"mode": 0.0}, optimiser={"learning_rate": 1e-12},
        )  # fmt: skip
        job = Job(
            Validated(), settings, Loaded(), Loaded(), out, lambda w, s, _: {"network_weights": w, "medssl": {}}, "Toy"
        )
        return train(job, Fabric(accelerator="cpu", devices=1), quiet=True)

    with_it = with_validation(tmp_path / "with", 2)
    without = with_validation(tmp_path / "without", 0)
    assert equal(weights(with_it), weights(without))
    rows = read_metrics(tmp_path / "with")
    assert len({round(row["validation/loss"], 6) for row in rows}) == 1
    assert rows[0]["validation/mode"] == 0 and rows[0]["mode"] == 1
    assert "validation/loss" not in read_metrics(tmp_path / "without")[0]


def test_views_of_step_0_are_drawn_before_the_first_update(tmp_path: Path) -> None:
    run(tmp_path, steps=1)
    assert (tmp_path / "views.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
