"""Candidates in the live parameters, all run by one CUDA graph."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence

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

__all__ = ["Graphed"]


class Graphed(Evaluator):
    """Captures the closure's kernels in a CUDA graph, once a probe, and replays them at each candidate.

    For models that cannot be batched and that Python cannot keep a GPU busy with: it runs the closure once, not N
    times. A graph is not kept for the next probe, whose closure reads another batch at other addresses. Extra
    memory: one copy of the parameters, and the activations of a forward in a pool that is kept.

    The first probe of a model runs the closure once more before, since what is initialised at first use cannot be
    captured, and compares its loss with a replay's. Compiled modules run as the Python they were made from.

    ``evaluator="auto"`` does not try it: a capture that fails half-way, at a value that is read back for instance,
    is not something to try on somebody's training.
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
        devices = {parameter.device for parameter in line.parameters}
        if len(devices) > 1 or any(device.type != "cuda" for device in devices):
            where = ", ".join(sorted(map(str, devices)))
            raise EvaluatorError(self.name, model, f"its parameters are on {where}, not on one CUDA GPU")
        return Recorder(devices.pop())

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
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = run()
            finally:
                graph.capture_end()
        self._last = graph
        return graph.replay, result
