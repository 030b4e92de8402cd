"""Text of users comes out as it is, in whatever encoding there is."""
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from rich.table import Table

from kd_det.checks.environment import Diagnosis, Finding
from kd_det.cli import distill
from kd_det.cli.doctor import render
from kd_det.cli.main import main
from kd_det.compat import process
from kd_det.compat.console import PlainConsole
from kd_det.compat.process import use_any_encoding
from kd_det.config.methods import Method, Methods
from kd_det.study.step_costs import DISTILLED, PLAIN_TEACHER, STUDENT, Cost, StepCosts

NAMES = ['block[/b]', 'disc [red]', '[', '\\[x]', ':cat:', '[link=x]', '{0} %s', '猫', '🐈']


def stream(encoding, errors='strict'):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors)


def written(stream):
    stream.flush()
    return stream.buffer.getvalue().decode(stream.encoding)


def ascii_output(monkeypatch):
    """The standard output, as where neither the locale nor PYTHONIOENCODING knows more than ASCII."""
    monkeypatch.setattr(sys, 'stdout', stream('ascii'))
    use_any_encoding()
    return sys.stdout


def test_markup_and_emojis_of_users_are_text():
    output = io.StringIO()
    table = Table(*NAMES, title=NAMES[0], caption=NAMES[4])
    table.add_row(*NAMES)
    PlainConsole(file=output, width=300).print(table, *NAMES)
    assert all(output.getvalue().count(name) >= 3 for name in NAMES)


def test_findings_are_printed_as_they_are():
    output = io.StringIO()
    finding = Finding(*[f'{name}!' for name in NAMES[:3]], fault=True)
    PlainConsole(file=output, width=300).print(render(Diagnosis((finding, ))))
    assert all(f'{name}!' in output.getvalue() for name in NAMES[:3]) and 'fault' in output.getvalue()


@pytest.mark.parametrize('folder', ['runs [v1]', 'runs [v1]/[/final]', 'a b', '猫'])
def test_the_command_that_repeats_a_run_can_be_copied(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = Config(dict(classes=('[/b]', '猫')), cfg_text='#', filename=f'{folder}/x.py')
    Path(folder).mkdir(parents=True)
    config.dump(config.filename)
    distill.show(config)
    said = capsys.readouterr().out
    assert f'saved as {folder}/x.py.' in said and f"kd-det train '{folder}/x.py'" in said
    assert Config.fromfile(f'{folder}/x.py').classes == ('[/b]', '猫')


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'latin-1', 'utf-8'])
def test_every_encoding_takes_every_text(encoding, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', stream(encoding))
    monkeypatch.setattr(sys, 'stderr', stream(encoding))
    use_any_encoding()
    print('猫 – \udcff')  # the last is a byte of a file's name that is not UTF-8
    print('猫', file=sys.stderr)
    cat = '猫' if encoding == 'utf-8' else '\\u732b'
    dash = '–' if encoding in ('utf-8', 'cp1252') else '-'
    assert written(sys.stdout).split() == [cat, dash, '\\udcff'] and written(sys.stderr).split() == [cat]


def test_columns_stay_in_line_where_signs_are_spelt_out(monkeypatch):
    output = ascii_output(monkeypatch)
    table = Table('name', 'change')
    for name in ('猫', 'cat', '…'):
        table.add_row(name, '± 1')
    PlainConsole().print(table)
    lines = written(output).splitlines()
    assert len(set(map(len, lines))) == 1 and '| \\u732b | +/- 1' in '\n'.join(lines)
    assert '...' in lines[-2]


def test_a_caption_of_numbers_is_plain(monkeypatch):
    output = ascii_output(monkeypatch)
    costs = StepCosts({name: Cost(1.0, 0) for name in (STUDENT, DISTILLED, PLAIN_TEACHER)}, [1.0])
    PlainConsole().print(costs.tabulate().to_rich())
    assert '[bold]' not in written(output)


def test_methods_are_listed_in_ascii(monkeypatch):
    method = Method('fgd', 'CVPR 2022', 'features – all', ('neck', ), ('RetinaNet', ))
    monkeypatch.setattr('kd_det.config.methods.methods', lambda: Methods([method]))
    output = ascii_output(monkeypatch)
    assert main(['methods']) == 0
    assert '| fgd ' in written(output) and 'kd-det distill ... --method fgd' in written(output)


def test_a_process_of_another_locale_reads_and_writes_utf8(tmp_path):
    """With the C locale taken literally, as in old containers; no encoding is named, as for MMEngine's log."""
    program = ('import logging, runpy, sys\n'
               f"runpy.run_path({process.__file__!r})['use_any_encoding']()\n"
               "logging.basicConfig(handlers=[logging.FileHandler('x.log'), logging.StreamHandler(sys.stdout)])\n"
               "logging.warning('\\u732b \\u2013')\n")
    environment = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0',
                       PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and b'Logging error' not in done.stderr
    assert b'\\u732b -' in done.stdout and '猫 –' in (tmp_path / 'x.log').read_text(encoding='utf-8')
