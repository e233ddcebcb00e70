"""Learning from the future: any method with a teacher, by one setting."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric

from medssl import registry_semisupervised as registry
from medssl.semisupervised.mean_teacher import MeanTeacher, MeanTeacherSettings, TeacherStudent
from medssl.training.engine import Engine
from medssl.training.method import Step
from medssl.training.settings import TrainingSettings
from tests.semisupervised.helpers import build, paired

WITH_TEACHER = [name for name, entry in registry.SEMISUPERVISED.items() if issubclass(entry.load(), TeacherStudent)]


def engine_of(steps: int, task: str = "segmentation", momentum: float = 0.5) -> Engine:
    settings = MeanTeacherSettings(
        look_ahead={"steps": steps},  # type: ignore[arg-type]
        teacher={"momentum": momentum, "final": momentum},  # type: ignore[arg-type]
    )
    training = TrainingSettings(steps=100, optimiser={"name": "adamw", "learning_rate": 0.01})  # type: ignore[arg-type]
    engine = Engine(build(MeanTeacher, settings, task), training, Fabric(accelerator="cpu", devices=1))
    engine.start()
    return engine


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_every_method_with_a_teacher_takes_the_setting(name: str) -> None:
    entry = registry.semisupervised(name)
    assert entry.load_settings()().look_ahead.steps == 0
    settings = entry.load_settings()(look_ahead={"steps": 2})
    task = "segmentation" if "segmentation" in entry.tasks else "classification"
    method = build(entry.load(), settings, task)
    assert method.look_ahead == 2
    taught = {id(tensor) for tensor in method.teacher.buffers()}
    assert not taught & {id(tensor) for tensor in method.student_buffers()}


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_teacher_of_a_step_has_seen_the_students_future_and_the_student_has_not(task: str) -> None:
    batch = paired(task)
    ahead, plain = engine_of(2, task), engine_of(0, task)
    for engine in (ahead, plain):
        engine.step(Step(50, 100), [engine.views(batch)])  # type: ignore[arg-type]
    start = build(MeanTeacher, MeanTeacherSettings(), task)

    def moved(engine: Engine, part: str) -> float:
        method = engine.method
        now = method.teacher.parameters() if part == "teacher" else method.networks.parameters()  # type: ignore[union-attr]
        return sum(float((a - b).abs().sum().detach()) for a, b in zip(now, start.networks.parameters(), strict=True))

    # Adam's first step has one length, whatever the gradient.
    assert moved(ahead, "student") == pytest.approx(moved(plain, "student"), rel=0.05)
    assert moved(ahead, "teacher") > 1.5 * moved(plain, "teacher")
    states = [len(engine.optimiser.state) for engine in (ahead, plain)]
    assert states[0] == states[1]
    assert all(int(state["step"]) == 1 for state in ahead.optimiser.state.values())


def test_no_virtual_step_is_the_plain_method_bit_for_bit() -> None:
    first, second = engine_of(0), engine_of(0)
    second.method.student_buffers = lambda: pytest.fail("nothing is to be kept")  # type: ignore[method-assign]
    for engine in (first, second):
        for index in range(2):
            engine.step(Step(index, 100), [engine.views(paired(first=2 * index))])  # type: ignore[arg-type]
    theirs = second.method.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in first.method.state_dict().items())
