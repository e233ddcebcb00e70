"""What must hold of every registered semi-supervised method."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medssl import registry_semisupervised as registry
from medssl.errors import UsageError
from medssl.pretraining.teacher import Teacher
from medssl.semisupervised.batch import PairedBatch
from medssl.semisupervised.method import SemiSupervised
from medssl.training.method import Step
from tests.semisupervised.helpers import build, paired, same_views, total, views_of, with_other_unlabelled

NAMES = sorted(registry.SEMISUPERVISED)
CASES = [(name, task) for name in NAMES for task in registry.SEMISUPERVISED[name].tasks]
STEP = Step(60, 100)
#: Sums over more than this rank's samples of the mixed ones; or labels blended with partners of this rank's batch.
MIXING = {"ict", "mixmatch", "semixup", "unimatch", "tracoco", "bcp"}


def method_of(name: str, task: str, **arguments: object) -> SemiSupervised:
    """Return a registered method with its default settings on small networks."""
    entry = registry.semisupervised(name)
    method: SemiSupervised = build(entry.load(), entry.load_settings()(), task, **arguments)  # type: ignore[arg-type]
    return method


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_registry_says_what_the_code_is_for(name: str, task: str) -> None:
    kind = registry.semisupervised(name).load()
    assert set(kind.tasks) == set(registry.SEMISUPERVISED[name].tasks)
    assert registry.SEMISUPERVISED[name].summary and registry.SEMISUPERVISED[name].source


@pytest.mark.parametrize(("name", "task"), CASES)
def test_gradients_reach_every_trained_weight_and_no_teacher(name: str, task: str) -> None:
    method, batch = method_of(name, task), paired(task)
    optimiser = torch.optim.SGD([weight for weight in method.parameters() if weight.requires_grad], lr=0.05)
    reached: set[str] = set()
    # nnU-Net starts the last norm of each residual block at zero; a method may begin with another stage.
    for index in (0, 1, 60, 61, 90):
        optimiser.zero_grad()
        total(method.losses(views_of(method, batch, seed=index), Step(index, 100))).backward()
        for key, weight in method.named_parameters():
            if weight.grad is not None and weight.grad.abs().sum() > 0:
                reached.add(key)
        optimiser.step()
        method.after_step(Step(index, 100))
    missing = [key for key, weight in method.named_parameters() if weight.requires_grad and key not in reached]
    assert not missing
    teachers = [module for module in method.modules() if isinstance(module, Teacher)]
    assert not any(weight.requires_grad for teacher in teachers for weight in teacher.parameters())


@pytest.mark.parametrize(("name", "task"), CASES)
def test_views_and_losses_are_functions_of_seed_index_and_weights(name: str, task: str) -> None:
    found = []
    for seed in (0, 0, 1):
        method, batch = method_of(name, task), paired(task)
        assert batch.unlabelled is not None
        before = batch.labelled.image.clone(), batch.unlabelled.image.clone()
        views = views_of(method, batch, seed=seed)
        found.append((views, total(method.losses(views, STEP)).detach()))
        assert torch.equal(batch.labelled.image, before[0]) and torch.equal(batch.unlabelled.image, before[1])
    (first, one), (second, two), (third, three) = found
    assert same_views(first, second) and not same_views(first, third)
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert one.dtype == torch.float32 and bool(one.isfinite())


@pytest.mark.parametrize(("name", "task"), CASES)
def test_unlabelled_images_matter_and_at_weight_zero_do_not(name: str, task: str) -> None:
    settings = registry.semisupervised(name).load_settings()
    kind = registry.semisupervised(name).load()
    if not kind.uses_unlabelled:
        pytest.skip("the control looks at no unlabelled image")
    values = []
    for weight in (1.0, 0.0):
        gradients = []
        for batch in (paired(task), with_other_unlabelled(paired(task))):
            # Fresh networks are sure of nothing.
            sure = {"threshold": 0.0} if "threshold" in settings.model_fields else {}
            method = build(kind, settings(unlabelled={"weight": weight}, **sure), task)
            total(method.losses(views_of(method, batch), Step(90, 100))).backward()
            gradients.append([w.grad for w in method.networks.parameters() if w.grad is not None])
        values.append(all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)))
    assert values == [False, True]


@pytest.mark.parametrize(("name", "task"), CASES)
def test_looking_at_health_and_pictures_leaves_no_trace(name: str, task: str) -> None:
    method, batch = method_of(name, task), paired(task)
    views = views_of(method, batch)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    with torch.no_grad():
        figures, pictures = method.health(views), method.pictures(views)
    assert 0 <= figures["confidence"] <= 1 and 0 <= figures["class_entropy"] <= 1 + 1e-6
    assert all(image.ndim == 4 for image in pictures.values())
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())


@pytest.mark.parametrize("name", [name for name, task in CASES if task == "segmentation"])
def test_padding_and_ignored_voxels_change_nothing(name: str) -> None:
    method = method_of(name, "segmentation", overrides={"spatial": {"scale": {"probability": 0}}})
    batch = paired(margin=9)
    views = views_of(method, batch)
    assert any(not bool(view.inside.all()) for view in views)
    assert bool(total(method.losses(views, STEP)).isfinite())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_loss_falls_on_a_few_images(name: str, task: str) -> None:
    method, batch = method_of(name, task), paired(task)
    optimiser = torch.optim.AdamW([weight for weight in method.parameters() if weight.requires_grad], lr=3e-3)
    values = []
    for index in range(40):
        # The step stands still, so that a rising weight does not hide a falling error.
        terms = method.losses(views_of(method, batch, seed=0), STEP)
        optimiser.zero_grad()
        total(terms).backward()
        optimiser.step()
        method.after_step(Step(index, 40))
        values.append(float(total(terms).detach()))
    assert sum(values[-5:]) < sum(values[:5])


def test_an_unlabelled_part_with_labels_is_refused() -> None:
    batch = paired()
    with pytest.raises(ValueError, match="carries labels"):
        PairedBatch(batch.labelled, batch.labelled)
    with pytest.raises(ValueError, match="carries labels"):
        PairedBatch(paired("classification").labelled, paired("classification").labelled)


def test_an_unknown_method_lists_near_names() -> None:
    with pytest.raises(UsageError, match="mean-teacher"):
        registry.semisupervised("mean-teachr")


TWO_RANKS = """
import dataclasses, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from medssl.semisupervised.batch import PairedBatch
from medssl.training.distributed import mean_across_ranks, rank
from tests.semisupervised.test_methods import STEP, method_of, paired, total, views_of

def part(batch):
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return type(batch)(**{key: value if value is None else value[rank()::2] for key, value in values.items()})

dist.init_process_group("gloo")
for case in sys.argv[2:]:
    name, task = case.split("/")
    method, batch = method_of(name, task).double(), paired(task, labelled=4, unlabelled=4, double=True)
    mine = PairedBatch(part(batch.labelled), part(batch.unlabelled))
    loss = total(method.losses(views_of(method, mine), STEP))
    loss.backward()
    named = method.named_parameters()
    found = {key: mean_across_ranks(weight.grad) for key, weight in named if weight.grad is not None}
    if rank() == 0:
        torch.save({"loss": mean_across_ranks(loss), "gradients": found}, f"{name}_{task}.pt")
    else:
        mean_across_ranks(loss)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_equal_one_process_for_every_method_that_does_not_mix_samples(tmp_path: Path) -> None:
    program = tmp_path / "ranks.py"
    program.write_text(TWO_RANKS)
    wanted = [(name, task) for name, task in CASES if name not in MIXING]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program),
            str(Path(__file__).resolve().parents[2]), *(f"{name}/{task}" for name, task in wanted),
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, task in wanted:
        found = torch.load(tmp_path / f"{name}_{task}.pt", weights_only=True)
        method, batch = method_of(name, task).double(), paired(task, labelled=4, unlabelled=4, double=True)
        loss = total(method.losses(views_of(method, batch), STEP))
        loss.backward()
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6), name
        for key, weight in method.named_parameters():
            if weight.grad is not None:
                torch.testing.assert_close(
                    found["gradients"][key], weight.grad, rtol=1e-4, atol=1e-6, msg=f"{name}, {task}: {key}"
                )
