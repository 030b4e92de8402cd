"""The table of docs/evaluation.md against its record, and the record's means and differences against its runs."""
import json
import re
from pathlib import Path

import pytest

from kd_det.study.results import paired_difference, summarize_fidelity

DOCS = Path(__file__).parents[3] / 'docs'


@pytest.fixture
def record():
    return json.loads((DOCS / 'results' / 'demo_fidelity.json').read_text(encoding='utf-8'))


def test_the_table_is_its_record(record):
    text = (DOCS / 'evaluation.md').read_text(encoding='utf-8')
    table = re.search(r'^\| \| mAP .*\n(?:\|.*\n)+', text, re.MULTILINE).group().splitlines()
    names, _, *rows = [[cell.strip(' `') for cell in line.strip('|').split('|')] for line in table]
    for row, (variant, numbers) in zip(rows, record['fidelity']['val'].items()):
        accuracies = [100 * run['bbox_mAP'] for run in record['runs'] if run['variant'] == variant]
        assert row == [variant, f'{sum(accuracies) / 3:.1f}', *(f"{numbers[name]['mean']:.3f}" for name in names[2:])]
    assert len(rows) == len(record['fidelity']['val'])
    assert {*names[2:], 'teacher_errors', 'teacher_ece'} == set(numbers)


def test_the_record_is_that_of_its_runs(record):
    splits = ('val', 'train')
    for split, variants in summarize_fidelity(record['runs'], splits).items():
        for variant, numbers in variants.items():
            for name, summary in numbers.items():
                assert summary == pytest.approx(record['fidelity'][split][variant][name], abs=2e-6)

    def by_seed(variant, split, name):
        return {run['seed']: run['fidelity'][split][name] for run in record['runs'] if run['variant'] == variant}

    for split in splits:
        for both, numbers in record['differences'][split].items():
            variant, baseline = both.split(' - ')
            for name, noted in numbers.items():
                found = paired_difference(by_seed(baseline, split, name), by_seed(variant, split, name))
                assert [found.mean, *found.interval] == pytest.approx([noted['mean'], *noted['interval']], abs=5e-6)
