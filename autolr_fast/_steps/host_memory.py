"""Where snapshots are kept: beside the parameters, or in pinned host memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .._ops.copies import Copies

__all__ = ["Away", "Back", "DeviceMemory", "HostMemory", "Kept", "Memory", "here", "memory_for", "saved"]


class Memory(Protocol):
    """Keeps values of tensors."""

    def put(self, tensors: Sequence[Tensor]) -> list[Kept]:
        """Return what tensors hold now; :func:`here` and :func:`saved` read it."""


class DeviceMemory:
    """Keeps copies where the tensors are."""

    def put(self, tensors: Sequence[Tensor]) -> list[Kept]:
        """Return what tensors hold now; see :class:`Memory`."""
        return [*Copies(tensors).values]


class HostMemory:
    """Keeps copies of tensors on GPUs in pinned host memory; a GPU has them no more once they are there.

    Each GPU copies on a stream of its own. That stream first waits for the current one, where the values come from.
    Then the current stream waits for the copies: the optimizer's kernels, which come next, overwrite no parameter
    that was not read yet. The host waits for neither. Pinned memory that is dropped is not given out again before
    the copies to and from it are done: torch's allocator sees to that, since it knows the streams of both.

    Tensors on the CPU, and tensors of a class of their own, are copied where they are.

    Args:
        gpu: what streams and copies are; by default the real ones.
    """

    def __init__(self, gpu: Gpu | None = None):
        self._gpu = gpu or Gpu()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def put(self, tensors: Sequence[Tensor]) -> list[Kept]:
        """Return what tensors hold now; see :class:`Memory`."""
        kept: dict[int, Kept] = {}
        groups: dict[torch.device, list[int]] = defaultdict(list)
        others: list[int] = []
        for index, tensor in enumerate(tensors):
            is_plain = type(tensor) is Tensor  # others know themselves how they are copied
            (groups[tensor.device] if is_plain and self.serves(tensor.device) else others).append(index)
        kept.update(zip(others, Copies([tensors[index] for index in others]).values, strict=True))
        for device, indices in groups.items():
            values = [self._gpu.pinned_like(tensors[index]) for index in indices]
            stream, current = self._stream(device), self._gpu.current_stream(device)
            stream.wait_stream(current)
            for index, value in zip(indices, values, strict=True):
                self._gpu.copy_out(tensors[index], value, stream)
            done = stream.record_event()
            current.wait_event(done)
            kept.update(
                (index, Away(value, device, done, self._gpu)) for index, value in zip(indices, values, strict=True)
            )
        return [kept[index] for index in range(len(tensors))]

    def serves(self, device: torch.device) -> bool:
        """Whether what is on a device is kept in host memory."""
        return self._gpu.is_one(device)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = self._gpu.new_stream(device)
        return self._streams[device]


class Away:
    """A tensor in pinned host memory, or on its way there.

    Args:
        value: the pinned tensor.
        device: where the tensor that was copied is.
        done: recorded after the copy.
        gpu: what streams and copies are.

    Attributes:
        shape: of the tensor that was copied, as are the next two.
        dtype: its.
        device: its.
    """

    def __init__(self, value: Tensor, device: torch.device, done: torch.cuda.Event, gpu: Gpu):
        self.shape, self.dtype, self.device = value.shape, value.dtype, device
        self._value, self._done, self._gpu = value, done, gpu

    def here(self) -> Tensor:
        """Return a copy on the device, for its current stream; the host does not wait."""
        stream = self._gpu.current_stream(self.device)
        stream.wait_event(self._done)
        return self._gpu.copy_back(self._value, self.device)

    def saved(self) -> Tensor:
        """Return a copy on the CPU that is not pinned; the host waits for it."""
        self._done.synchronize()
        return self._value.clone()


Kept = Tensor | Away
"""A value that is kept: a tensor on its device, or one that is away."""


class Gpu:
    """What a GPU does: ``torch.cuda``, of which tests have one that copies late."""

    def is_one(self, device: torch.device) -> bool:
        """Whether a device is one."""
        return device.type == "cuda"

    def new_stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return a stream beside the current one."""
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call, no-any-return]

    def current_stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream that kernels are launched on now."""
        return torch.cuda.current_stream(device)

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Return host memory that a stream can copy to by itself; torch keeps what is freed for the next."""
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def copy_out(self, tensor: Tensor, value: Tensor, stream: torch.cuda.Stream) -> None:
        """Copy a tensor to pinned memory on a stream."""
        with torch.cuda.stream(stream):
            value.copy_(tensor, non_blocking=True)

    def copy_back(self, value: Tensor, device: torch.device) -> Tensor:
        """Return a copy of pinned memory, made on the current stream, whose memory it takes."""
        return value.to(device, non_blocking=True)


class Back(Mapping[nn.Parameter, Tensor]):
    """Values of parameters on their devices, each of which comes there as it is asked for."""

    def __init__(self, kept: Mapping[nn.Parameter, Kept]):
        self._kept = kept

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        return here(self._kept[parameter])

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def here(kept: Kept) -> Tensor:
    """Return a value on its device: the tensor that is kept there, or a copy of what is away."""
    return kept.here() if isinstance(kept, Away) else kept


def saved(kept: Kept) -> Tensor:
    """Return a copy of a value for a state: on its device, or on the CPU if it is away."""
    return kept.saved() if isinstance(kept, Away) else kept.clone()


def memory_for(snapshots: str, parameters: Iterable[Tensor]) -> Memory:
    """Return where snapshots are kept.

    Args:
        snapshots: ``"device"`` or ``"host"``.
        parameters: that are kept.

    Raises:
        ValueError: if it is neither, or the parameters are in the host's memory already.

    Example:
        >>> memory = memory_for("device", [])
        >>> [here(value) for value in memory.put([torch.ones(2)])]
        [tensor([1., 1.])]
    """
    if snapshots == "device":
        return DeviceMemory()
    if snapshots != "host":
        raise ValueError(f"snapshots={snapshots!r}: expected 'device' or 'host'")
    memory = HostMemory()
    devices = {parameter.device for parameter in parameters}
    if not any(map(memory.serves, devices)):
        raise ValueError(
            f"snapshots='host' spares a GPU's memory, and the parameters are on {', '.join(map(str, devices))}: "
            "leave snapshots='device', or move the model to a GPU before AutoLR is made"
        )
    return memory
