"""The sections of `gpu_pretraining.py`; each runs in a process of its own, so that one that fails takes no other along.

python pipelines/benchmarks/_gpu_sections.py SECTION OPTIONS_AS_JSON
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from _gpu_timing import WARM_UP, host_waits, mean_seconds, synthetic_batch, throughput, wait_for

from medssl.augmentation.policy import policy_for
from medssl.config import check_settings
from medssl.data.draw import Draw
from medssl.networks.build import build_network, freeze_unused_outputs
from medssl.pretraining.bench import clocked
from medssl.pretraining.recipe import recipe_model
from medssl.pretraining.run import build_method
from medssl.registry import method as method_entry
from medssl.training.devices import find_machine, launch
from medssl.training.engine import Engine
from medssl.training.method import Step


def main() -> None:
    """Run one section and print its result as the last line."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(SECTIONS[name](**options)))


def rate(device: str, network: str, patch: int, seconds: float) -> dict[str, Any]:
    """Measure the card's rate of bfloat16 matrix products, and count the work of one sample's step."""
    edge = 8192 if device == "cuda" else 256
    a, b = (torch.randn(edge, edge, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(WARM_UP):
        a @ b
    # The best of several spans: a card that is busy or hot is slower, never faster.
    best = min(mean_seconds(lambda: a @ b, device, seconds / 5) for _ in range(5))
    return {
        "matmul TFLOP/s": 2 * edge**3 / best / 1e12,
        "TFLOP per sample": flops_per_sample(network, patch) / 1e12,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "memory GiB": torch.cuda.get_device_properties(0).total_memory / 2**30 if device == "cuda" else 0.0,
        "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def flops_per_sample(network: str, patch: int) -> int:
    """Count the multiplications and additions of convolutions, forward and backward, without computing them."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = build_network(network, dimensions=3)
        freeze_unused_outputs(model)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 1, patch, patch, patch)).sum().backward()
    return int(counter.get_total_flops())


def step(
    device: str, network: str, patch: int, batch: int, seconds: float, memory_format: str = "auto",
    compile: bool = False, precision: str = "bf16",
) -> dict[str, Any]:  # fmt: skip
    """Time the product's step, masks, losses, clipping and optimiser included, on views that lie on the device."""
    values = {"memory_format": memory_format, "compile": compile, "precision": precision, "batch_size": batch}
    engine = _engine(device, network, patch, values)

    def prepared(samples: int) -> Callable[[], Any]:
        views = engine.views(synthetic_batch(engine.method.policy.read_size, samples, device))
        numbers = itertools.count()
        return lambda: engine.step(Step(next(numbers), engine.settings.steps), iter([views]))

    return {**throughput(prepared, batch, device, seconds), "compiled": engine.compiled}


def real(device: str, network: str, patch: int, batch: int, seconds: float, workers: int, shape: list[int],
         memory_format: str = "auto") -> dict[str, Any]:  # fmt: skip
    """Time steps on real input over steps on views that are there, in turns; tell whether the host ever waits."""
    from _engines import parts_of
    from _synthetic_store import synthetic_store

    overrides = (
        f"network={network}", f"patch_size={[patch] * 3}", f"batch_size={batch}", f"workers={workers}",
        f"memory_format={memory_format}", "compile=false", "steps=1000", *_small_mask(patch),
    )  # fmt: skip
    turns: dict[str, list[float]] = {"fixed": [], "real": []}
    with tempfile.TemporaryDirectory() as scratch:
        store = synthetic_store(Path(scratch) / "store", volumes=8, shape=(shape[0], shape[1], shape[2]))
        with parts_of(store, device, overrides) as parts:
            seen = parts.seen()
            views = itertools.repeat(next(seen))
            for _ in range(WARM_UP):
                parts.step(views)
                parts.step(seen)
            for _ in range(3):
                turns["fixed"].append(mean_seconds(lambda: parts.step(views), device, seconds / 6))
                turns["real"].append(mean_seconds(lambda: parts.step(seen), device, seconds / 6, ahead=3))
            waits = host_waits(lambda: parts.step(seen), device)
            batches = parts.loader.batches(100_000)
            reading = mean_seconds(lambda: next(batches), device, seconds / 6, ahead=3)
    ratios = [b / a for a, b in zip(turns["fixed"], turns["real"], strict=True)]
    return {
        "network": network, "patch": patch, "batch": batch, "workers": workers,
        "fixed ms": 1000 * min(turns["fixed"]), "real ms": 1000 * min(turns["real"]),
        "real / fixed": sorted(ratios)[1], "ratios": ratios, "reading alone ms": 1000 * reading, "host waits": waits,
    }  # fmt: skip


def augmentation(device: str, patch: int, batch: int, seconds: float) -> dict[str, Any]:
    """Time the whole policies of fine-tuning and of contrast, each on batches that lie on the device."""
    arms = itertools.product(("fine-tuning", "contrastive"), ("MR", "CT"))
    return {"rows": [_policy(purpose, modality, device, patch, batch, seconds / 4) for purpose, modality in arms]}


def _policy(purpose: str, modality: str, device: str, patch: int, batch: int, seconds: float) -> dict[str, Any]:
    policy = policy_for(purpose, {modality}, (patch,) * 3)
    source = synthetic_batch(policy.read_size, batch, device, modality=modality, labels=purpose == "fine-tuning")
    views = 2 if purpose == "contrastive" else 1
    make = policy.two if views == 2 else policy.view
    calls = 0

    def once() -> None:
        nonlocal calls
        index = source.sample_index + calls * batch
        make(dataclasses.replace(source, sample_index=index), Draw(0, index))
        calls += 1

    for _ in range(WARM_UP):
        once()
    passed = mean_seconds(once, device, seconds / 2)
    before = calls
    with clocked(policy, lambda: wait_for(device)) as clock:
        mean_seconds(once, device, seconds / 2)
    return {
        "purpose": purpose, "modality": modality, "patch": patch, "batch": batch, "views": views,
        "ms": 1000 * passed,
        "ms by transform": {name: round(1000 * value / (calls - before), 3) for name, value in clock.items()},
        "host waits": host_waits(once, device),
    }  # fmt: skip


def peer(device: str, network: str, patch: int, batch: int, seconds: float, compile: bool = False) -> dict[str, Any]:
    """Time nnU-Net's step on the same network, patch and batch, its loss replaced by the mean squared error.

    Its own `train_step` where nnunetv2 is installed, else the same written down again: float16 autocast with a scaler,
    plain SGD with Nesterov momentum, clipping at 12, weights as they are, and the loss copied to the host each step.
    """
    with torch.random.fork_rng():
        model = build_network(network, dimensions=3, seed=0).to(device)
    freeze_unused_outputs(model)
    if compile:
        model.compile()
    torch.backends.cudnn.benchmark = True
    optimiser = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], 0.01, weight_decay=3e-5, momentum=0.99, nesterov=True
    )
    stub = type("Trainer", (), {})()
    stub.device, stub.network, stub.optimizer, stub.loss = torch.device(device), model, optimiser, F.mse_loss
    stub.grad_scaler = torch.GradScaler("cuda") if device == "cuda" else None
    try:
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

        own, train_step = True, nnUNetTrainer.train_step
    except ImportError:
        own, train_step = False, _train_step

    def prepared(samples: int) -> Callable[[], Any]:
        image = torch.randn(samples, 1, patch, patch, patch, device=device)
        return lambda: train_step(stub, {"data": image, "target": image})

    return {
        **throughput(prepared, batch, device, seconds),
        "compiled": compile,
        "code": "nnU-Net's own train_step" if own else "nnU-Net's train_step, written down again",
    }


def _train_step(trainer: Any, batch: dict[str, Tensor]) -> Any:
    """Take one step as nnU-Net 2.8.1 does."""
    data = batch["data"].to(trainer.device, non_blocking=True)
    target = batch["target"].to(trainer.device, non_blocking=True)
    trainer.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(trainer.device.type, enabled=trainer.device.type == "cuda"):
        loss = trainer.loss(trainer.network(data), target)
    if trainer.grad_scaler is None:
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
        trainer.optimizer.step()
    else:
        trainer.grad_scaler.scale(loss).backward()
        trainer.grad_scaler.unscale_(trainer.optimizer)
        nn.utils.clip_grad_norm_(trainer.network.parameters(), 12)
        trainer.grad_scaler.step(trainer.optimizer)
        trainer.grad_scaler.update()
    return loss.detach().cpu().numpy()


def _engine(device: str, network: str, patch: int, values: dict[str, Any]) -> Engine:
    """Return the product's engine without a store."""
    given = {"network": network, "patch_size": [patch] * 3, "steps": 1000, **values}
    if _small_mask(patch):
        given["mask"] = {"block": 4}
    settings = check_settings(recipe_model("mae"), given, "benchmark")
    fabric = launch(find_machine(device), settings.precision, device)
    policy = policy_for("reconstruction", {"MR"}, settings.patch_size)
    engine = Engine(build_method(method_entry("mae").load(), settings, policy, 1), settings, fabric)
    engine.start()
    return engine


def _small_mask(patch: int) -> tuple[str, ...]:
    return ("mask.block=4",) if patch < 64 else ()


SECTIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "rate": rate, "step": step, "real": real, "augmentation": augmentation, "peer": peer,
}  # fmt: skip

if __name__ == "__main__":
    main()
