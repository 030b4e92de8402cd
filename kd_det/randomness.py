"""Keeps distillation from moving the random numbers of the student's own training."""
from __future__ import annotations

import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """Whatever is drawn inside, the generators of Python, NumPy and PyTorch (CPU, current GPU) are then as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Asking for all GPUs would give this rank a context on each of them.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
