import random

import numpy as np
import torch

from kd_det.compat.process import preserved_randomness


def _draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_what_is_drawn_inside_is_not_seen_outside():
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = [_draw(), _draw()]
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    first = _draw()
    with preserved_randomness():
        _draw()
    assert [first, _draw()] == expected


def test_states_come_back_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    try:
        with preserved_randomness():
            torch.rand(1)
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(torch.rand(1), expected)
