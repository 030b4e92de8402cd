"""Golden values and helpers for the pure functions."""

import pytest
import torch


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
