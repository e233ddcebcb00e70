"""The Dockerfile, as far as it can be judged unbuilt; `pipelines/benchmarks/container.py` builds and runs it."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TARGETS = ("cpu", "cuda")
Instruction = tuple[str, str]


def stages() -> dict[str, list[Instruction]]:
    """Return the instructions of each stage, those of the stages it starts from first."""
    text = re.sub(r"^\s*#.*\n", "", (REPOSITORY / "docker" / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: dict[str, list[Instruction]] = {}
    name = ""
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            source, _, name = rest.split()
            found[name] = list(found.get(source, [("FROM", source)]))
        else:
            found[name].append((instruction, rest.strip()))
    return found


def last(target: str, instruction: str) -> str:
    """Return the value of the last instruction of its kind: the one that counts."""
    return [rest for name, rest in stages()[target] if name == instruction][-1]


def variables(target: str) -> dict[str, str]:
    """Return the environment of a target."""
    pairs = (pair for name, rest in stages()[target] if name == "ENV" for pair in shlex.split(rest))
    return dict(pair.split("=", 1) for pair in pairs)


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_a_number_that_is_not_root(target: str) -> None:
    user, group = last(target, "USER").split(":")
    assert int(user) > 0 and int(group) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_signals_reach_medssl_without_a_shell_between(target: str) -> None:
    assert json.loads(last(target, "ENTRYPOINT")) == ["tini", "--", "medssl"]
    assert isinstance(json.loads(last(target, "CMD")), list)


@pytest.mark.parametrize("target", TARGETS)
def test_the_doctor_tells_whether_the_container_is_healthy(target: str) -> None:
    options, _, command = last(target, "HEALTHCHECK").partition("CMD ")
    assert json.loads(command) == ["medssl", "doctor"]
    assert {"--interval", "--timeout", "--start-period"} <= {option.split("=")[0] for option in options.split()}


@pytest.mark.parametrize("target", TARGETS)
def test_every_cache_is_below_tmp_and_there_is_a_name_for_the_user(target: str) -> None:
    found = variables(target)
    assert found["USER"] and found["LOGNAME"]
    caches = [
        name for name in found if name.endswith(("_HOME", "CACHE_DIR", "CONFIGDIR")) and name != "XDG_CONFIG_HOME"
    ]
    assert len(caches) >= 6
    assert {name for name in (*caches, "HOME", "CUDA_CACHE_PATH") if not found[name].startswith("/tmp")} == set()


@pytest.mark.parametrize("target", TARGETS)
def test_the_key_of_pseudonyms_is_not_looked_for_where_it_would_be_lost(target: str) -> None:
    assert not variables(target)["XDG_CONFIG_HOME"].startswith("/tmp")


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_reported_to_anybody(target: str) -> None:
    found = variables(target)
    assert (found["DO_NOT_TRACK"], found["HF_HUB_OFFLINE"], found["nnUNet_wandb_enabled"]) == ("1", "1", "0")


def test_the_two_targets_share_all_but_what_concerns_the_device() -> None:
    cpu, cuda = (stages()[target] for target in TARGETS)
    shared = stages()["runtime"]
    assert cpu[: len(shared)] == cuda[: len(shared)] == shared
    assert variables("cuda")["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {name for name, _ in (*cpu[len(shared) :], *cuda[len(shared) :])} <= {"LABEL", "ENV", "RUN"}


def test_the_lock_decides_the_versions_of_the_packages() -> None:
    install = next(rest for name, rest in stages()["packages"] if name == "RUN" and "--requirement" in rest)
    assert "--constraint requirements.lock" in install
    locked = (REPOSITORY / "requirements.lock").read_text().lower().replace("_", "-").splitlines()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=\[]", line)[0].lower() for line in project["dependencies"]}
    assert needed <= {line.split("==")[0] for line in locked}


def test_no_layer_holds_a_secret_or_names_a_host() -> None:
    for name in ("docker/Dockerfile", "docker/compose.yaml", ".dockerignore", ".ci/container"):
        text = (REPOSITORY / name).read_text()
        assert not re.search(r"https?://|password|token", text, flags=re.IGNORECASE), name


def test_the_build_sees_what_the_dockerfile_copies_and_nothing_else() -> None:
    lines = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for name, rest in (pair for instructions in stages().values() for pair in instructions):
        if name == "COPY" and not rest.startswith("--from"):
            copied |= set(rest.split()[:-1])
    assert sent == copied
    assert all((REPOSITORY / path).exists() for path in sent)
