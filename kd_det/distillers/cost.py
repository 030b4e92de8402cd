"""What distilling costs each step, for the log: measured without ever making the host wait for a GPU."""
from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from time import perf_counter
from typing import Deque, Dict, Iterator, Sequence, Tuple

import torch

from kd_det.taps import Levels

MEGABYTE = 2**20


class StepCost:
    """Time and memory of what a step does for its terms: the teachers' forward and the terms' own.

    Attributes:
        seconds: Of the last step whose time is known; on a GPU that is one that it has finished.
        megabytes: What the last step held for its backward pass. On a GPU all that was allocated in that time; on
            the CPU, where PyTorch keeps no count, the teachers' features alone.
    """

    def __init__(self) -> None:
        self._seconds = self.megabytes = 0.0
        self._running: Deque[Tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._seconds = start.elapsed_time(end) / 1e3
        return self._seconds

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Measures the block; :meth:`hold` within it tells what the teachers put out."""
        if device.type == 'cuda':
            before = torch.cuda.memory_allocated(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._running.append((start, end))
            self.megabytes = (torch.cuda.memory_allocated(device) - before) / MEGABYTE
        else:
            begin = perf_counter()
            yield
            self._seconds = perf_counter() - begin

    def hold(self, features: Sequence[Dict[str, Levels]]) -> None:
        """Counts the features of the teachers."""
        levels = {id(level): level for each in features for group in each.values() for level in group}
        self.megabytes = sum(level.nbytes for level in levels.values()) / MEGABYTE
