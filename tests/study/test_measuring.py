import pytest
import torch

from kd_det.study import step_costs
from kd_det.study.step_costs import measure_peak_memory, measure_seconds

MILLION = 1_000_000


def test_peak_memory_is_what_lives_at_once():
    def call():
        first = torch.zeros(MILLION)
        del first
        return torch.zeros(MILLION // 2), torch.zeros(MILLION // 4)

    assert measure_peak_memory(call) == measure_peak_memory(call) == 4 * MILLION
    assert measure_peak_memory(lambda: [torch.zeros(MILLION) for _ in range(3)]) == 12 * MILLION
    assert measure_peak_memory(lambda: None) == 0


def test_peak_memory_does_not_count_what_was_there_before():
    held = torch.zeros(10 * MILLION)
    assert measure_peak_memory(lambda: held.add_(1)[:MILLION].exp()) == 4 * MILLION


def test_peak_memory_counts_what_the_backward_pass_keeps():
    weight = torch.ones(MILLION, requires_grad=True)

    def call():
        value = (2 * weight).exp().sum()  # keeps the result of exp
        torch.autograd.grad(value, weight)

    assert 8 * MILLION <= measure_peak_memory(call) < 13 * MILLION
    with torch.no_grad():
        assert 4 * MILLION <= measure_peak_memory(lambda: weight.exp().sum()) < 5 * MILLION


def test_seconds_is_the_median_after_the_warm_up(monkeypatch):
    clock, calls = [0.0], iter([100, 100, 3, 1, 2, 50, 1])

    def call():
        clock[0] += next(calls)

    monkeypatch.setattr(step_costs, 'perf_counter', lambda: clock[0])
    assert measure_seconds(call, repeats=5, warmup=2) == 2
    assert next(calls, None) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu():
    assert 4 * MILLION <= measure_peak_memory(lambda: torch.zeros(MILLION, device='cuda'), 'cuda') < 5 * MILLION
    small, large = (torch.ones(side, side, device='cuda') for side in (64, 4096))
    assert 0 < measure_seconds(lambda: small @ small, 'cuda') < measure_seconds(lambda: large @ large, 'cuda')
