"""kd-det inspect into a pipe, and into a narrow terminal."""
import io
import os
import subprocess
import sys

import pytest

from kd_det.cli.common import print_tables
from kd_det.compat.console import PlainConsole, TextTable
from kd_det.study.inspection import inspect


@pytest.fixture
def config(retinanet, run_config, tmp_path):
    model = dict(type='DetectionDistiller', student=retinanet(), distill=dict(fgd=dict(type='FGD', levels=(0, 1))),
                 teacher=dict(config=retinanet(neck=12), checkpoint=None, random_teacher=True))
    made = run_config(model)
    made.dump(tmp_path / 'config.py')
    return made


def test_a_pipe_gets_whole_lines_without_colours(config, tmp_path):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), TERM='xterm-256color', COLUMNS='80',
                       PYTHONIOENCODING='utf-8')
    environment.pop('FORCE_COLOR', None)
    done = subprocess.run([sys.executable, '-m', 'kd_det', 'inspect', 'config.py', '--out', 'pictures'], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    assert '\x1b' not in done.stdout and '…' not in done.stdout and '│' not in done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == 'Taps' and 'Terms' in lines and 'Levels' in lines
    level, = (line for line in lines if line.startswith('fgd') and '  neck[1]  ' in line)  # one line, however long
    for text in ('  16  ', '4 × 12 × 4 × 4', 'foreground ', 'background ', 'attention ', 'relation ',
                 'foreground_BoxForeground ', 'background_BoxBackground ', ' of 16'):
        assert text in level
    assert lines[-1] == '24 pictures of masks and attentions are in pictures.'


def test_a_call_in_python_gives_the_same(config, tmp_path):
    inspection = inspect(config, out=tmp_path / 'pictures', options={'model.distill.fgd.levels': (0, )})
    assert [level.name for level in inspection.terms['fgd'].levels] == ['neck[0]']
    assert config.model.distill.fgd.levels == (0, 1)  # the config stays as it was
    assert len(inspection.pictures) == 24 and all(file.is_file() for file in inspection.pictures)


@pytest.mark.parametrize('terminal', [False, True])
def test_nothing_of_a_table_is_left_out(terminal):
    output = io.StringIO()
    cells = ['a_term_of_a_long_name', '猫', 'one two three four five six seven', 'x' * 40, '1.5']
    table = TextTable('Title', ('term', 'word', 'sentence', 'path', 'number'), [cells], 'Caption', words=(0, 1, 2))
    print_tables(PlainConsole(file=output, width=60, force_terminal=terminal, color_system=None), [table])
    shown = output.getvalue()
    assert '…' not in shown and shown.count('x') == 40 + shown.count('six') and 'Caption' in shown
    assert all(word in shown for word in 'one two three four five six seven 猫 1.5'.split())
    if not terminal:
        heading, row = shown.splitlines()[1:3]
        assert heading == f"{'term':21}  word  {'sentence':33}  {'path':>40}  number"
        assert row == f'{cells[0]}  猫    {cells[2]}  {cells[3]}     1.5'
    else:
        assert max(map(len, shown.splitlines())) <= 60
