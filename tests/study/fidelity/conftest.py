"""Detections and ground truth for the tests of fidelity."""
import pytest
import torch


@pytest.fixture
def instances():
    """Makes boxes of 10 pixels from rows of x, score and label."""

    def make(rows):
        return dict(bboxes=torch.tensor([[x, 0.0, x + 10.0, 10.0] for x, _, _ in rows]).reshape(-1, 4),
                    scores=torch.tensor([score for _, score, _ in rows]),
                    labels=torch.tensor([label for _, _, label in rows]).long())

    return make
