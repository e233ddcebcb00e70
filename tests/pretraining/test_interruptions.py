"""Real kills, real signals, real ranks: each run is a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from medssl.training.checkpoint import find_checkpoint, load_checkpoint
from medssl.training.metrics import read_metrics

pytestmark = pytest.mark.slow

STEPS = 12
SETTINGS = {
    "patch_size": "[16,16,16]",
    "batch_size": "4",
    # AdamW divides by the size of a gradient: where that is tiny, two ranks' rounding would decide its sign.
    "optimiser.name": "sgd",
    "mask.block": "4",
    "log_every": "1",
    "save_every": "3",
    "health_every": "100",
    "validate_every": "0",
    "pictures_every": "0",
}


def command(store: Path, out: Path, *more: str, **settings: str) -> list[str]:
    """Return the command line of a pretraining."""
    line = [
        sys.executable,
        "-c",
        "from medssl.cli import main; main()",
        "pretrain",
        "--store",
        str(store),
        "--out",
        str(out),
    ]
    line += ["--device", "cpu", "--quiet", *more]
    if "--resume" not in more:
        line += ["--method", "mae", "--steps", str(STEPS)]
        line += [part for name, value in {**SETTINGS, **settings}.items() for part in ("--set", f"{name}={value}")]
    return line


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def finish(line: list[str]) -> None:
    """Run a command to its end and show what it said if it failed."""
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def interrupt(line: list[str], out: Path, step: int, number: int) -> subprocess.Popen[str]:
    """Start a command, send it a signal once it has done `step` steps, and wait for its end."""
    process = subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        rows = read_metrics(out)
        if rows and rows[-1]["step"] >= step:
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    process.send_signal(number)
    process.wait(timeout=100)
    return process


def same_weights(first: Path, second: Path) -> bool:
    a, b = (load_checkpoint(find_checkpoint(run))["network_weights"] for run in (first, second))
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, without workers."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(command(store, out, "--workers", "0"))
    return out


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("step", [2, 8])
def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(
    store: Path, whole: Path, tmp_path: Path, workers: str, step: int
) -> None:
    out = tmp_path / "run"
    killed = interrupt(command(store, out, "--workers", workers), out, step, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    finish(command(store, out, "--resume", "--workers", workers))
    assert same_weights(out, whole)
    assert [row["step"] for row in read_metrics(out)] == list(range(1, STEPS + 1))


def test_sigterm_saves_ends_with_143_and_the_run_goes_on(store: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped = interrupt(command(store, out, "--workers", "2", save_every="1000"), out, 4, signal.SIGTERM)
    assert stopped.returncode == 143
    assert stopped.stderr is not None and "--resume" in stopped.stderr.read()
    content = load_checkpoint(find_checkpoint(out))
    assert 4 <= content["medssl"]["step"] < STEPS
    finish(command(store, out, "--resume", "--workers", "0"))
    assert same_weights(out, whole)


def test_two_ranks_equal_one_process(store: Path, whole: Path, tmp_path: Path) -> None:
    line = command(store, tmp_path / "run", "--workers", "0")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    finish([*launcher, *line])
    one, two = (load_checkpoint(find_checkpoint(run)) for run in (whole, tmp_path / "run"))
    assert two["medssl"]["recipe"]["devices"] == 2
    for name, value in one["network_weights"].items():
        assert torch.allclose(value, two["network_weights"][name], atol=2e-4), name
    losses = [[row["loss"] for row in read_metrics(run)] for run in (whole, tmp_path / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_two_ranks_agree_on_a_signal_that_only_one_got(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    # A signal to one rank alone: sent from inside it, since only it knows its rank.
    program = tmp_path / "rank.py"
    program.write_text(
        "import os, signal, sys, threading, time\n"
        "from medssl.training.metrics import read_metrics\n"
        "from pathlib import Path\n"
        "out = Path(sys.argv[1])\n"
        "def send():\n"
        "    while not (read_metrics(out) and read_metrics(out)[-1]['step'] >= 3): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "if os.environ['RANK'] == '1': threading.Thread(target=send, daemon=True).start()\n"
        "sys.argv = ['medssl', *sys.argv[2:]]\n"
        "from medssl.cli import main\n"
        "main()\n"
    )
    line = command(store, out, "--workers", "0", save_every="1000")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(program), str(out), *line[3:]], env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0
    assert "exitcode  : 143" in done.stderr, done.stderr
    assert 3 <= load_checkpoint(find_checkpoint(out))["medssl"]["step"] < STEPS


@pytest.mark.parametrize("launcher", ["own", "none"])
def test_the_other_rank_ends_with_an_error_when_one_is_killed(store: Path, tmp_path: Path, launcher: str) -> None:
    out = tmp_path / "run"
    line = command(store, out, "--workers", "0", save_every="1000000")
    line[line.index("--steps") + 1] = "100000"
    line[1:3] = ["-m", "medssl"]
    if launcher == "own":
        processes = [subprocess.Popen([*line, "--set", "devices=2"], env=environment(), stderr=subprocess.DEVNULL)]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        shared |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
        processes = [
            subprocess.Popen(
                line, env={**environment(), **shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.DEVNULL
            )
            for rank in "01"
        ]
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not read_metrics(out):
            assert processes[0].poll() is None
            time.sleep(0.05)
        second = processes[1].pid if launcher == "none" else psutil.Process(processes[0].pid).children()[0].pid
        os.kill(second, signal.SIGKILL)
        assert processes[0].wait(timeout=30) != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


GATHER = """
import torch, torch.distributed as dist
from medssl.training.distributed import gather, mean_across_ranks, rank
dist.init_process_group("gloo")
generator = torch.Generator().manual_seed(0)
everything = torch.randn(6, 3, generator=generator, dtype=torch.float64)
matrix = torch.randn(3, 3, generator=generator, dtype=torch.float64)
def loss_of(weight, rows): return (torch.tanh(rows @ weight) @ torch.tanh(rows @ weight).T).logsumexp(dim=1).mean()
alone = matrix.clone().requires_grad_()
loss_of(alone, everything).backward()
ours = matrix.clone().requires_grad_()
mine = everything[rank()::2]
rows = gather(torch.tanh(mine @ ours))
assert torch.allclose(rows, torch.tanh(everything @ matrix))
(rows @ rows.T).logsumexp(dim=1).mean().backward()
assert torch.allclose(mean_across_ranks(ours.grad), alone.grad)
assert mean_across_ranks(torch.tensor(float(rank()))) == 0.5
dist.destroy_process_group()
"""


def test_rows_gathered_from_two_ranks_give_the_gradient_of_one_process(tmp_path: Path) -> None:
    program = tmp_path / "gather.py"
    program.write_text(GATHER)
    finish([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)])
