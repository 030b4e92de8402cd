"""What answers without work answers at once: it imports nothing that takes long."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_det.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
HEAVY = {'torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'pycocotools', 'numpy', 'scipy', 'cv2', 'PIL', 'rich',
         'matplotlib', 'jinja2', 'shtab', 'pkg_resources', 'submitit'}

# Runs the command line and tells, on the last line of what it prints, its exit status and what has been imported.
COMMAND = '''
import json, sys
before = set(sys.modules)
from kd_det.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit_:
    code = exit_.code
print()
print(json.dumps([code, sorted(set(sys.modules) - before)]))
'''


def python(program: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    return subprocess.run([sys.executable, '-c', program, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize('arguments, code, said', [
    (['--help'], 0, 'COMMAND'),
    (['--version'], 0, 'kd-det 0.1.0\n'),
    *(([command, '--help'], 0, f'usage: kd-det {command} ') for command in COMMANDS),
    ([], 2, 'the following arguments are required: COMMAND'),
    (['distil'], 2, "invalid choice: 'distil'"),
    (['distill', 'student.py'], 2, 'required: --method'),
    (['train', 'student.py', '--wrong'], 2, 'unrecognized arguments: --wrong'),
    (['train', 'student.py', '--cfg-options', 'randomness.seed'], 2, "expected KEY=VALUE, got 'randomness.seed'"),
    (['benchmark', '--seeds', '0'], 2, 'expected a number of seeds'),
    (['benchmark-step', 'run.py', '--repeats', '0'], 2, 'expected an integer of at least 1'),
    (['sweep', '--method', 'kd', '--set', 'kd'], 2, 'expected KEY=A,B,C'),
    (['test', 'student.py', 'student.pth', '--out', 'x.json'], 2, 'does not end in .pkl'),
])
def test_help_and_refusals_import_nothing_heavy(arguments, code, said):
    result = python(COMMAND, *arguments)
    assert result.returncode == 0, result.stderr
    printed, _, last = result.stdout.rpartition('\n\n')
    status, imported = json.loads(last)
    assert status == code and said in (printed + '\n' if code == 0 else result.stderr)
    assert not HEAVY & {name.split('.')[0] for name in imported}
    # Besides the package itself the standard library alone, which a command line needs little of.
    assert {name.split('.')[0] for name in imported} - {'kd_det', '__mp_main__'} <= {*sys.stdlib_module_names}
    assert len(imported) < 120


def test_the_import_of_the_package_imports_little():
    program = ('import json, sys; before = set(sys.modules); import kd_det; '
               'print(json.dumps(sorted(set(sys.modules) - before)))')
    imported = json.loads(python(program).stdout)
    assert 'kd_det' in imported and len(imported) <= 60
    assert not HEAVY & {name.split('.')[0] for name in imported}
