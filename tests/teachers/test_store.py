"""Entries are whole or absent, whatever happens to the process that writes them or to the file."""
import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from kd_det.teachers.cache import StoreFullError, TensorStore

KEY = 'ab' * 16


def _tensors():
    return dict(a=torch.arange(6.0).view(2, 3), b=torch.ones(1, 2, dtype=torch.float16))


def _equal(found, expected) -> bool:
    return found is not None and found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected)


def _bytes_on_disk(folder) -> int:
    return sum(file.stat().st_size for file in Path(folder).glob('??/*'))


def test_what_was_put_is_what_one_gets(tmp_path):
    store = TensorStore(tmp_path / 'new' / 'folder', 10**6)
    assert store.get(KEY) is None
    written = store.put(KEY, _tensors())
    assert _equal(store.get(KEY), _tensors()) and _equal(TensorStore(store.folder, 10**6).get(KEY), _tensors())
    assert store.put(KEY, dict(a=torch.zeros(1))) == 0 and _equal(store.get(KEY), _tensors())  # the first one stays
    assert store.size == written == _bytes_on_disk(store.folder)


def test_no_damage_to_any_byte_is_ever_read(tmp_path):
    store = TensorStore(tmp_path, 10**6)
    store.put(KEY, _tensors())
    path = store._path(KEY)
    whole = path.read_bytes()
    damaged = [whole[:place] + bytes([whole[place] ^ 0xff]) + whole[place + 1:] for place in range(len(whole))]
    cut = [whole[:length] for length in range(0, len(whole), 7)]
    for content in damaged + cut:
        path.write_bytes(content)
        found = store.get(KEY)
        assert found is None and not path.exists()  # so that it is written anew


def test_a_folder_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert TensorStore('~/cache', 10**6).folder == tmp_path / 'cache' and not Path('~').exists()


@pytest.mark.parametrize('fault', [PermissionError, IsADirectoryError])
def test_an_entry_that_can_not_be_read_is_none(tmp_path, monkeypatch, fault):
    store = TensorStore(tmp_path, 10**6)
    store.put(KEY, _tensors())

    def refuse(path):
        raise fault(path)

    monkeypatch.setattr(Path, 'read_bytes', refuse)
    assert store.get(KEY) is None


def test_a_damaged_entry_of_a_read_only_folder_is_none(tmp_path, monkeypatch):
    store = TensorStore(tmp_path, 10**6)
    store.put(KEY, _tensors())
    os.truncate(store._path(KEY), 100)

    def refuse(*args, **kwargs):
        raise PermissionError('lock')

    monkeypatch.setattr(store._lock, 'acquire', refuse)
    assert store.get(KEY) is None
    assert store.size > 0  # which the report of an epoch tells


def test_the_limit_counts_what_all_processes_wrote(tmp_path):
    one, other = TensorStore(tmp_path, 10_000), TensorStore(tmp_path, 10_000)
    entry = dict(values=torch.zeros(1000))
    one.put('00', entry)
    other.put('01', entry)
    with pytest.raises(StoreFullError):
        one.put('02', entry)
    assert one.get('02') is None and other.get('00') is not None
    assert one.size == _bytes_on_disk(tmp_path) <= 10_000
    os.truncate(one._path('00'), 100)
    assert other.get('00') is None  # damaged, removed, and no longer counted beyond what the file held
    assert TensorStore(tmp_path, 10_000).put('02', entry)


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch):
    store = TensorStore(tmp_path, 10**6)

    def fail(path, content):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', fail)
    with pytest.raises(OSError, match='No space'):
        store.put(KEY, _tensors())
    assert store.size == 0 == _bytes_on_disk(tmp_path)


def _key_of(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def _tensors_of(number: int) -> dict:
    return dict(values=torch.full((100, 1000), float(number)), more=torch.arange(number % 7))


def _write_for_ever(folder, ready) -> None:
    store, number = TensorStore(folder, 10**9), 0
    ready.set()
    while True:
        store.put(_key_of(number), _tensors_of(number))
        number += 1


def test_killed_in_the_middle_of_writing(tmp_path):
    """Two processes write the same entries, and are killed without warning, again and again."""
    fork = multiprocessing.get_context('fork')
    for attempt in range(5):
        begun = [fork.Event(), fork.Event()]
        writers = [fork.Process(target=_write_for_ever, args=(tmp_path, each)) for each in begun]
        for writer, each in zip(writers, begun):
            writer.start()
            assert each.wait(60)
        time.sleep(0.02 + 0.007 * attempt)
        for writer in writers:
            writer.kill()
            writer.join()
        store = TensorStore(tmp_path, 10**9)
        stored = [number for number in range(10_000) if store._path(_key_of(number)).exists()]
        assert stored and all(_equal(store.get(_key_of(number)), _tensors_of(number)) for number in stored)
        assert store.size == _bytes_on_disk(tmp_path)


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path):
    store = TensorStore(tmp_path, 10**6)
    store.put(KEY, _tensors())
    left = store._path(KEY).with_suffix('.0123.tmp')
    left.write_bytes(b'half an entry')
    assert TensorStore(tmp_path, 10**6).size == store._path(KEY).stat().st_size + 13  # its process may be at work still
    os.utime(left, (time.time() - 7200, ) * 2)
    assert TensorStore(tmp_path, 10**6).size == store._path(KEY).stat().st_size and not left.exists()
    assert _equal(store.get(KEY), _tensors())


def test_a_store_is_opened_while_another_process_writes_the_size(tmp_path, monkeypatch):
    """Who reads a file that is being written may find it empty, whatever its length was a moment ago."""
    TensorStore(tmp_path, 10**6).put(KEY, _tensors())
    with monkeypatch.context() as patched:
        patched.setattr(Path, 'read_bytes', lambda path: b'')
        TensorStore(tmp_path, 10**6)
    assert _equal(TensorStore(tmp_path, 10**6).get(KEY), _tensors())
