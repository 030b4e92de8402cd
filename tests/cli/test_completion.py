"""``kd-det --completion``: what bash makes of the script, and what stands in those for the other shells."""
import shlex
import shutil
import subprocess

import pytest

from kd_det.cli.main import COMMANDS, main, make_parser

# Completes the last word as bash does when Tab is pressed: by the function that the script gave to kd-det.
COMPLETE = '''
source {script}
complete=$(complete -p kd-det); complete=${{complete##*-F }}
COMP_WORDS=(kd-det "$@"); COMP_CWORD=$#
${{complete%% *}} kd-det 2> /dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
'''


@pytest.fixture
def script(tmp_path, capsys):
    """Writes the script of a shell; returns its file."""

    def write(shell):
        with pytest.raises(SystemExit) as exit_:
            main(['--completion', shell])
        assert exit_.value.code == 0
        file = tmp_path / f'completion.{shell}'
        file.write_text(capsys.readouterr().out)
        return file

    return write


def options_of(command):
    subparsers, = (action for action in make_parser()._actions if action.nargs == 'A...')
    return {option for action in subparsers.choices[command]._actions for option in action.option_strings}


@pytest.mark.skipif(shutil.which('bash') is None, reason='there is no bash')
def test_bash_completes_commands_options_choices_and_paths(script, tmp_path):
    (tmp_path / 'my_student.py').touch()
    (tmp_path / 'my_runs').mkdir()
    program = COMPLETE.format(script=script('bash'))

    def completed(*words):
        result = subprocess.run(['bash', '-c', program, 'bash', *words], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return set(result.stdout.split())

    assert completed('') >= {*COMMANDS}
    assert completed('bench') == {'benchmark', 'benchmark-step'}
    assert completed('--c') == {'--completion'} and completed('--completion', 'z') == {'zsh'}
    for command in COMMANDS:
        assert completed(command, '-') == options_of(command)
    assert completed('distill', 'my_') >= {'my_student.py'}
    assert completed('distill', 'my_student.py', '--teacher', 'my_s') == {'my_student.py'}
    assert completed('distill', 'my_student.py', '--method', 'pk') == {'pkd'}
    assert completed('distill', '--family', 'an') == {'anchor_free'}
    assert completed('train', 'my_student.py', '--work-dir', 'my_') == {'my_runs'}
    for words in (('export', 'my_student.py', 'my_student.py'), ('predict', ), ('predict', 'my_student.py'),
                  ('latency', ), ('compress', ), ('generations', ), ('methods', ), ('distill', '--peers')):
        assert completed(*words, 'my_') >= {'my_student.py'}, words


@pytest.mark.parametrize('shell', ['bash', 'zsh', 'fish'])
def test_every_script_knows_every_command_and_option_and_is_whole(shell, script):
    file = script(shell)
    text = file.read_text()
    for command in COMMANDS:
        assert command in text
        for option in options_of(command):
            assert option.lstrip('-') in text
    if shell == 'fish':  # a line for each argument
        lines = [shlex.split(line) for line in text.splitlines() if line.startswith('complete ')]
        assert len(lines) > 100 and all(line[:3] == ['complete', '-c', 'kd-det'] for line in lines)
    check = {'bash': ['bash', '-n'], 'fish': ['fish', '--no-execute'],
             'zsh': ['zsh', '-n'] if shutil.which('zsh') else ['bash', '-n']}[shell]  # this one reads as bash's, too
    if shutil.which(check[0]):
        checked = subprocess.run([*check, str(file)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(['--completion', 'cmd'])
    assert exit_.value.code == 2 and "invalid choice: 'cmd'" in capsys.readouterr().err
