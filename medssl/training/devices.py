"""Devices of a run: which there are, how they are started, and what only the first process does."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from medssl.errors import MedsslError, UsageError

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Machine:
    """What trains.

    Args:
        cuda: Whether on GPUs.
        memory_gib: Memory of one GPU.
        devices: Processes that train together.
    """

    cuda: bool
    memory_gib: float = 0.0
    devices: int = 1


def find_machine(device: str, devices: int = 1) -> Machine:
    """Return what a run trains on.

    Args:
        device: `auto`, `cpu`, `cuda`, or `cuda:N` for one of several GPUs.
        devices: Processes that the recipe asks for; started by torchrun or SLURM, their number wins.

    Raises:
        UsageError: If there is no such device, or there are fewer.
    """
    kind = device.partition(":")[0]
    if kind not in ("auto", "cpu", "cuda"):
        raise UsageError(f"There is no device '{device}': use auto, cpu or cuda.")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and not there:
        raise UsageError("--device cuda: torch finds no GPU here. Use --device cpu, or install a CUDA build of torch.")
    cuda = kind == "cuda" or (kind == "auto" and there > 0)
    devices = int(os.environ.get("WORLD_SIZE", devices)) if "LOCAL_RANK" in os.environ else devices
    here = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
    if cuda and here > there:
        raise UsageError(f"devices: {here} GPUs are asked for on this machine, torch finds {there}.")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else 0.0
    return Machine(cuda, memory, devices)


def launch(machine: Machine, precision: str, device: str = "auto") -> Fabric:
    """Start the processes of a run and return its devices.

    Several devices of one machine are started from here, by running the command again for each; across machines, start
    it with torchrun or srun.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", machine.devices))
    number = device.partition(":")[2]
    fabric = Fabric(
        accelerator="cuda" if machine.cuda else "cpu",
        devices=[int(number)] if machine.cuda and number and machine.devices == 1 else here,
        num_nodes=max(machine.devices // here, 1),
        # Every trained weight takes part in every step; a search for those that do not would cost time.
        strategy=DDPStrategy(find_unused_parameters=False) if machine.devices > 1 else "auto",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    if machine.cuda:
        # Crops have one size, so that the search for the fastest convolution pays; TF32 for what stays in float32.
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    fabric.launch()
    return fabric


def on_main(fabric: Fabric, function: Callable[[], ResultT]) -> ResultT:
    """Call a function in the first process and return its result, or raise its error, in all.

    The result must be plain: text, numbers, paths.
    """
    if fabric.world_size == 1:
        return function()
    result: ResultT | None = None
    error: MedsslError | None = None
    if fabric.is_global_zero:
        try:
            result = function()
        except MedsslError as caught:
            error = caught
    result, error = fabric.broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@contextmanager
def own_random_state(seed: int, cuda: bool) -> Iterator[None]:
    """Seed torch's generators, which layers such as dropout draw from, and put them back at the end."""
    devices = list(range(torch.cuda.device_count())) if cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
