"""Two processes that compute a loss together."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

Loss = Callable[..., Tensor | dict[str, Tensor]]
TwoRanks = Callable[..., None]


def _total(loss: Tensor | dict[str, Tensor]) -> Tensor:
    return torch.stack(list(loss.values())).sum() if isinstance(loss, dict) else loss


def _serve(rank: int, meeting: str, pipe: Connection) -> None:
    """Answer with this rank's loss and gradients until None is asked for."""
    from medssl.training.distributed import gather

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    while (work := pipe.recv()) is not None:
        module, name, tensors, keywords = work
        mine = [tensor[rank::2].clone().requires_grad_() for tensor in tensors]
        loss = _total(getattr(importlib.import_module(module), name)(*map(gather, mine), **keywords))
        loss.backward()
        pipe.send((loss.item(), [tensor.grad for tensor in mine]))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Connection]]:
    """Pipes to two gloo processes that wait for work."""
    context = mp.get_context("spawn")
    meeting = (tmp_path_factory.mktemp("meeting") / "file").as_uri()
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, meeting, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    yield pipes
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(timeout=20)


@pytest.fixture
def two_ranks(ranks: list[Connection]) -> TwoRanks:
    """Check that two ranks that gather their rows get the loss and the averaged gradients of one process.

    Called as `two_ranks(loss, *batches, **keywords)`: `loss` is a function at the top of a module of `medssl` that
    returns a scalar, or terms that are summed; `batches` are (B, ...) float tensors with an even number of rows.
    """

    def check(loss: Loss, *tensors: Tensor, tolerance: float = 1e-5, **keywords: Any) -> None:
        alone = [tensor.clone().requires_grad_() for tensor in tensors]
        expected = _total(loss(*alone, **keywords))
        expected.backward()
        for pipe in ranks:
            pipe.send((loss.__module__, loss.__name__, [tensor.detach() for tensor in tensors], keywords))
        for rank, pipe in enumerate(ranks):
            assert pipe.poll(60), f"rank {rank} does not answer"
            value, gradients = pipe.recv()
            assert value == pytest.approx(expected.item(), rel=tolerance, abs=tolerance)
            for gradient, whole in zip(gradients, alone, strict=True):
                assert whole.grad is not None
                # DDP averages over ranks what each rank's backward has summed over them.
                torch.testing.assert_close(gradient / 2, whole.grad[rank::2], rtol=tolerance, atol=tolerance)

    return check
