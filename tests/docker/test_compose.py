"""The compose file: the keys that seal a service, its limits, and its mounts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from medssl.cli import app
from medssl.doctor import SMALL_SHARED_MEMORY_MB

FOLDER = Path(__file__).resolve().parents[2] / "docker"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
# What the Compose specification knows of a service, as far as it is used here.
KNOWN = {
    "build", "cap_drop", "command", "cpus", "deploy", "environment", "image", "logging", "mem_limit", "memswap_limit",
    "network_mode", "pids_limit", "profiles", "read_only", "restart", "security_opt", "shm_size", "stop_grace_period",
    "tmpfs", "user", "volumes",
}  # fmt: skip
each_service = pytest.mark.parametrize("name", SERVICES)


@each_service
def test_a_service_cannot_write_call_out_or_gain_rights(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["network_mode"] == "none"
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert not {"privileged", "cap_add", "ports", "pid", "ipc", "devices", "network"} & set(service)


@each_service
def test_a_service_has_limits_and_time_to_save(name: str) -> None:
    service = SERVICES[name]
    assert {"mem_limit", "memswap_limit", "cpus"} <= set(service)
    assert 128 <= service["pids_limit"] <= 4096
    assert int(service["stop_grace_period"].removesuffix("s")) >= 30
    assert int(service["shm_size"].removesuffix("m")) < SMALL_SHARED_MEMORY_MB


@each_service
def test_a_service_has_one_writable_mount_beside_tmp(name: str) -> None:
    service = SERVICES[name]
    assert [entry.split(":")[0] for entry in service["tmpfs"]] == ["/tmp"]
    writable = [volume for volume in service["volumes"] if not volume.get("read_only")]
    assert len(writable) == 1 and writable[0]["target"] in ("/output", "/runs")
    assert all(volume["bind"]["create_host_path"] is False for volume in service["volumes"])


@each_service
def test_the_user_is_a_number_that_is_not_root_by_default(name: str) -> None:
    numbers = re.fullmatch(r"\$\{MEDSSL_UID:-(\d+)\}:\$\{MEDSSL_GID:-(\d+)\}", SERVICES[name]["user"])
    assert numbers and all(int(number) > 0 for number in numbers.groups())


@each_service
def test_a_gpu_is_reserved_where_the_image_is_for_one(name: str) -> None:
    service = SERVICES[name]
    reserved = "deploy" in service
    assert reserved == (service["build"]["target"] == "cuda") == (service["image"] == "medssl:cuda")
    if reserved:
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@each_service
def test_a_service_is_built_from_the_repository_by_known_keys(name: str) -> None:
    service = SERVICES[name]
    assert set(service) <= KNOWN
    assert (FOLDER / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == FOLDER / "Dockerfile"


@each_service
def test_its_command_is_a_verb_with_options_that_exist(name: str) -> None:
    import typer

    verb, *arguments = SERVICES[name]["command"]
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {argument for argument in arguments if argument.startswith("--")} <= known
    targets = {volume["target"] for volume in SERVICES[name]["volumes"]}
    paths = [argument for argument in arguments if argument.startswith("/")]
    assert all(any(path.startswith(target) for target in targets) for path in paths)


def test_the_health_check_gets_the_mounted_model_and_its_hash() -> None:
    environment = SERVICES["predict"]["environment"]
    assert environment["MEDSSL_MODEL"] in {volume["target"] for volume in SERVICES["predict"]["volumes"]}
    assert environment["MEDSSL_MODEL_SHA256"].startswith("${")
