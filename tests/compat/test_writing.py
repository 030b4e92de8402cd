"""Files are whole or not there, nobody else's are replaced, and a folder has one run at a time."""
import errno
import fcntl
import os
import signal
import time

import pytest

from kd_det.compat import writing
from kd_det.compat.writing import (
    LOCK_FILE,
    WritingError,
    kept_after_errors,
    locked_folder,
    refuse_to_replace,
    remove_partial_files,
    write_whole,
)


def _interrupt(*_):
    raise KeyboardInterrupt


def _terminate(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)  # the signal is dealt with before


def _fill(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')


@pytest.mark.parametrize('end, raised', [(_fill, WritingError), (_interrupt, KeyboardInterrupt),
                                         (_terminate, SystemExit)])
def test_what_ends_a_write_leaves_what_was_there(end, raised, tmp_path, monkeypatch):
    file, before = tmp_path / 'epoch_1.pth', signal.getsignal(signal.SIGTERM)
    write_whole(file, b'good')
    monkeypatch.setattr(os, 'fsync', end)
    with pytest.raises(raised) as error:
        write_whole(file, b'better')
    assert file.read_bytes() == b'good' and list(tmp_path.iterdir()) == [file]
    assert signal.getsignal(signal.SIGTERM) == before
    if raised is WritingError:
        assert str(error.value) == f"'{file}' can not be written: No space left on device. What was there before is " \
                                   'there still.'


def test_a_file_system_without_fsync_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EINVAL, 'Invalid argument')

    monkeypatch.setattr(os, 'fsync', refuse)
    write_whole(tmp_path / 'a', 'ü')
    assert (tmp_path / 'a').read_text(encoding='utf-8') == 'ü'


def test_a_device_is_written_to_as_it_is():
    write_whole('/dev/null', 'x')
    assert not os.path.isfile('/dev/null')


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    for name in ('epoch_1.pth.77.partial', 'epoch_1.pth', 'my.notes.partial', 'result.json.5.partial'):
        (tmp_path / name).write_text(name)
    remove_partial_files(tmp_path, '*.pth')
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        'epoch_1.pth', 'my.notes.partial', 'result.json.5.partial']
    with locked_folder(tmp_path):
        assert sorted(file.name for file in tmp_path.iterdir()) == [LOCK_FILE, 'epoch_1.pth', 'my.notes.partial']


def test_a_foreign_file_is_refused(tmp_path):
    file = tmp_path / 'report.html'
    refuse_to_replace(file, lambda content: False, 'a report')
    file.write_text('')
    refuse_to_replace(file, lambda content: False, 'a report')  # nothing is lost
    file.write_text('mine')
    with pytest.raises(WritingError, match=r"report.html' exists, and is not a report that kd_det wrote. Give another "
                                           r'name, or replace it with --force.$'):
        refuse_to_replace(file, lambda content: False, 'a report')
    refuse_to_replace(file, lambda content: False, 'a report', force=True)
    refuse_to_replace(file, lambda content: content == b'mine', 'a report')
    with pytest.raises(WritingError, match='is a folder'):
        refuse_to_replace(tmp_path, lambda content: True, 'a report', force=True)


@pytest.mark.parametrize('before', [None, 'good'])
def test_after_an_error_a_file_is_as_it_was(before, tmp_path):
    file = tmp_path / 'config.py'
    if before:
        file.write_text(before)
    with pytest.raises(ZeroDivisionError), kept_after_errors(file):
        file.write_text('bad')
        raise ZeroDivisionError
    assert (file.read_text() if file.exists() else None) == before
    with kept_after_errors(file):
        file.write_text('new')
    assert file.read_text() == 'new'


def _hold(folder) -> int:
    """Starts a process that holds the lock of a folder, once this returns."""
    reading, written = os.pipe()
    child = os.fork()
    if child == 0:
        with locked_folder(folder):
            if os.fork() == 0:  # as a data-loader worker, which outlives its parent for a while
                time.sleep(3)
                os._exit(0)
            os.write(written, b'x')
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    return child


def test_a_folder_has_one_run_at_a_time_and_is_free_when_that_is_killed(tmp_path):
    folder = tmp_path / 'run'
    holder = _hold(folder)
    try:
        with pytest.raises(WritingError, match=rf'in use by another run \(process {holder} on .*, since 20'), \
                locked_folder(folder):
            pytest.fail('two runs in one folder')
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    with locked_folder(folder):
        assert (folder / LOCK_FILE).is_file()
    assert not list(folder.iterdir())


@pytest.mark.parametrize('launcher, variable', [('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'),
                                                ('mpi', 'OMPI_COMM_WORLD_RANK')])
def test_one_process_of_a_launch_locks_for_all(launcher, variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, '1')
    with locked_folder(tmp_path, launcher):
        assert not list(tmp_path.iterdir())
    monkeypatch.setenv(variable, '0')
    with locked_folder(tmp_path, launcher):
        assert [file.name for file in tmp_path.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize('lacking', ['locks', 'the module'])
def test_without_locks_a_warning_is_all(lacking, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    if lacking == 'locks':
        monkeypatch.setattr(fcntl, 'lockf', refuse)
    else:
        monkeypatch.setattr(writing, 'fcntl', None)
    said = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda text, *_: said.append(text))
    with locked_folder(tmp_path):
        pass
    assert len(said) == 1 and 'can not be locked' in said[0]
