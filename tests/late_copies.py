"""A GPU simulated on the CPU, whose streams copy as late as they may, and whose unordered reads find nothing."""

import weakref

import torch

from autolr_fast._steps import host_memory


class Event:
    def __init__(self, gpu, before):
        self.gpu, self.before = gpu, before  # numbers of the copies that it comes after

    def synchronize(self):
        self.gpu.host_waits += 1
        self.gpu.run(self.before)


class Stream:
    """Copies of a side stream wait in a queue; the current stream's run at once, as all operations on a CPU do."""

    def __init__(self, gpu):
        self.gpu = gpu
        self.before = frozenset()  # what the next operation comes after
        self.seen = {}  # other stream -> how far it was when this one waited for it
        self.position = 0

    def wait_stream(self, other):
        self.before |= other.before
        self.seen[other] = other.position

    def wait_event(self, event):
        self.before |= event.before
        self.position += 1
        if self is self.gpu.current:
            self.gpu.run(event.before)

    def record_event(self):
        return Event(self.gpu, self.before)


class LateGpu(host_memory.Gpu):
    """Stands for :class:`host_memory.Gpu`; the CPU is one.

    Attributes:
        current: the current stream; a test may set another.
        host_waits: how often the host waited for a copy.
        back: elements of each copy that came back.
        most_back: of those that were here at once, at most.
    """

    def __init__(self):
        self.streams = 0
        self.current = Stream(self)
        self.host_waits = 0
        self.back = []
        self.most_back = self._now_back = 0
        self._copies = {}  # number -> what is still to be done
        self._written_by = {}  # address -> number of the copy

    def is_one(self, device):
        return True

    def new_stream(self, device):
        self.streams += 1
        return Stream(self)

    def current_stream(self, device):
        return self.current

    def pinned_like(self, tensor):
        return torch.full_like(tensor, float("nan"))

    def copy_out(self, tensor, value, stream):
        if stream.seen.get(self.current) != self.current.position:
            return  # what the current stream makes is not there yet
        number = len(self._copies)
        source = tensor.detach()
        self._copies[number] = lambda: value.copy_(source)
        self._written_by[value.data_ptr()] = number
        stream.before |= {number}

    def copy_back(self, value, device):
        self.current.position += 1
        self.back.append(value.numel())
        found = value.clone()
        if self._written_by.get(value.data_ptr()) not in self.current.before:
            found.fill_(float("nan"))
        self._count(found.numel())
        weakref.finalize(found, self._count, -found.numel())
        return found

    def _count(self, elements):
        self._now_back += elements
        self.most_back = max(self.most_back, self._now_back)

    def run(self, numbers):
        for number in sorted(numbers):
            copy, self._copies[number] = self._copies[number], lambda: None
            copy()
