"""Seconds and peak memory of a call, and the table of a step."""
import json

import pytest
import torch

from kd_det.study import step_costs
from kd_det.study.step_costs import (
    DISTILLED,
    PLAIN_TEACHER,
    STUDENT,
    Cost,
    StepCosts,
    measure_peak_memory,
    measure_seconds,
)

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


def test_the_costs_of_a_step_are_a_table_and_json():
    mib = 2**20
    costs = StepCosts({STUDENT: Cost(0.5, 10 * mib), DISTILLED: Cost(0.8, 14 * mib), PLAIN_TEACHER: Cost(0.2, mib)},
                      [0.3, 0.3], batch_size=2, size=(64, 96), teacher_weights=3 * mib, setting=dict(device='cpu'))
    table = costs.tabulate()
    assert table.title == 'A training step, 2 × 64 × 96 pixels'
    assert table.rows[1] == (DISTILLED, '800.0 ms', '4.00', '2.50', '14.0 MiB')
    assert table.rows[2] == (PLAIN_TEACHER, '200.0 ms', '1.00', '', '1.0 MiB')
    assert 'costs 300.0 ms, 1.50 plain forwards of the teacher (1.50 to 1.50 in' in table.caption
    assert '4.0 MiB at the peak beside 3.0 MiB of its weights' in table.caption
    held = json.loads(json.dumps(costs.to_dict()))
    assert held['parts'][STUDENT] == dict(seconds=0.5, memory=10 * mib) and held['ratio'] == pytest.approx(1.5)
    assert (held['size'], held['device'], held['teacher_weights']) == ([64, 96], 'cpu', 3 * mib)
    assert '>800.0 ms</td>' in costs._repr_html_()
