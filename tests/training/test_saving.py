"""A whole checkpoint always exists; a resumed run finds it, and does the validation that it missed."""
import errno
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import kd_det
from kd_det.compat import CheckpointError
from kd_det.compat.writing import WritingError
from kd_det.training import saving
from kd_det.training.pictures import read_scalars
from kd_det.training.runner import check_start, is_saved_config
from kd_det.training.saving import MissedValidationHook, WholeCheckpointHook, keep_checkpoints_whole

LOCAL_LOG = dict(vis_backends=[dict(type='LocalVisBackend')])


def names(folder) -> list[str]:
    return sorted(file.name for file in Path(folder).iterdir() if file.is_file() and file.suffix != '.py'
                  and file.name != 'checked_images.json')


@pytest.fixture
def config_of(retinanet, run_config):
    """Makes the config of a plain training, which keeps one checkpoint and logs to files."""

    def make(**changes):
        changes = {'default_hooks.checkpoint.max_keep_ckpts': 1, 'visualizer': LOCAL_LOG, **changes}
        return run_config(retinanet(), **changes)

    return make


# ---------------------------------------------------------------- saving


def test_while_a_checkpoint_is_written_the_one_before_is_there(config_of, monkeypatch):
    seen, write = [], saving.write_whole

    def watch(file, content):
        seen.append((Path(file).name, names(config.work_dir)))
        write(file, content)

    monkeypatch.setattr(saving, 'write_whole', watch)
    config = config_of(epochs=2, **{'default_hooks.checkpoint.published_keys': ['meta', 'state_dict']})
    kd_det.train(config)
    assert [name for name, _ in seen[:4]] == ['epoch_1.pth', 'last_checkpoint', 'epoch_2.pth', 'last_checkpoint']
    assert {'epoch_1.pth', 'last_checkpoint'} <= set(seen[2][1])
    assert {'epoch_1.pth', 'epoch_2.pth'} <= set(seen[3][1])
    published, = (name for name in names(config.work_dir) if name.startswith('epoch_2-'))
    assert seen[4][0] == published and names(config.work_dir) == [published, 'epoch_2.pth', 'last_checkpoint']
    saved = torch.load(Path(config.work_dir, published), weights_only=True)
    assert set(saved) == {'meta', 'state_dict'}
    assert Path(config.work_dir, 'last_checkpoint').read_text() == f'{config.work_dir}/epoch_2.pth'


class Rising(Hook):
    """Lets each validation be the best so far, before it is looked at."""
    priority = 'VERY_HIGH'

    def after_val_epoch(self, runner, metrics=None):
        metrics['coco/bbox_mAP'] = 0.1 * runner.epoch


def test_a_full_disk_ends_in_one_line_and_the_files_before_stay(config_of, monkeypatch):
    config = config_of(epochs=2, val=True, **{'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'})
    sync, synced = os.fsync, []

    def fill(number):
        synced.append(number)
        if len(synced) > 8:  # best and last, each with its last_checkpoint, and all of that once more
            raise OSError(errno.ENOSPC, 'No space left on device')
        sync(number)

    register = saving.keep_checkpoints_whole
    monkeypatch.setattr('kd_det.training.runner.keep_checkpoints_whole',
                        lambda runner: (register(runner), runner.register_hook(Rising())))
    monkeypatch.setattr(os, 'fsync', fill)
    with pytest.raises(WritingError, match=r"\.pth' can not be written: No space left on device\. .* --resume\.$"):
        kd_det.train(config)
    kept = names(config.work_dir)
    assert not [name for name in kept if 'partial' in name] and any(name.startswith('best') for name in kept)
    for name in kept:
        if name.endswith('.pth'):
            assert zipfile.ZipFile(Path(config.work_dir, name)).testzip() is None


@HOOKS.register_module()
class OwnCheckpointHook(CheckpointHook):
    """A user's."""


def test_mmengines_hook_gives_way_and_a_users_own_stays(config_of):
    runner = Runner.from_cfg(config_of(**{'default_hooks.checkpoint.save_best': 'auto'}))
    own = OwnCheckpointHook()
    runner.register_hook(own)
    keep_checkpoints_whole(runner)
    keep_checkpoints_whole(runner)
    kinds = [type(hook) for hook in runner.hooks]
    assert kinds.count(WholeCheckpointHook) == kinds.count(MissedValidationHook) == 1 and type(own) is OwnCheckpointHook
    hook, = (hook for hook in runner.hooks if type(hook) is WholeCheckpointHook)
    assert (hook.max_keep_ckpts, hook.save_best) == (1, ['auto'])


def test_the_best_of_before_goes_when_the_new_one_is_there(config_of, monkeypatch):
    register = saving.keep_checkpoints_whole
    monkeypatch.setattr('kd_det.training.runner.keep_checkpoints_whole',
                        lambda runner: (register(runner), runner.register_hook(Rising())))
    config = config_of(epochs=2, val=True, **{'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'})
    Path(config.work_dir).mkdir()
    Path(config.work_dir, 'epoch_1.pth.123.partial').write_text('of a run that was killed')
    result = kd_det.train(config)
    assert names(config.work_dir) == ['best_coco_bbox_mAP_epoch_2.pth', 'epoch_2.pth', 'last_checkpoint']
    assert result.best_checkpoint.name == 'best_coco_bbox_mAP_epoch_2.pth'


# ---------------------------------------------------------------- resuming


@pytest.fixture(scope='module')
def two_epochs(tmp_path_factory):
    """The folder of a run's two checkpoints, and the runner that resumes it: the first test that asks makes both."""
    return tmp_path_factory.mktemp('two') / 'run', []


@pytest.fixture
def resumed(config_of, two_epochs, tmp_path):
    """A runner that goes on from a copy of a work dir with two checkpoints, and that folder."""
    straight, made = two_epochs
    config = config_of(epochs=3, resume=True, **{'default_hooks.checkpoint.max_keep_ckpts': -1})
    if not made:
        kd_det.train(config, options={'work_dir': str(straight), 'train_cfg.max_epochs': 2, 'resume': False})
        made.append(Runner.from_cfg(config))
    folder, runner = tmp_path / 'copy', made[0]
    shutil.copytree(straight, folder)
    (folder / 'last_checkpoint').write_text(f'{folder}/epoch_2.pth')
    runner._work_dir, runner._load_from, runner._has_loaded = str(folder), None, False
    return runner, folder


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def zero(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2:len(content) // 2 + 5000] = bytes(5000)
    file.write_bytes(content)


HARM = {
    'nothing': (lambda folder: None, 2, ''),
    'cut': (lambda folder: cut(folder / 'epoch_2.pth'), 1, 'epoch_2.pth'),
    'zeros': (lambda folder: zero(folder / 'epoch_2.pth'), 1, "epoch_2.pth' is damaged at"),
    'empty': (lambda folder: (folder / 'epoch_2.pth').write_bytes(b''), 1, "epoch_2.pth' is empty."),
    'gone': (lambda folder: (folder / 'epoch_2.pth').unlink(), 1, "epoch_2.pth', which is gone."),
    'an empty last_checkpoint': (lambda folder: (folder / 'last_checkpoint').write_text(''), 2,
                                 "'last_checkpoint' is empty."),
    'no last_checkpoint': (lambda folder: (folder / 'last_checkpoint').unlink(), 2, "'last_checkpoint' is missing."),
    'a last_checkpoint of before': (
        lambda folder: (folder / 'last_checkpoint').write_text(f'{folder}/epoch_1.pth'), 2, 'which is older.'),
    'text': (lambda folder: (folder / 'epoch_2.pth').write_text('moved to the archive'), 1, 'text that begins with'),
    'weights alone': (lambda folder: torch.save(dict(state_dict={}), folder / 'epoch_2.pth'), 1, "lacks meta['iter']"),
}


@pytest.mark.parametrize('harm', HARM)
def test_the_newest_whole_checkpoint_is_resumed_and_the_reason_is_told(harm, resumed, monkeypatch):
    runner, folder = resumed
    do, epoch, reason = HARM[harm]
    do(folder)
    said = []
    monkeypatch.setattr(runner.logger, 'warning' if reason else 'info', said.append)
    check_start(runner)
    assert runner._load_from == str(folder / f'epoch_{epoch}.pth')
    assert said[0].startswith(f"Resuming from '{folder}/epoch_{epoch}.pth', the newest checkpoint that is whole.")
    assert reason in said[0]
    runner.load_or_resume()
    assert (runner.epoch, runner.iter) == (epoch, 2 * epoch)


def test_where_none_is_whole_all_are_named(resumed):
    runner, folder = resumed
    cut(folder / 'epoch_2.pth')
    (folder / 'epoch_1.pth').write_bytes(b'')
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in '.*' to resume from: .*epoch_1.pth' is empty. "
                                              r'.*epoch_2.pth.* Leave --resume out to begin anew.'):
        check_start(runner)


def test_the_folder_of_a_longer_run_before_does_not_count(resumed):
    """Its epoch 2 is older than the epoch 1 at which the new run was killed."""
    runner, folder = resumed
    later = torch.load(folder / 'epoch_1.pth', weights_only=True)
    later['meta']['time'] = '29991231_235959'
    torch.save(later, folder / 'epoch_1.pth')
    check_start(runner)
    assert runner._load_from == str(folder / 'epoch_1.pth')


def test_with_nothing_to_resume_the_run_begins_anew(config_of, monkeypatch):
    runner, said = Runner.from_cfg(config_of(resume=True)), []
    monkeypatch.setattr(runner.logger, 'warning', said.append)
    check_start(runner)
    assert runner._load_from is None and 'to resume from: the run begins anew.' in said[0]


# ---------------------------------------------------------------- the validation that was missed


class StopInValidation(Hook):

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == self.epoch:
            raise KeyboardInterrupt


def validations(folder) -> list[int]:
    """The epochs of all validations in the logs of a work dir, in their order."""
    lines = [json.loads(line) for file in sorted(Path(folder).glob('*/vis_data/scalars.json'))
             for line in file.read_text().splitlines()]
    return [line['step'] for line in lines if 'coco/bbox_mAP' in line]


@pytest.mark.parametrize('best', [None, 'coco/bbox_mAP'])
def test_a_run_that_was_stopped_in_its_last_validation_validates(best, config_of, monkeypatch):
    register = saving.keep_checkpoints_whole
    stop = StopInValidation(2)
    monkeypatch.setattr('kd_det.training.runner.keep_checkpoints_whole',
                        lambda runner: (register(runner), runner.register_hook(stop)))
    config = config_of(epochs=2, val=True, **{'default_hooks.checkpoint.save_best': best})
    with pytest.raises(KeyboardInterrupt):
        kd_det.train(config)
    assert validations(config.work_dir) == [1]
    stop.epoch = None
    result = kd_det.train(config, resume=True)
    assert validations(config.work_dir) == [1, 2] and result.metrics and result.epochs == 2
    assert set(read_scalars(result.scalars)['coco/bbox_mAP']) == {1, 2}
    assert (result.best_checkpoint is not None) == bool(best)
    kd_det.train(config, resume=True)  # what is done is done once
    assert validations(config.work_dir) == ([1, 2] if best is None else [1, 2, 2])


# ---------------------------------------------------------------- the configs


def test_what_a_runner_saved_is_told_from_what_was_written_by_hand(config_of):
    config = config_of()
    assert is_saved_config(config.pretty_text.encode())
    for text in ("_base_ = 'other.py'\nmodel = dict()\n", '# mine\na = 1\n', 'b = 1\na = 2\n', 'import os\na = 1\n',
                 'a = (\n', 'a = 1  # mine\n'):
        assert not is_saved_config(text.encode())
