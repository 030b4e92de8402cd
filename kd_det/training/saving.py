"""Checkpoints that are whole whenever a run is killed, and how a run that goes on finds its place."""
from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmdet.registry import HOOKS
from mmengine.dist import broadcast_object_list, is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import ReduceOnPlateauParamScheduler
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, save_checkpoint

from kd_det.compat.checkpoint import CheckpointError, load_checkpoint
from kd_det.compat.writing import WritingError, remove_partial_files, write_whole

BACKEND = 'kd_det.whole'
LAST = 'last_checkpoint'
VALIDATED = 'last_validation'  # in a checkpoint's message hub: the epoch, or iteration, whose validation it has seen


@register_backend(BACKEND)
class WholeBackend(LocalBackend):
    """Local files, written whole; what is to be removed stays until :meth:`remove_outdated`."""

    def __init__(self) -> None:
        self.outdated: set[Path] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(filepath, obj)
        except WritingError as error:
            raise WritingError(f'{error} Mend that, and go on from the last checkpoint with --resume.') from error

    def remove(self, filepath: str | Path) -> None:
        self.outdated.add(Path(filepath))

    def remove_outdated(self, hook: CheckpointHook) -> None:
        """Removes what a hook has no use for; a best one that was saved once more, under the same name, stays."""
        best = getattr(hook, 'best_ckpt_path_dict', None) or dict(only=getattr(hook, 'best_ckpt_path', None))
        for file in self.outdated - {Path(each) for each in (hook.last_ckpt, *best.values()) if each}:
            file.unlink(missing_ok=True)
        self.outdated.clear()


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """Saves checkpoints as MMEngine's ``CheckpointHook`` does, so that a whole one exists at every moment.

    Each is written under another name, brought to the disk and renamed; then ``last_checkpoint`` names it, and only
    then older ones go, the last best one too. A run of kd_det, or one with a
    :class:`~kd_det.training.hooks.DistillHook`, has it in place of MMEngine's own, with the same arguments; a subclass
    of that stays. Remote storage is left to MMEngine.
    """

    whole: WholeBackend | None = None  # in place of MMEngine's backend, where that writes local files
    file_backend: Any

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.whole = None
        if isinstance(getattr(self.file_backend, 'client', self.file_backend), LocalBackend):
            self.file_backend = self.whole = WholeBackend()
            self.file_client_args, self.backend_args = None, dict(backend=BACKEND)
            if is_main_process():
                for folder, pattern in ((self.out_dir, '*.pth'), (runner.work_dir, LAST)):
                    remove_partial_files(folder, pattern)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float]) -> None:
        runner.message_hub.update_info(VALIDATED, _progress(runner))
        super().after_val_epoch(runner, metrics)
        if self.whole and is_main_process():
            self.whole.remove_outdated(self)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        if self.whole is None:
            super()._save_checkpoint_with_step(runner, step, meta)
            return
        if self.max_keep_ckpts > 0 and step not in list(self.keep_ckpt_ids)[-1:]:
            kept = list(self.keep_ckpt_ids)
            self.keep_ckpt_ids.append(step)  # holds as many as are kept, and lets go of the oldest
            outdated = [each for each in kept if each not in self.keep_ckpt_ids]
            # A run that is killed before they are removed does so when it is resumed.
            runner.message_hub.update_info('keep_ckpt_ids', [*outdated, *self.keep_ckpt_ids])
            for each in outdated:
                self.whole.remove(Path(self.out_dir, self.filename_tmpl.format(each)))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(self.out_dir, name, save_optimizer=self.save_optimizer,
                               save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch,
                               backend_args=self.backend_args, **self.args)
        if is_main_process():
            write_whole(Path(runner.work_dir, LAST), self.last_ckpt)
            self.whole.remove_outdated(self)

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        if self.whole is None:
            super()._publish_model(runner, ckpt_path)
            return
        published = {key: value for key, value in load_checkpoint(ckpt_path).items() if key in self.published_keys}
        digest = hashlib.sha256(pickle.dumps(published)).hexdigest()
        file = Path(ckpt_path).with_name(f'{Path(ckpt_path).stem}-{digest[:8]}.pth')
        save_checkpoint(published, str(file), backend_args=self.backend_args)
        runner.logger.info(f'The checkpoint ({ckpt_path}) is published to {file}.')


class MissedValidationHook(Hook):
    """Does the validation in which the resumed run was killed, and what follows from it, such as ``save_best``.

    MMEngine would go on with the next epoch, or end.
    """
    priority = 'LOWEST'  # all other hooks are ready

    def before_train(self, runner: Runner) -> None:
        if not runner._resume or not _is_validation_due(runner):
            return
        missed = [is_main_process() and not _was_validated(runner)]
        broadcast_object_list(missed)
        if missed[0]:
            runner.logger.info('Validating first: the checkpoint was saved before its validation was done with.')
            runner.val_loop.run()


def keep_checkpoints_whole(runner: Runner) -> None:
    """Gives a run :class:`WholeCheckpointHook` in place of MMEngine's own, and the validation that it may lack."""
    for hook in runner.hooks:
        if type(hook) is CheckpointHook:  # not one of the user's own
            hook.__class__ = WholeCheckpointHook
    if not any(isinstance(hook, MissedValidationHook) for hook in runner.hooks):
        runner.register_hook(MissedValidationHook())


def choose_checkpoint(runner: Runner) -> None:
    """Lets a run that is to go on from its work dir do so from the newest checkpoint that is whole, and says which.

    Raises:
        CheckpointError: There are checkpoints, and none is whole; the message names each.
    """
    if not isinstance(runner, Runner) or not runner._resume or runner._load_from is not None:
        return
    last = Path(runner.work_dir, LAST)
    named = last.read_text(encoding='utf-8', errors='replace').strip() if last.is_file() else None
    if named and ('://' in named or Path(named).is_dir()):  # remote, or of a sharded model: left to MMEngine
        runner._load_from = named
        return
    files = sorted({*_list_checkpoints(runner), *([Path(named)] if named and Path(named).is_file() else [])})
    faults, ages = {}, {}
    for file in files:
        try:
            ages[file] = _read_age(file)
        except CheckpointError as error:
            faults[file] = str(error)
    for file in sorted(ages, key=ages.get, reverse=True):
        fault = _find_damage(file)
        if not fault:
            _tell_choice(runner, file, faults, named)
            runner._load_from = str(file)
            return
        faults[file] = fault
    if faults:
        raise CheckpointError(f"There is no whole checkpoint in '{runner.work_dir}' to resume from: "
                              f"{' '.join(faults.values())} Leave --resume out to begin anew.")
    runner.logger.warning(f"There is no checkpoint in '{runner.work_dir}' to resume from: the run begins anew.")


def _tell_choice(runner: Runner, file: Path, faults: dict[Path, str], named: str | None) -> None:
    """Logs which checkpoint is resumed; as a warning where it is not simply the last."""
    reasons = list(faults.values())
    if named is None or not named:
        reasons.append(f"'{LAST}' is {'empty' if named == '' else 'missing'}.")
    elif not Path(named).is_file():
        reasons.append(f"'{LAST}' names '{named}', which is gone.")
    elif Path(named) not in faults and not file.samefile(named):
        reasons.append(f"'{LAST}' names '{named}', which is older.")
    log = runner.logger.warning if reasons else runner.logger.info
    log(f"Resuming from '{file}', the newest checkpoint that is whole. {' '.join(reasons)}".rstrip())


def _list_checkpoints(runner: Runner) -> Iterator[Path]:
    """The files that the run's checkpoint hook has saved, but for the best ones, which hold no optimizer."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            folder = Path(runner.work_dir)
            if hook.out_dir is not None and str(hook.out_dir) != str(runner.work_dir):
                folder = Path(hook.out_dir, folder.name)
            pattern = re.compile(re.escape(hook.filename_tmpl).replace(r'\{\}', r'\d+'))
            yield from (file for file in folder.glob('*') if pattern.fullmatch(file.name) and file.is_file())


def _read_age(file: Path) -> tuple[str, int]:
    """When a checkpoint was saved, as sorts; its weights stay on the disk.

    Raises:
        CheckpointError: It can not be read.
    """
    if file.stat().st_size == 0:
        raise CheckpointError(f"'{file}' is empty.")
    meta = load_checkpoint(file, mmap=True).get('meta', {})
    if 'iter' not in meta:
        raise CheckpointError(f"'{file}' has weights, but lacks meta['iter'], which MMEngine saves during training.")
    return str(meta.get('time', '')), int(meta['iter'])


def _find_damage(file: Path) -> str:
    """What of a checkpoint is not as it was written, by its checksums; empty where nothing is."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        return f"'{file}' can not be read: {error}."
    return damaged and f"'{file}' is damaged at '{damaged}'." or ''


def _progress(runner: Runner) -> int:
    return runner.epoch if isinstance(runner.train_loop, EpochBasedTrainLoop) else runner.iter


def _is_validation_due(runner: Runner) -> bool:
    """Whether the loop would validate where it is resumed, had it just come there."""
    loop, done = runner.train_loop, _progress(runner)
    if runner.val_loop is None or not done or not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
        return False
    if isinstance(loop, EpochBasedTrainLoop) and loop.iter != loop.epoch * len(loop.dataloader):
        return False  # saved within an epoch
    loop._decide_current_val_interval()
    end = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == end)


def _was_validated(runner: Runner) -> bool:
    """Whether the checkpoint that is resumed was validated, and what followed from that is in it.

    A validation that ended is in the log; what it may have changed is only in a checkpoint that was saved after it.
    """
    done, schedulers = _progress(runner), runner.param_schedulers or []
    if runner.message_hub.runtime_info.get(VALIDATED) == done:
        return True
    flat = [each for group in (schedulers.values() if isinstance(schedulers, dict) else [schedulers]) for each in group]
    if any(getattr(hook, 'save_best', None) for hook in runner.hooks) or any(
            isinstance(each, ReduceOnPlateauParamScheduler) for each in flat):
        return False
    if not runner._load_from:  # a FlexibleRunner has found the file itself
        return False
    saved = Path(runner._load_from).stat().st_mtime
    return any(_has_validation(file, done) for file in Path(runner.work_dir).glob('*/vis_data/scalars.json')
               if file.stat().st_mtime >= saved)


def _has_validation(scalars: Path, step: int) -> bool:
    def is_validation(line: str) -> bool:
        try:
            record: Any = json.loads(line)
        except ValueError:  # a process was killed while it wrote the line
            return False
        return isinstance(record, dict) and record.get('step') == step and not {'lr', 'loss', 'epoch'} & set(record)

    return any(map(is_validation, scalars.read_text(encoding='utf-8', errors='replace').splitlines()))
