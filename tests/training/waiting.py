"""A device that is not there: the `meta` device, and a mode that says where a GPU would make the host wait.

Shapes and kinds of operations are those of a GPU; values are not there, so whoever wants to look at one fails.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

META = torch.device("meta")
_GENERATOR, _AUTOCAST = torch.Generator, torch.autocast
# Their result has a size that only the device knows.
_SIZES = {"nonzero", "masked_select", "unique", "unique_consecutive", "argwhere", "bincount"}
# They bring a value to the host.
_VALUES = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "cpu", "equal", "allclose"}
_FACTORIES = {"tensor", "as_tensor", "from_numpy"}


class HostWaits(AssertionError):
    """The host would wait for the device."""


class NoWaiting(TorchFunctionMode):
    """Fails on what makes the host wait for a GPU, taking `meta` for the GPU.

    Attributes:
        moving: Depth of calls that may bring parameters to the device: they use page-locked memory there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moving = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        first = args[0] if args else None
        on_device = isinstance(first, Tensor) and first.device == META
        if on_device and (name in _SIZES or name in _VALUES or (name == "where" and len(args) == 1)):
            raise HostWaits(f"{name} of a tensor on the device")
        if name in ("__getitem__", "__setitem__") and on_device:
            self._check_index(args[1], writes=name == "__setitem__")
        if name == "repeat_interleave" and on_device and any(isinstance(a, Tensor) for a in args[1:]):
            raise HostWaits("repeat_interleave by numbers that only the device knows")
        if isinstance(kwargs.get("generator"), _GENERATOR):
            # A generator of the device, which stood in as one of the CPU.
            del kwargs["generator"]
        result = func(*args, **kwargs)
        arrives = isinstance(result, Tensor) and result.device == META
        comes_from_host = isinstance(first, Tensor) and first.device != META
        if arrives and not self.moving:
            if name in ("to", "copy_", "type", "type_as") and comes_from_host:
                raise HostWaits(f"{name} of pageable memory to the device: use to_device")
            if name in _FACTORIES:
                raise HostWaits(f"{name} of Python's numbers on the device: use to_device")
        if name == "copy_" and on_device and len(args) > 1 and isinstance(args[1], Tensor) and args[1].device != META:
            raise HostWaits("copy_ of pageable memory to the device: use to_device")
        return result

    def _check_index(self, index: Any, *, writes: bool) -> None:
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, list) or (isinstance(part, Tensor) and part.ndim > 0 and part.device != META):
                raise HostWaits("an index from the host is copied to the device")
            if isinstance(part, Tensor) and part.dtype == torch.bool and not writes:
                raise HostWaits("the number of voxels that a mask chooses is only known to the device")


@contextmanager
def no_waiting(monkeypatch: Any) -> Iterator[NoWaiting]:
    """Fail where a GPU would make the host wait; `to_device` may move parameters."""
    mode = NoWaiting()

    def allowed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            mode.moving += 1
            try:
                return function(*arguments, **named)
            finally:
                mode.moving -= 1

        return call

    for name, module in list(sys.modules.items()):
        if name.startswith("medssl.") and callable(getattr(module, "to_device", None)):
            monkeypatch.setattr(module, "to_device", allowed(module.to_device))
    monkeypatch.setattr(torch, "Generator", lambda device=None: _GENERATOR())
    # There is no autocast of a device without numbers.
    monkeypatch.setattr(torch, "autocast", lambda kind, **named: _AUTOCAST("cpu" if kind == "meta" else kind, **named))
    with mode:
        yield mode
