"""Times of calls on a GPU, by its own clock."""

from collections.abc import Callable

import torch

_CALLS = 10


def event_us(call: Callable[[], object]) -> float:
    """Microseconds of a call on the current CUDA device, the mean of several."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(_CALLS):
        call()
    end.record()
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms * 1000 / _CALLS
