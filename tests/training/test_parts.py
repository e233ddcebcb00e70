"""The small parts of the loop: schedules, optimisers, averages, guards, metrics, lock, state, plan."""

from __future__ import annotations

import itertools
import json
import math
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.errors import TrainingStopped, UsageError
from medssl.lock import run_lock
from medssl.networks.architecture import architecture
from medssl.networks.build import build_network
from medssl.training.devices import find_machine
from medssl.training.ema import AveragedWeights
from medssl.training.environment import describe_environment
from medssl.training.guards import CollapseGuard, GuardSettings, check_finite
from medssl.training.metrics import MetricsWriter, read_metrics
from medssl.training.nnssl_plan import adaptation_plan
from medssl.training.optimisers import OptimiserSettings, build_optimiser
from medssl.training.pictures import draw_grid
from medssl.training.schedules import ScheduleSettings, rate_factor
from medssl.training.state import Window, random_state, set_random_state


def test_poly_is_nnunets() -> None:
    schedule = ScheduleSettings()
    assert [rate_factor(schedule, step, 1000) for step in (0, 250, 999)] == pytest.approx([1.0, 0.75**0.9, 0.001**0.9])


def test_warm_up_rises_in_even_steps_to_the_peak_and_the_schedule_follows() -> None:
    schedule = ScheduleSettings(name="cosine", warmup_steps=4, final=0.1)
    rates = [rate_factor(schedule, step, 104) for step in range(104)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[103] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_infinite_has_a_plateau_and_ends_at_its_final_rate() -> None:
    schedule = ScheduleSettings(name="infinite", plateau=0.3, cooldown=0.25, anneal=0.25, final=0.01)
    rates = [rate_factor(schedule, step, 100) for step in range(101)]
    assert rates[0] == 1.0
    assert set(rates[25:75]) == {0.3}
    assert rates[100] == pytest.approx(0.01)


def test_a_warm_up_longer_than_the_run_is_the_whole_run() -> None:
    assert rate_factor(ScheduleSettings(warmup_steps=50), 9, 10) == 1.0


def test_adamw_spares_norms_and_biases_from_decay() -> None:
    network = build_network("resenc-xs", dimensions=2)
    optimiser = build_optimiser(OptimiserSettings(name="adamw", weight_decay=0.1), network)
    decays = {
        group["weight_decay"]: {parameter.ndim for parameter in group["params"]} for group in optimiser.param_groups
    }
    assert decays == {0.1: {4}, 0.0: {1}}


def test_frozen_weights_are_not_optimised() -> None:
    network = build_network("resenc-xs", dimensions=2)
    network.encoder.requires_grad_(False)  # type: ignore[union-attr]
    optimiser = build_optimiser(OptimiserSettings(), network)
    frozen = {id(parameter) for parameter in network.encoder.parameters()}  # type: ignore[union-attr]
    assert not any(id(parameter) in frozen for group in optimiser.param_groups for parameter in group["params"])


def test_the_average_follows_its_definition_under_all_names() -> None:
    network = build_network("resenc-xs", dimensions=2, seed=0)
    ema = AveragedWeights(network, 0.9)
    expected = {name: value.clone() for name, value in network.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(1.0)
        ema.update(network)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in network.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    state = ema.state_of(network)
    assert list(state) == list(network.state_dict())
    for name, value in expected.items():
        assert torch.allclose(state[name], value, atol=1e-6)
    assert torch.equal(
        state["encoder.stem.convs.0.conv.weight"], state["decoder.encoder.stem.convs.0.all_modules.0.weight"]
    )


def test_numbers_that_are_not_finite_stop_a_run_with_cause_and_remedy() -> None:
    check_finite({"loss": 1.0}, 5, 0.1)
    with pytest.raises(TrainingStopped, match=r"contrast became NaN.*up to 7.*learning_rate"):
        check_finite({"loss": 1.0, "contrast": math.nan}, 7, 0.1)


def test_a_collapse_stops_a_run_after_patience_and_not_before() -> None:
    guard = CollapseGuard(GuardSettings(least_std=0.01, patience=2))
    guard.check({"health/feature_std": 0.001}, 1)
    guard.check({"health/feature_std": 0.5}, 2)
    guard.check({"health/feature_std": 0.001, "health/other": 0.0}, 3)
    with pytest.raises(TrainingStopped, match="Collapse: health/feature_std"):
        guard.check({"health/feature_std": math.nan}, 4)
    CollapseGuard(GuardSettings(patience=0)).check({"health/feature_std": 0.0}, 1)


def test_metrics_after_a_kill_hold_each_step_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, {"loss": 1 / step, "odd": math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    with MetricsWriter(tmp_path, 20) as metrics:
        metrics.write(30, {"loss": 5.0})
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 0.1), (20, 0.05), (30, 5.0)]
    assert rows[0]["odd"] is None


def test_tensorboard_reads_the_events_and_forgets_what_a_kill_undid(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, {"loss": float(step)})
        png, size = draw_grid({"a": torch.rand(1, 1, 4, 5)}, (1, 1, 1), "title")
        metrics.picture(10, "pictures", png, size)
    with MetricsWriter(tmp_path, 20) as metrics:
        metrics.write(30, {"loss": 7.0})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 10.0), (20, 20.0), (30, 7.0)]
    assert events.Images("pictures")[0].width == size[0]
    assert not any(socket.gethostname() in path.name for path in (tmp_path / "tensorboard").iterdir())


def test_two_processes_never_write_to_one_run(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from medssl.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])): print('held', flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with run_lock(tmp_path):
        other = subprocess.run(command, capture_output=True, text=True)
    assert other.returncode != 0 and "Another process is writing" in other.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout == "held\n"


def test_random_states_are_put_back_through_a_checkpoint(tmp_path: Path) -> None:
    torch.save(random_state(), tmp_path / "r.pth")
    expected = (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    set_random_state(torch.load(tmp_path / "r.pth", weights_only=True))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


def test_a_window_gives_means_and_does_not_hold_on_to_what_it_was_given() -> None:
    window = Window()
    value = torch.ones(())
    window.add({"loss": value})
    value.fill_(100)
    window.add({"loss": torch.full((), 2.0)})
    assert window.means() == {"loss": 1.5}
    window.clear()
    assert window.means() == {}


def test_resenc_l_is_named_in_the_plan_and_any_other_network_is_described() -> None:
    facts = {"in_channels": 1, "patch_size": (160, 160, 160), "spacing_mm": (1.0, 1.0, 1.0), "modalities": ["MR"]}
    plan = adaptation_plan(architecture("resenc-l", 3), **facts)  # type: ignore[arg-type]
    assert plan["architecture_plans"] == {
        "arch_class_name": "ResEncL",
        "arch_kwargs": None,
        "arch_kwargs_requiring_import": None,
    }
    assert set(plan) == {
        "architecture_plans",
        "pretrain_plan",
        "pretrain_num_input_channels",
        "recommended_downstream_patchsize",
        "key_to_encoder",
        "key_to_stem",
        "keys_to_in_proj",
        "key_to_lpe",
    }
    assert list(plan["pretrain_plan"]["configurations"]) == ["onemmiso"]
    other = adaptation_plan(architecture("resenc-xs", 3), **facts)["architecture_plans"]  # type: ignore[arg-type]
    assert other["arch_class_name"] == "ResidualEncoderUNet"
    assert other["arch_kwargs"]["features_per_stage"] == [16, 32, 48, 64]
    json.dumps(plan)


@pytest.mark.parametrize("name", ["resenc-xs", "plain-unet-s"])
def test_the_plans_keys_point_at_weights(name: str) -> None:
    network = build_network(name, dimensions=3)
    plan = adaptation_plan(
        architecture(name, 3), in_channels=1, patch_size=(8, 8, 16), spacing_mm=None, modalities=["CT"]
    )
    state = network.state_dict()
    assert plan["key_to_encoder"] == network.key_to_encoder
    assert plan["key_to_stem"] == network.key_to_stem
    for key in (plan["key_to_encoder"], plan["key_to_stem"]):
        assert any(entry.startswith(f"{key}.") for entry in state)
    assert all(f"{key}.weight" in state for key in plan["keys_to_in_proj"])
    assert list(plan["pretrain_plan"]["configurations"]) == ["noresample"]


def test_the_environment_names_no_machine_and_no_path() -> None:
    text = json.dumps(describe_environment())
    assert socket.gethostname() not in text
    assert "/" not in text
    assert str(Path.home()) not in text


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(UsageError, match="use auto, cpu or cuda"):
        find_machine("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU"):
            find_machine("cuda")
        assert not find_machine("auto").cuda


def test_pictures_are_the_same_for_the_same_images() -> None:
    images = {"a": torch.rand(2, 1, 6, 7, 8), "b": torch.full((2, 1, 6, 7, 8), float("nan"))}
    first, size = draw_grid(images, (3.0, 1.0, 1.0), "title")
    assert first[:4] == b"\x89PNG" and size[0] > 100
    assert draw_grid(images, (3.0, 1.0, 1.0), "title")[0] == first
