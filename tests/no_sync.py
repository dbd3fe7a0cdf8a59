"""A context manager that fails on anything that would make the host wait for the device."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Operators that hand a value to Python or whose output's shape depends on values.
SYNCING_PACKETS = {
    aten._local_scalar_dense,  # .item(), bool(), int(), float(), use as an index or a slice bound
    aten.equal,
    aten.allclose,
    aten.is_nonzero,
    aten.nonzero,
    aten.argwhere,
    aten.masked_select,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._unique,
    aten._unique2,
    aten.bincount,
}
INDEXING_PACKETS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
COPYING_PACKETS = {aten._to_copy, aten.copy_, aten.copy}

# Methods that the dispatcher does not see, some of them only where the tensor is on the CPU.
SYNCING_METHODS = {
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.cpu,
    torch.Tensor.__repr__,
}


# Functions that copy Python's numbers to the device that they are given, and wait for it. The
# dispatcher does not see them either.
UPLOADING_FUNCTIONS = {torch.tensor, torch.as_tensor, torch.asarray}


class HostSyncError(AssertionError):
    """Raised at the offending call, so that the traceback names its line."""


class ForbidHostSync:
    """Raise `HostSyncError` on host syncs while the context is open.

    Caught on any device: `.item()` and what calls it, `.tolist()`, `.numpy()`, `.cpu()`, `repr`,
    indexing with a bool mask (read or written), outputs shaped by values, copies from `device` to
    any other, and copies of numbers or tensors to it that wait. Copies of tensors show only where
    `device` is not the CPU: "meta" stands in for a device where none is. On CUDA torch's own sync
    debug mode is set to "error" as well. Not caught: `torch.cuda.synchronize()` and waiting on
    events.

    Args:
        device: what must not be left.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._modes = (_ForbidMethods(self.device), _ForbidOperators(self.device))

    def __enter__(self) -> ForbidHostSync:
        for mode in self._modes:
            mode.__enter__()
        if self.device.type == "cuda":
            self._debug_mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode(self._debug_mode)
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, traceback)


class DispatchModeInside(TorchDispatchMode):
    """A mode that also sees the operators inside our custom operators, which hide theirs.

    Those of a sharded tensor it does not handle: torch then runs them on the shards, and shows them
    to the mode again.
    """

    def call(self, operator: Any, args: Any, kwargs: Any) -> Any:
        if operator.namespace != "recap_fast":
            return operator(*args, **kwargs)
        implementation = OPDEFS[operator._schema.name]._init_fn
        with self, torch.no_grad():
            return implementation(*args, **kwargs)


class _ForbidMethods(TorchFunctionMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in SYNCING_METHODS:
            raise HostSyncError(f"Tensor.{function.__name__} waits for the device")
        target = None
        if function is torch.Tensor.new_tensor:
            target = args[0].device
        elif function in UPLOADING_FUNCTIONS and not isinstance(args[0], torch.Tensor):
            target = (kwargs or {}).get("device")
        if target is not None and torch.device(target).type == self.device.type:
            raise HostSyncError(f"{function.__name__} copies numbers to {target} and waits for it")
        return function(*args, **(kwargs or {}))


class _ForbidOperators(DispatchModeInside):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        kwargs = kwargs or {}
        packet = operator.overloadpacket
        if packet in SYNCING_PACKETS:
            raise HostSyncError(f"{operator} waits for the device")
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            raise HostSyncError(f"{operator} without output_size waits for the device")
        if packet in INDEXING_PACKETS and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise HostSyncError(f"{operator} with a bool mask waits for the device")
        if packet in COPYING_PACKETS:
            self._check_copy(operator, args, kwargs)
        return self.call(operator, args, kwargs)

    def _check_copy(self, operator: Any, args: Any, kwargs: Any) -> None:
        if operator.overloadpacket is aten._to_copy:
            source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
            waits = not kwargs.get("non_blocking")
        else:
            source, target = args[1].device, args[0].device
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))
        kinds = (source.type, target.type)
        if kinds[0] == kinds[1] or self.device.type not in kinds:
            return
        if kinds[0] == self.device.type:
            raise HostSyncError(f"{operator} copies from {source} to {target}")
        if waits:
            raise HostSyncError(f"{operator} copies from {source} to {target} and waits for it")
