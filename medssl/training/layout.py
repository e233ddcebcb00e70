"""How weights and images lie in memory, and whether the network's forward is compiled; a checkpoint shows neither."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medssl.data.batch import Views

logger = logging.getLogger(__name__)

#: By number of axes: batch, channels, and two or three of space.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor with its channels side by side in memory; one without space as it is."""
    memory_format = CHANNELS_LAST.get(tensor.ndim)
    return tensor if memory_format is None else tensor.contiguous(memory_format=memory_format)


def lay_out_weights(module: nn.Module) -> None:
    """Put the weights of convolutions into the order that `channels_last` gives; their values stay."""
    for parameter in module.parameters():
        parameter.data = channels_last(parameter.data)


def lay_out_views(views: Views) -> None:
    """Put images and targets of views into the order that `channels_last` gives; what was one tensor stays one."""
    for view in views:
        image = channels_last(view.image)
        if view.target is not None:
            view.target = image if view.target is view.image else channels_last(view.target)
        view.image = image


def contiguous_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as a checkpoint holds them: in the plain order, and those of two names still as one tensor."""
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: copies.setdefault((value.data_ptr(), value.shape), value.detach().contiguous())
        for name, value in weights.items()
    }


def compile_network(network: nn.Module) -> None:
    """Let the forward of a network, and that of its encoder alone, be compiled when they are first called.

    In place: names of weights stay as they are. Crops have one size, so a program for any size is not looked for.
    """
    for part in compiled_parts(network):
        part.compile(dynamic=False)


def give_up_compiling(network: nn.Module, error: BaseException) -> None:
    """Go back to the plain forward, and say why."""
    # torch wraps what the compiler said.
    cause = getattr(error, "inner_exception", error)
    said = f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}"
    logger.warning("The network cannot be compiled here (%s) and goes on as it is; set compile=false.", said)
    for part in compiled_parts(network):
        part._compiled_call_impl = None


def compiled_parts(network: nn.Module) -> list[nn.Module]:
    """Return what methods call: the whole network, and its encoder where it has one."""
    encoder = getattr(network, "encoder", None)
    return [network, encoder] if isinstance(encoder, nn.Module) else [network]
