"""What a step of distillation costs beside the student's own: measured in every step, waiting for no GPU."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch

from kd_det.taps import Features

MEBIBYTE = 2**20


class StepCost:
    """Time and memory of what a step does for its terms: the teachers' forward and the terms' own.

    Attributes:
        seconds: Of the last step whose time is known; on a GPU that is one that it has finished.
        megabytes: What the last step held for its backward pass. On a GPU all that was allocated in that time; on
            the CPU, where PyTorch keeps no count, the teachers' features alone.
    """

    def __init__(self) -> None:
        self._seconds = self.megabytes = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._seconds = start.elapsed_time(end) / 1e3
        return self._seconds

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Measures the block; :meth:`count_features` within it tells what the teachers put out."""
        if device.type == 'cuda':
            before = torch.cuda.memory_allocated(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._running.append((start, end))
            self.megabytes = (torch.cuda.memory_allocated(device) - before) / MEBIBYTE
        else:
            begin = perf_counter()
            yield
            self._seconds = perf_counter() - begin

    def count_features(self, features: Sequence[dict[str, Features]]) -> None:
        """Counts the features of the teachers."""
        levels = {id(level): level for each in features for group in each.values() for level in group}
        self.megabytes = sum(level.nbytes for level in levels.values()) / MEBIBYTE
