"""CUDA graphs simulated on the CPU: what a capture records runs at each replay, on the same memory."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

# What waits for values is not permitted in a capture.
WAITS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim", "aten::repeat_interleave",
}  # fmt: skip


class Tape(TorchDispatchMode):
    """Records operations inside its ``with`` block. At its end there are no results, only the memory for them."""

    def __init__(self):
        super().__init__()
        self._operations = []
        self._written = {}  # id -> tensor, its value before

    def __enter__(self):
        self._asked = torch.cuda.is_current_stream_capturing
        torch.cuda.is_current_stream_capturing = lambda: True
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name in WAITS or _indexes_by_mask(func, args):
            raise RuntimeError(f"{func._schema.name} is not permitted when stream is capturing")
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for tensor in _tensors(value):
                    self._written.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        result = func(*args, **kwargs)
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(result) if _address(tensor) not in given]
        # A kernel is given addresses: what a tensor is made to point to later is nothing to it.
        self._operations.append((func, *tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs)), made))
        return result

    def __exit__(self, *exc_info):
        super().__exit__(*exc_info)
        torch.cuda.is_current_stream_capturing = self._asked
        for tensor, value in self._written.values():
            tensor.detach().copy_(value)
        for *_, made in self._operations:
            for tensor in made:
                tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 0)

    @torch.autocast("cpu", enabled=False)  # kernels are what they were recorded as
    def replay(self):
        for func, args, kwargs, made in self._operations:
            given = {_address(tensor) for tensor in _tensors((args, kwargs))}
            again = [tensor for tensor in _tensors(func(*args, **kwargs)) if _address(tensor) not in given]
            for tensor, value in zip(made, again, strict=True):
                tensor.detach().copy_(value)


class TapeRecorder:
    """In the place of :class:`autolr_fast._evaluators.graphed.Recorder`."""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def record(self, run):
        with Tape() as tape:
            result = run()
        return tape.replay, result


def _indexes_by_mask(func, args):
    masks = (torch.bool, torch.uint8)
    return func._schema.name.startswith("aten::index") and any(t.dtype in masks for t in _tensors(args[1:]))


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _address(tensor):
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)
