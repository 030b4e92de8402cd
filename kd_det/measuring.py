"""What a call costs: its seconds, and the memory that it takes at its peak. On the CPU and on GPUs."""
from __future__ import annotations

import os
from itertools import accumulate
from statistics import median
from time import perf_counter
from typing import Callable, Union

import torch
from torch.profiler import ProfilerActivity, profile

Device = Union[str, torch.device]
Call = Callable[[], object]


def seconds(call: Call, device: Device = 'cpu', repeats: int = 5, warmup: int = 2) -> float:
    """The median time of a call.

    On a GPU it is the time between two events on the current stream: what the host prepares ahead does not count, what
    it makes the device wait for does.

    Args:
        call: Takes nothing; what it returns is let go of within the measured time.
        device: Where it computes.
        repeats: Number of measured calls.
        warmup: Number of calls before them.
    """
    time_once = _seconds_on_gpu if torch.device(device).type == 'cuda' else _seconds_on_cpu
    for _ in range(warmup):
        call()
    return median(time_once(call) for _ in range(repeats))


def peak_memory(call: Call, device: Device = 'cpu') -> int:
    """The most bytes that tensors made by a call took at once.

    It counts what PyTorch's allocator hands out, temporaries within operators and tensors saved for the backward pass
    included, and what ``call`` returns; neither scratch space of libraries (oneDNN, cuBLAS) nor unused parts of pools.
    The number is exact and the same each time, unlike the size of the process.

    Args:
        call: Takes nothing. It runs once; call it before if its first run does more than the later ones. It should let
            go of no tensor that was there before, such as gradients of an earlier step: on a GPU that would be
            subtracted.
        device: Where it computes.
    """
    if torch.device(device).type != 'cuda':
        return _peak_on_cpu(call)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _seconds_on_cpu(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def _seconds_on_gpu(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_on_cpu(call: Call) -> int:
    """From the profiler's record of each allocation and each release."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # it reports on itself, to the terminal
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))
