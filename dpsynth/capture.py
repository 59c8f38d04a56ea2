"""Capture: a function that only changes tensors in place, recorded once and replayed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["TRIALS", "capture"]

# Most calls in a row before a capture is done: the first compiles, cuBLAS sets up its workspaces.
TRIALS = 3


def capture(
    work: Callable[[], None], state: Sequence[Tensor], *, compiled: bool
) -> Callable[[], Any]:
    """What `work` does to tensors, without its Python.

    The operations are traced below autograd, so that hooks, gradients and optimizers may be used
    freely; `compiled`, they are fused by torch.compile without a graph break; on a GPU, they are
    recorded as a CUDA graph. Nothing in `work` may look at a value, and whatever differs from one
    call to the next must be in `state`.

    Args:
        work: Changes tensors of `state` in place and nothing else.
        state: All tensors that it reads and that change between calls, or that it changes. It is
            tried out `TRIALS` times in a row, after which they are as they were.
        compiled: Whether to fuse operations.

    Returns:
        A function that does the same again. The state is as it was before.
    """
    state = list(state)

    def traced(*_: Tensor) -> list[Tensor]:
        work()
        return []

    with torch.no_grad(), _restored(state):
        graph: Callable[..., Any] = make_fx(_with_grad(traced))(*state)
    _drop_marks(graph)
    plain = _call(graph, state)
    _check(work, plain, state)
    if compiled:
        call = _call(torch.compile(graph, fullgraph=True, dynamic=False), state)
        plain = _tried("compile", call, state) or plain
    if not state[0].is_cuda:
        return plain
    return _tried("record", plain, state) or plain


def _tried(how: str, call: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], Any] | None:
    """`call` compiled or recorded; where that fails, nothing and a warning: the same operations
    can be taken one by one, which gives the same numbers later."""
    try:
        if how == "record":
            return _recorded(call, state)
        with _restored(state):
            call()
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"capture: cannot {how} a step, so it is slower: {reason}", stacklevel=3)
        return None
    return call


def _drop_marks(graph: Any) -> None:
    """Take out the profiler's marks (torch's optimizers set them), which no compiler takes."""
    for node in reversed(graph.graph.nodes):
        if getattr(node.target, "namespace", None) == "profiler":
            graph.graph.erase_node(node)
    graph.recompile()


def _call(graph: Callable[..., Any], state: Sequence[Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            graph(*state)

    return call


def _with_grad(work: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Tensor) -> Any:
        with torch.enable_grad():
            return work(*arguments)

    return run


def _check(work: Callable[[], None], call: Callable[[], None], state: Sequence[Tensor]) -> None:
    """Refuse a trace in which something stood still, by two calls of either.

    An operation on tensors of which the trace follows none is done once and becomes a constant:
    noise that repeats itself, a batch that is always the same.
    """
    wanted, found = _after(work, state), _after(call, state)
    for place, (left, right) in enumerate(zip(wanted, found, strict=True)):
        # Where a sum has another order, an optimizer can turn the last digits into a step.
        odd = ~torch.isclose(left.double(), right.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
        if odd.double().mean() > 0.01:
            raise RuntimeError(
                f"capture: the trace does not do what its function does to tensor {place} of the "
                "state; put all that changes between calls into the state"
            )


def _after(work: Callable[[], None], state: Sequence[Tensor]) -> list[Tensor]:
    """The state after two calls; it is restored."""
    with _restored(state):
        for _ in range(2):
            work()
        return [tensor.detach().clone() for tensor in state]


def _recorded(call: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """`call` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), _restored(state):
        for _ in range(TRIALS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextlib.contextmanager
def _restored(state: Sequence[Tensor]) -> Iterator[None]:
    """Afterwards all tensors hold what they held before."""
    before = [tensor.detach().clone() for tensor in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, held in zip(state, before, strict=True):
                tensor.copy_(held)
