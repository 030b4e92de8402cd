"""Golden values and helpers for the pure functions."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

GOLDENS = Path(__file__).parents[1] / 'goldens'


@pytest.fixture
def golden():
    """Loads ``tests/goldens/<name>.npz``: its tensors, its ``meta``, and its module parameters as ``params``."""

    def load(name: str) -> SimpleNamespace:
        with np.load(GOLDENS / f'{name}.npz') as file:
            tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != 'meta'}
            meta = json.loads(str(file['meta']))
        params = {key[len('param:'):]: tensors.pop(key) for key in list(tensors) if key.startswith('param:')}
        return SimpleNamespace(meta=meta, params=params, **tensors)

    return load


@pytest.fixture
def close():
    """Asserts a relative error, in the norm of the largest element, under 1e-5."""

    def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
        assert actual.shape == expected.shape
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error < 1e-5

    return check


@pytest.fixture
def check_gradient(close):
    """Asserts the value of a loss and its gradient with respect to the student."""

    def check(loss: torch.Tensor, student: torch.Tensor, expected_loss: torch.Tensor,
              expected_gradient: torch.Tensor) -> None:
        close(loss, expected_loss)
        close(torch.autograd.grad(loss, student)[0], expected_gradient)

    return check
