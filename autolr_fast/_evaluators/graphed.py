"""Candidates in the live parameters, all run by one CUDA graph."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from .._isolation import Closure, ClosureError, Isolation, Replay, scalar_loss
from .._machine.ranks import is_distributed
from .._ops import Writer
from .._steps import Line
from .base import Evaluator, EvaluatorError
from .inplace import rewritten
from .nearby import Nearby
from .substitution import run_eagerly

__all__ = ["Graphed", "check_without_waits", "is_on_one_gpu"]


class Graphed(Evaluator):
    """Captures the closure's kernels in a CUDA graph, once a probe, and replays them at each candidate.

    Choose ``evaluator="graphed"`` on one GPU, for models that cannot be batched and that Python cannot keep the GPU
    busy with. Python runs the closure once, not N times. The extra memory is one copy of the parameters, and the
    activations of a forward in a pool that is kept. A graph is not kept for the next probe, whose closure reads
    another batch at other addresses.

    The first probe of a model runs the closure once more before, since a first use cannot be captured. That probe
    compares the loss with a replay's. Compiled modules run as the Python they were made from.

    A capture that fails half-way leaves stream, generator and allocator as they were. (A torch without
    pytorch/pytorch#190348 keeps the memory of the pool reserved.) Other threads go on meanwhile, as a loader's that
    pins memory.

    Examples:
        >>> from autolr_fast import AutoLR
        >>> model = nn.Linear(4, 1)
        >>> AutoLR(torch.optim.SGD(model.parameters(), lr=0.1), model, evaluator=Graphed()).evaluator.name
        'graphed'
    """

    name = "graphed"

    def __init__(self) -> None:
        self._checked: weakref.ref[nn.Module] | None = None
        self._recorder: Recorder | None = None

    @torch.no_grad()
    def losses(self, model: nn.Module, line: Line, factors: Sequence[float], closure: Closure) -> Tensor:
        """Return the losses, [N]; see :meth:`Evaluator.losses`.

        Raises:
            EvaluatorError: if the parameters are not on one GPU, or the closure cannot be captured.
        """
        if is_distributed():
            raise EvaluatorError(self.name, model, "other ranks cannot be waited for inside of a capture")
        rewind, run = self._split(model, closure)
        if self._recorder is None:
            self._recorder = self._make_recorder(model, line)
        with (
            rewritten(line.parameters) as (now, rows),
            Isolation(model, closure) as isolation,
            run_eagerly(),
            self._recorder as recorder,
        ):
            write_nearby = Nearby(line.parameters).writer(now.values, rows)
            is_new = self._checked is None or self._checked() is not model
            if is_new:
                write_nearby([1.0])
                expected = isolation.run(closure).item()
                # Back again: what a capture takes from these weights shows in the replay at the others.
                now.restore()
            replay, loss = self._capture(model, rewind, run, isolation, recorder)

            def loss_at(write: Writer, factor: float) -> Tensor:
                write([factor])
                with isolation.rewound():
                    rewind()
                    replay()
                return loss.clone()

            if is_new:
                self._check(model, loss_at(write_nearby, 1.0).item(), expected)
                self._checked = weakref.ref(model)
            write = line.writer(now.values, rows)
            return torch.stack([loss_at(write, factor) for factor in factors])

    def _check(self, model: nn.Module, loss: float, expected: float) -> None:
        if not math.isclose(loss, expected, rel_tol=1e-3):  # some operations never add up in one order
            cause = (
                f"replayed, a test loss is {loss} and should be {expected}; a part of it ran outside of the graph"
            )
            raise EvaluatorError(self.name, model, cause)

    def _make_recorder(self, model: nn.Module, line: Line) -> Recorder:
        if not is_on_one_gpu(line.parameters):
            where = ", ".join(sorted({str(parameter.device) for parameter in line.parameters}))
            raise EvaluatorError(self.name, model, f"its parameters are on {where}, not on one CUDA GPU")
        return Recorder(line.parameters[0].device)

    def _split(self, model: nn.Module, closure: Closure) -> tuple[Callable[[], None], Closure]:
        """Return what sets the random-number streams, which nothing may do inside of a capture, and the rest."""
        if not isinstance(closure, Replay):
            return (lambda: None), closure
        if len(closure) > 1:
            cause = "a graph cannot begin anew at each micro-batch's random numbers: use micro_batches='last'"
            raise EvaluatorError(self.name, model, cause)
        return closure.rewind, closure.run

    def _capture(
        self,
        model: nn.Module,
        rewind: Callable[[], None],
        run: Closure,
        isolation: Isolation,
        recorder: Recorder,
    ) -> tuple[Callable[[], None], Tensor]:
        replays: list[Callable[[], None]] = []

        def captured() -> Tensor:
            rewind()
            replay, loss = recorder.record(lambda: scalar_loss(run))
            replays.append(replay)
            return loss

        try:
            loss = isolation.run(captured)  # what it undoes comes after the capture, and is no part of the graph
        except (ClosureError, StopIteration):
            raise
        except Exception as error:
            cause = f"its closure cannot be captured in a CUDA graph: {type(error).__name__}: {error}"
            raise EvaluatorError(self.name, model, cause) from error
        return replays[0], loss


def is_on_one_gpu(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether all parameters are on the same CUDA device."""
    devices = {parameter.device for parameter in parameters}
    return len(devices) == 1 and devices.pop().type == "cuda"


class Recorder:
    """Captures kernels on one GPU, inside its ``with`` block.

    There the device's generator draws from a copy of its state: a capture that fails leaves the state it was given
    unusable.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device):
        self._generator = torch.cuda.default_generators[device.index]
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.CUDAGraph | None = None  # keeps the pool's memory until the next

    def __enter__(self) -> Recorder:
        self._state = self._generator.graphsafe_get_state()
        self._generator.graphsafe_set_state(self._state.clone_state())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._generator.graphsafe_set_state(self._state)

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return a function that runs the kernels, on the current stream, and the tensor they write.

        Args:
            run: launches them; nothing that it computes is there before the first replay.
        """
        # Not torch.cuda.graph: it empties the allocator's cache each time, which training would have to fill again.
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream):
                # Other threads may do what a capture may not.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = run()
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph)
                    raise
        except BaseException:
            # A library may have left CUDA's last error set; the first launch that finds it raises, and clears it.
            with suppress(RuntimeError):
                torch.zeros(1, device=self._stream.device)
            raise
        self._last = graph
        return graph.replay, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, on its stream; what raised tells more than the end of it does."""
        with suppress(RuntimeError):
            graph.capture_end()
        # A torch without pytorch/pytorch#180395 goes on allocating for it if that raised; others raise here.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._stream.device.index, self._pool)
        graph.reset()
        _ABANDONED.append(graph)


_ABANDONED: list[torch.cuda.CUDAGraph] = []  # empty, but that torch may still ask them which streams are theirs


def check_without_waits(model: nn.Module, closure: Closure) -> None:
    """Run the closure as it is, and raise an EvaluatorError if it waits for the GPU: no capture could go through.

    Args:
        model: the module the closure calls.
        closure: returns the scalar loss.
    """
    with Isolation(model, closure) as isolation, run_eagerly():

        def watched() -> Tensor:
            with _warnings_of_waits() as told:
                loss = closure()
            if any("called a synchronizing" in str(each.message) for each in told):
                raise EvaluatorError(Graphed.name, model, "its closure waits for the GPU, as to read a value back")
            return loss

        isolation.run(watched)


@contextmanager
def _warnings_of_waits() -> Iterator[list[warnings.WarningMessage]]:
    """Have torch warn of waits, and keep its warnings; as errors, they would be raised in other threads too."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield told
        finally:
            torch.cuda.set_sync_debug_mode(mode)
