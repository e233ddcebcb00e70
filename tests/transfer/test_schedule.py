"""Learning rates rise, fall and stand still where the schedule says."""

from __future__ import annotations

import pytest

from medssl.errors import UsageError
from medssl.networks.build import build_network
from medssl.transfer.schedule import NAMES, Schedule, choose_optimiser, default_rate, depths_of, group_of

DEPTHS = {"stem": 3, "stage_0": 2, "stage_1": 1, "decoder": 0}


def _curve(schedule: Schedule, group: str) -> list[float]:
    return [schedule.rates(step, DEPTHS)[group] for step in range(schedule.steps)]


def test_warmup_rises_linearly_to_the_peak_and_decays_by_poly() -> None:
    curve = _curve(Schedule("warmup", 1e-3, 100), "decoder")
    assert curve[:10] == pytest.approx([1e-4 * (step + 1) for step in range(10)])
    assert curve[10] == pytest.approx(1e-3)
    assert curve[55] == pytest.approx(1e-3 * 0.5**0.9)
    assert curve[10:] == sorted(curve[10:], reverse=True) and curve[-1] > 0
    assert curve == _curve(Schedule("warmup", 1e-3, 100), "stem")


def test_sawtooth_moves_the_decoder_alone_first_and_then_everything_from_a_small_rate() -> None:
    schedule = Schedule("sawtooth", 1e-2, 100)
    encoder, decoder = _curve(schedule, "stage_0"), _curve(schedule, "decoder")
    assert encoder[:20] == [0.0] * 20 and all(rate > 0 for rate in encoder[20:])
    assert max(decoder[:20]) == pytest.approx(1e-2) and decoder.index(max(decoder[:20])) == 9
    assert decoder[19] < 2e-3
    assert decoder[20:] == encoder[20:]
    assert encoder[20] == pytest.approx(1e-3) and max(encoder) == pytest.approx(1e-2)


def test_frozen_lets_the_encoder_go_later_and_never_resets_the_decoder() -> None:
    schedule = Schedule("frozen", 1e-2, 100, frozen_fraction=0.5)
    encoder, decoder = _curve(schedule, "stem"), _curve(schedule, "decoder")
    assert encoder[:50] == [0.0] * 50
    assert encoder[50] == pytest.approx(decoder[50] / 10)
    assert encoder[60:] == decoder[60:]
    assert decoder[10:] == sorted(decoder[10:], reverse=True)
    assert [schedule.encoder_stands_still(step) for step in (0, 49, 50)] == [True, True, False]


def test_poly_is_nnunets_and_constant_is_constant() -> None:
    assert _curve(Schedule("poly", 1e-2, 10), "decoder") == pytest.approx(
        [1e-2 * (1 - step / 10) ** 0.9 for step in range(10)]
    )
    assert _curve(Schedule("constant", 1e-2, 10), "stem") == [1e-2] * 10


def test_layer_decay_slows_the_layers_far_from_the_output() -> None:
    rates = Schedule("constant", 1.0, 10, layer_decay=0.5).rates(0, DEPTHS)
    assert rates == {"stem": 0.125, "stage_0": 0.25, "stage_1": 0.5, "decoder": 1.0}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_shortest_runs_have_rates_too(name: str, steps: int) -> None:
    schedule = Schedule(name, 1e-2, steps)
    rates = [schedule.rates(step, DEPTHS)["decoder"] for step in range(steps)]
    assert all(0 < rate <= 1e-2 * (1 + 1e-9) for rate in rates)


@pytest.mark.parametrize("network", ["resenc-xs", "plain-unet-s"])
def test_each_parameter_belongs_to_a_level_of_the_network(network: str) -> None:
    unet = build_network(network, dimensions=2)
    depths = depths_of(unet)
    assert {group_of(name) for name, _ in unet.named_parameters()} == set(depths)
    levels = sorted(depths, key=lambda group: depths[group])
    stages = [f"stage_{number}" for number in (3, 2, 1, 0)]
    assert levels == ["decoder", *stages, *(["stem"] if network == "resenc-xs" else [])]


def test_settings_that_make_no_schedule_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no schedule named 'warm'.*Did you mean warmup"):
        Schedule("warm", 1e-3, 10)
    with pytest.raises(UsageError, match="learning_rate must be positive"):
        Schedule("poly", 0.0, 10)
    with pytest.raises(UsageError, match="layer_decay"):
        Schedule("poly", 0.1, 10, layer_decay=1.5)


def test_short_runs_take_adamw_and_long_ones_sgd() -> None:
    assert choose_optimiser("auto", 200) == "adamw"
    assert choose_optimiser("auto", 250_000) == "sgd"
    assert choose_optimiser("sgd", 200) == "sgd"
    assert default_rate("sgd", pretrained=True) == default_rate("sgd", pretrained=False) / 10
    with pytest.raises(UsageError, match="Did you mean adamw"):
        choose_optimiser("adam", 200)
