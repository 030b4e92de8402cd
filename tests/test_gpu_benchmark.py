"""The script for a GPU: all of it dry, so that it stands when there is one; and that a section that fails is alone."""
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from mmcv import _ext

from benchmarks import gpu, gpu_checks
from kd_det.compat import operator_backend, served_operators

REPOSITORY = Path(gpu.__file__).parents[1]


def run(setting, *names):
    """The rows of sections, run in this process."""
    sections = gpu.load_sections()
    try:
        return [row for name in names or gpu.SECTIONS for row in gpu.run_section(name, sections[name], setting)]
    finally:
        gpu_checks.build_all.cache_clear()


def test_a_dry_run_passes_every_check():
    rows = run(gpu.Setting(dry=True))
    assert {row['section'] for row in rows} == set(gpu.SECTIONS)
    assert {row['check']: row['failed'] for row in rows if row['failed']} == {}
    compared = {row['check']: row['numbers'] for row in rows if row['section'] in ('operators', 'terms')}
    assert all(numbers and not any(numbers.values()) for numbers in compared.values())  # the CPU with itself
    assert {'fgd', 'fgd, gradient', 'kd'} <= set(compared['Faster R-CNN'])
    assert sum(gpu.SECTIONS.values()) >= 480  # all that the whole may take is given to some section


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('section', ['operators', 'terms', 'amp', 'waits'])
def test_on_a_gpu(section):
    rows = run(gpu.Setting(), section)
    assert rows and {row['check']: row['failed'] for row in rows if row['failed']} == {}


@pytest.mark.skipif(operator_backend() != 'torchvision', reason='compiled mmcv is installed')
def test_every_operator_that_is_served_is_compared(monkeypatch):
    called = set()

    def spy(name, operator):
        return lambda *args, **kwargs: called.add(name) or operator(*args, **kwargs)

    for name in served_operators():
        monkeypatch.setattr(_ext, name, spy(name, getattr(_ext, name)))
    for name in gpu_checks.OPERATORS:
        gpu_checks.run_operator(name, 'cpu', 'float32')
    assert called == {name for name in served_operators() if not name.startswith('get_compil')}


def test_a_deviation_and_what_is_not_finite_are_noticed(monkeypatch):
    plain = gpu_checks.run_operator
    for change in (lambda each: 1.01 * each, lambda each: each * float('nan')):
        compared = []  # first the device, then the CPU
        monkeypatch.setattr(gpu_checks, 'run_operator', lambda *args: compared.append(args) or [
            change(each) if len(compared) % 2 else each for each in plain(*args)])
        check = next(gpu_checks.operators(gpu.Setting(dry=True)))
        assert check.call().failed.startswith('too far off: float32')


def test_what_makes_the_host_wait_is_told_with_its_place():
    with pytest.raises(AssertionError) as error, gpu_checks.no_waiting('cpu'):
        gpu_checks.deviation(torch.ones(2), torch.ones(2))
    assert gpu_checks.find_place(error.value) == 'aten._local_scalar_dense.default waits for the device'


@pytest.fixture
def fake(tmp_path):
    """The command of a process whose sections are others, without PyTorch."""
    script = tmp_path / 'fake.py'
    script.write_text(textwrap.dedent(f'''
        import os, sys, time
        from argparse import ArgumentParser
        from pathlib import Path
        sys.path.insert(0, {str(REPOSITORY)!r})
        from benchmarks import gpu

        def good(setting):
            yield gpu.Check('first', lambda: gpu.Found('fine', dict(value=1)))
            yield gpu.Check('second', lambda: gpu.Found('', failed='too slow'))

        def raises(setting):
            yield gpu.Check('divides', lambda: 1 / 0)
            yield gpu.Check('goes on', lambda: gpu.Found('fine'))
            raise ValueError('no more')

        def hangs(setting):
            yield gpu.Check('sleeps', lambda: time.sleep(60))

        def dies(setting):
            yield gpu.Check('lives', lambda: gpu.Found('fine'))
            yield gpu.Check('ends', lambda: os._exit(9))

        parser = ArgumentParser()
        parser.add_argument('--sections', nargs='+')
        parser.add_argument('--rows', type=Path)
        parser.add_argument('--seconds', type=float)
        options = parser.parse_args()
        sections = dict(good=good, raises=raises, hangs=hangs, dies=dies, last=good)
        gpu.SECTIONS.update(dict.fromkeys(sections, 20), hangs=0.5)
        gpu.work(options.sections, gpu.Setting(), options.rows, options.seconds, sections)
    '''))
    return [sys.executable, str(script)]


def test_what_fails_in_a_section_leaves_the_others_alone(fake):
    _, rows = gpu.run_all(['good', 'raises', 'hangs', 'dies', 'last'], 120, fake)
    assert [(row['section'], row['check'], bool(row['failed'])) for row in rows] == [
        ('good', 'first', False), ('good', 'second', True),
        ('raises', 'divides', True), ('raises', 'goes on', False), ('raises', '', True),
        ('hangs', '', True),
        ('dies', 'lives', False), ('dies', '', True),
        ('last', 'first', False), ('last', 'second', True)]
    failed = {(row['section'], row['check']): row['failed'] for row in rows}
    assert rows[0]['text'] == 'fine' and rows[0]['numbers'] == dict(value=1)
    assert 'ZeroDivisionError' in failed['raises', 'divides'] and 'no more' in failed['raises', '']
    assert 'Timeout' in failed['hangs', ''] and 'fake.py' in failed['hangs', '']  # and where it was
    assert 'code 9' in failed['dies', '']


def test_sections_for_which_no_time_is_left_are_told(fake):
    _, rows = gpu.run_all(['good', 'last'], 0.5, fake)
    assert [(row['section'], row['failed']) for row in rows] == [
        (name, 'Left out: the 0 seconds were over.') for name in ('good', 'last')]


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(SystemExit) as error:
        gpu.main(['--rows', str(tmp_path / 'rows'), '--sections', 'waits'])
    assert error.value.code == gpu.NO_GPU


@pytest.mark.parametrize('failed, code', [('', 0), ('RuntimeError: no', 1)])
def test_the_exit_code_and_the_file_tell_whether_any_failed(monkeypatch, tmp_path, capsys, failed, code):
    row = dict(section='waits', check='GFL', text='23 terms', seconds=1.0, failed=failed, numbers={})
    monkeypatch.setattr(gpu, 'run_all', lambda *args: (dict(torch='2'), [row]))
    assert gpu.main(['--dry', '--out', str(tmp_path / 'gpu.json')]) == code
    shown = capsys.readouterr().out
    assert '23 terms' in shown and ('FAILED: RuntimeError: no' in shown) == bool(failed)
    assert f'"failed": "{failed}"' in (tmp_path / 'gpu.json').read_text()
