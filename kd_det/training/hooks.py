"""Connects a distiller with MMEngine's Runner: pre-flight, schedules, seeds, checkpoints, and the table of origins."""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from io import StringIO
from time import perf_counter
from typing import Any

from mmdet.registry import HOOKS
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner, set_random_seed
from mmengine.runner.checkpoint import weights_to_cpu
from rich.table import Table

from kd_det.checks.data import check_annotations, check_labels
from kd_det.checks.preflight import evaluate_teacher, require_names, require_skill
from kd_det.compat import log_operator_backend
from kd_det.compat.console import PlainConsole
from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import Count, Share, at, check_arguments, declared
from kd_det.config.classes import find_label_names, get_metainfo
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.inheritance import OF_RULES, ORIGINS
from kd_det.distillers.supervision import bring_detections
from kd_det.teachers import Guide, Teacher, TeacherError
from kd_det.teachers.guide import list_guides
from kd_det.training.finiteness import add_finite_hook, count_batches, find_model
from kd_det.training.learners import (
    average_peers,
    clip_by_learner,
    evaluate_others,
    follow_student,
    list_averages,
    load_peers,
    save_peers,
)
from kd_det.training.probe import ProbeSettings, StudentProbe, reward_policy, start_policy
from kd_det.training.prompts import learn_prompts
from kd_det.training.replay import SeededBatches, seed_of_step, training_epoch
from kd_det.training.runner import use_one_metainfo
from kd_det.training.saving import choose_checkpoint, keep_checkpoints_whole

CHECKPOINT_KEY = 'distill'


@declared
@dataclass(frozen=True)
class Preflight:
    """How a teacher is tried before training.

    Args:
        images: At most so many validation images.
        min_map: The mAP of its boxes below which training stops.
    """
    images: Count = 64
    min_map: Share = 0.01


PREFLIGHT = asdict(Preflight())


@HOOKS.register_module()
class DistillHook(Hook):
    """What distillation needs of the training loop.

    Every distillation config lists it: ``default_hooks=dict(distill=dict(type='DistillHook'))``. With a plain detector
    it only tells the epoch, and brings the :class:`~kd_det.training.finiteness.FiniteHook`.

    - Before training the teacher is loaded, evaluated (pre-flight), and a table tells where all weights came from.
      Terms with prompts learn them on it (:func:`~kd_det.training.prompts.learn_prompts`).
    - Each step the weights' schedules move, and the random numbers are set from seed and iteration, so that a resumed
      run goes on as the uninterrupted one would; where training counts iterations, those of each batch, too. (Not when
      every term's weight is 0: then nothing differs from plain training.)
    - The log gets what distilling costs each step, ``kd_time`` in seconds and ``kd_memory`` in MiB, see
      :class:`~kd_det.distillers.costs.StepCost`.
    - At the start of each epoch :class:`~kd_det.training.replay.ReplayedRandomness` is told which it is; at its end the
      teachers' caches report.
    - Each checkpoint gets an entry ``'distill'``, see below. MMEngine's ``CheckpointHook`` gives way to
      :class:`~kd_det.training.saving.WholeCheckpointHook`.
    - After training the teacher's fingerprint must be what it was.

    **What lies in a checkpoint.** Beside what MMEngine saves of every training (``meta``, ``message_hub``,
    ``optimizer``, ``param_schedulers``):

    - ``state_dict``: that of the plain student, key by key, so that MMDetection loads the file with the student's
      config; no teacher, no adapters. With an ``EMAHook`` it is the averaged student, and ``ema_state_dict`` the
      trained one.
    - ``distill``: what only a resumed run needs. ``terms`` is the state dict of the terms' own parameters, their
      adapters first of all, as ``<term>.<parameter>``; ``weights`` has for each term whose weight is balanced what its
      :class:`~kd_det.distillers.schedules.Balance` has measured; ``ranges`` those of a student that is trained for
      integers, by which an export writes the same; ``peers`` has the state dict of each learner beside the student,
      averaged as the student's is, and ``trained_peers`` then the trained ones; ``guides`` what those guides have
      learnt that do learn, and ``averaged_guides`` the averages of gates; ``policy`` what a policy has learnt;
      ``prompted_by`` the fingerprints of the teachers on which terms have learnt prompts.
    - ``optimizer``: the state of the student's parameters, then that of the terms'.
    - ``meta['dataset_meta']``: the names of the student's classes.

    Args:
        preflight: The arguments of a :class:`Preflight`. Training stops where the teacher's boxes reach less, and where
            they lie on objects of other classes than their names say; None for no pre-flight.
        probe: The arguments of a :class:`~kd_det.training.probe.ProbeSettings`: how the student is evaluated for a
            policy that learns.

    Raises:
        ArgumentError: An argument does not fit.
    """
    priority = 'ABOVE_NORMAL'  # before EMAHook exchanges weights at the same point

    @declared
    def __init__(self, preflight: dict[str, Any] | None = PREFLIGHT, probe: dict[str, Any] | None = None) -> None:
        with at('preflight'):
            check_arguments(Preflight, preflight or {})
        with at('probe'):
            check_arguments(ProbeSettings, probe or {})
        self.preflight = None if preflight is None else Preflight(**preflight)
        self.probe_settings = ProbeSettings(**(probe or {}))
        self._probe: StudentProbe | None = None
        self._fingerprints: list[str] = []

    def before_run(self, runner: Runner) -> None:
        if runner._train_loop is not None:  # it trains; perhaps started by MMDetection's own tools/train.py
            keep_checkpoints_whole(runner)
            choose_checkpoint(runner)

    def before_train(self, runner: Runner) -> None:
        add_finite_hook(runner)
        distiller = _find_distiller(runner)
        if distiller is None:
            return
        log_operator_backend()
        check_annotations(runner.cfg, ('train', 'val'))
        if distiller.peers:
            clip_by_learner(runner, distiller)
        teachers = distiller.build_teachers()
        self._fingerprints = [teacher.fingerprint() for teacher in teachers]
        loops = dict(train=runner.train_loop, val=runner.val_loop)
        for loop in loops.values():
            use_one_metainfo(loop)
        check_labels({split: loop.dataloader.dataset for split, loop in loops.items() if loop is not None},
                     dict(val=runner.val_loop.evaluator.metrics) if runner.val_loop else {})
        if bring_detections(distiller.pseudo_labels, teachers, runner.train_dataloader.dataset, runner.hooks):
            restart_workers(runner.train_loop)
        if _sets_randomness(distiller):
            seed_batches(runner)
        classes = distiller.match_classes(find_label_names(runner.train_dataloader.dataset))
        for name, teacher in list_guides(teachers, 'model.teacher'):
            if self.preflight is not None:
                try:
                    self._check_teacher(runner, teacher)
                except TeacherError as error:
                    if teacher in teachers and len(teachers) == 1:
                        raise
                    raise TeacherError(f'{name}: {error}') from error
            teacher.before_training()
        learn_prompts(runner, distiller)
        self._probe = start_policy(runner, distiller, self.probe_settings)
        if is_main_process():
            runner.logger.info('\n'.join(['Where the weights came from:', build_origin_table(distiller), *classes]))

    def _check_teacher(self, runner: Runner, teacher: Guide) -> None:
        """Tries a guide, a frozen detector on validation images.

        Raises:
            TeacherError: It fails.
        """
        if not isinstance(teacher, Teacher):
            found = teacher.report(runner, self.preflight.images, self.preflight.min_map)
            if found:
                runner.logger.info(f'Pre-flight: {found}')
        if not teacher.checkpoint or not teacher.detects:
            if teacher.checkpoint:
                runner.logger.warning(f'Pre-flight: {teacher.described} detects nothing here, so it goes unchecked.')
            return  # a random teacher is the user's explicit wish, and detects nothing
        skill = evaluate_teacher(runner, teacher, self.preflight.images)
        if skill is None:
            runner.logger.warning('Pre-flight: the config has no validation data, so the teacher goes unchecked.')
            return
        metrics = ', '.join(f'{name} {value:.3f}' for name, value in skill.metrics.items())
        runner.logger.info(f'Pre-flight: teacher {teacher.checkpoint} on up to {self.preflight.images} images: '
                           f'{metrics}')
        require_names(skill, teacher)
        require_skill(skill, self.preflight.min_map, self.preflight.images)

    def before_train_epoch(self, runner: Runner) -> None:
        training_epoch().set(runner.epoch)
        self._set_progress(runner)  # the first batch is loaded before the first iteration is announced

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        self._set_progress(runner)
        distiller = _find_distiller(runner)
        if distiller is not None:
            reward_policy(runner, distiller, self._probe)

    def _set_progress(self, runner: Runner) -> None:
        """Tells the distiller where the training stands, and seeds the step by that."""
        distiller = _find_distiller(runner)
        if distiller is None:
            return
        distiller.set_progress(runner.iter, runner.iter / count_batches(runner))
        if distiller.quantizer is not None:
            distiller.quantizer.set_progress(runner.iter / runner.max_iters)
        follow_student(distiller)
        if _sets_randomness(distiller):
            set_random_seed(seed_of_step(runner.seed, runner.iter))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        distiller = _find_distiller(runner)
        if distiller is None:
            return
        if getattr(runner.optim_wrapper, 'should_update', lambda: True)():  # with accumulated gradients now and then
            for guide in distiller.teachers:
                guide.after_step()
        if distiller.peers:  # without them there is no gate either
            average_peers(runner, distiller)
        if distiller.teachers:
            runner.message_hub.update_scalar('train/kd_time', distiller.cost.seconds)
            runner.message_hub.update_scalar('train/kd_memory', distiller.cost.megabytes)

    def before_val_epoch(self, runner: Runner) -> None:
        """Gives averaged weights the ranges of the trained ones before an ``EMAHook`` exchanges both."""
        distiller = _find_distiller(runner)
        if distiller is not None and distiller.quantizer is not None:
            for hook in list_averages(runner):
                hook.ema_model.module.quantizer.load_state(distiller.quantizer.state())

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Evaluates the other learners and the ensembles, while an ``EMAHook`` still has averages in their place."""
        distiller = _find_distiller(runner)
        if distiller is not None and runner._train_loop is not None:
            found = evaluate_others(runner, distiller)
            if metrics is not None:
                metrics.update(found)

    def after_train_epoch(self, runner: Runner) -> None:
        distiller = _find_distiller(runner)
        for _, teacher in list_guides(() if distiller is None else distiller.teachers):
            if teacher.cache is not None:
                runner.logger.info(teacher.cache.report())

    def after_train(self, runner: Runner) -> None:
        distiller = _find_distiller(runner)
        if distiller is not None and [teacher.fingerprint() for teacher in distiller.teachers] != self._fingerprints:
            raise RuntimeError("The teacher's weights or buffers changed during training. Some hook or module writes "
                               'to it.')
        if distiller is not None and distiller.policy is not None:
            runner.logger.info(f'Policy: {distiller.policy.report()}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        distiller = _find_distiller(runner)
        if distiller is not None:
            # init_detector wants one
            checkpoint['meta']['dataset_meta'] = get_metainfo(runner.train_dataloader.dataset)
            balances = {name: state for learner in distiller.learners
                        for name, state in learner.monitor.state_dict().items()}
            guides = {str(index): guide.state_dict() for index, guide in enumerate(distiller.teachers)
                      if not isinstance(guide, Teacher) or guide.has_student_labels}
            checkpoint[CHECKPOINT_KEY] = dict(
                terms=weights_to_cpu(distiller.terms.state_dict()), weights=balances, **save_peers(runner, distiller))
            if any(guides.values()):
                checkpoint[CHECKPOINT_KEY]['guides'] = {index: weights_to_cpu(state)
                                                        for index, state in guides.items() if state}
            prompted_by = {name: term.prompted_by for name, term in distiller.terms.items() if term.learns_beforehand}
            if prompted_by:
                checkpoint[CHECKPOINT_KEY]['prompted_by'] = prompted_by
            if distiller.policy is not None:
                checkpoint[CHECKPOINT_KEY]['policy'] = distiller.policy.state_dict()
            if distiller.quantizer is not None:
                checkpoint[CHECKPOINT_KEY]['ranges'] = distiller.quantizer.state()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        distiller = _find_distiller(runner)
        if distiller is None:
            return
        distiller.origins.mark(checkpoint.get('state_dict', checkpoint), 'checkpoint')
        if not runner._resume:
            return
        if CHECKPOINT_KEY in checkpoint:
            stored = checkpoint[CHECKPOINT_KEY]
            distiller.load_terms(stored['terms'])
            for name, fingerprint in stored.get('prompted_by', {}).items():
                distiller.terms[name].prompted_by = fingerprint
            for learner in distiller.learners:
                learner.monitor.load_state_dict(stored.get('weights', {}))
            load_peers(runner, distiller, stored)
            for index, state in stored.get('guides', {}).items():
                distiller.teachers[int(index)].load_state_dict(state)
            if distiller.policy is not None:
                distiller.policy.load_state_dict(stored.get('policy', {}))
            if distiller.quantizer is not None and 'ranges' in checkpoint[CHECKPOINT_KEY]:
                distiller.quantizer.load_state(checkpoint[CHECKPOINT_KEY]['ranges'])
        elif len(distiller.terms):
            runner.logger.warning("The resumed checkpoint holds no 'distill': it was not written by a distillation. "
                                  'The adapters start anew.')


def restart_workers(loop: Any) -> None:
    """Lets workers that an ``IterBasedTrainLoop`` has started see its data set as it is now, and draws nothing."""
    if loop.dataloader.num_workers and hasattr(loop, 'dataloader_iterator'):
        loop.dataloader._iterator = None  # that of persistent workers
        with preserved_randomness():
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)


def seed_batches(runner: Runner) -> None:
    """Lets a loop that counts iterations fetch batches that do not depend on the steps before."""
    loop = runner.train_loop
    if hasattr(loop, 'dataloader_iterator') and not isinstance(loop.dataloader_iterator, SeededBatches):
        loop.dataloader_iterator = SeededBatches(loop.dataloader_iterator, runner.seed)


def build_origin_table(distiller: DetectionDistiller) -> str:
    """Makes a table of how many weights each part has, and where they came from."""
    parts = distiller.origins.count_by_part()
    used = {origin for counts in parts.values() for origin, count in counts.items() if count}
    origins = [origin for origin in ORIGINS if origin in used or origin not in OF_RULES]
    table = Table('part', *origins, 'weights')
    for column in table.columns[1:]:
        column.justify = 'right'

    def add(part: str, counts: dict) -> None:
        table.add_row(part, *(f'{counts.get(origin, 0):,}' if counts.get(origin) else '–' for origin in origins),
                      f'{sum(counts.values()):,}')

    for part, counts in parts.items():
        add(f'student.{part}', counts)
    for index, peer in enumerate(distiller.peers, 1):
        add(f'peer {index}', {'checkpoint' if hasattr(peer, 'start_from') else 'random':
                              sum(parameter.numel() for parameter in peer.parameters())})
    for name, term in distiller.terms.items():
        count = sum(parameter.numel() for parameter in term.parameters())
        if count:
            add(f'adapters of {name}', {distiller.terms_origin: count})
    for name, teacher in list_guides(distiller.teachers or ()):
        if teacher.num_parameters:
            add(name, {'checkpoint' if teacher.checkpoint else 'random': teacher.num_parameters})
    output = StringIO()
    PlainConsole(file=output, width=110, no_color=True).print(table)
    if distiller.inherited_parts and not used & {'inherited', 'checkpoint', *OF_RULES}:
        output.write(f"Nothing is inherited: of {', '.join(distiller.inherited_parts)} no layer has the teacher's "
                     "shape. A narrower student may select from its channels: model.inherit_by='selection'.\n")
    if distiller.not_inherited:
        output.write(f'Could not be inherited (absent in the teacher, or of another shape): '
                     f"{', '.join(distiller.not_inherited)}\n")
    return output.getvalue()


def _find_distiller(runner: Runner) -> DetectionDistiller | None:
    """The model of a run, out of its data-parallel wrapper; None where it is no distiller."""
    model = find_model(runner)
    return model if isinstance(model, DetectionDistiller) else None


def _sets_randomness(distiller: DetectionDistiller) -> bool:
    """Whether anything but the student's own losses teaches: else the run is a plain one, bit for bit."""
    labels = distiller.pseudo_labels
    return bool(len(distiller.terms) or distiller.learning_guides
                or (labels is not None and not labels.schedule.is_zero))


class NotebookProgress(Hook):
    """Shows below a notebook's cell how far its training is; MMEngine's log, where its level lets it, comes beside it.

    Args:
        show: Given the line whenever it has changed; by default what replaces the last one below the cell.
    """
    priority = 'VERY_LOW'
    pause = 1.0  # seconds between two lines

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self._show, self._shown, self._metrics = show or _make_display(), 0.0, ''

    def before_train(self, runner: Runner) -> None:
        self._tell(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if perf_counter() - self._shown > self.pause:
            self._tell(runner, done=runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._metrics = ''.join(f', {name} {value:.3f}' for name, value in (metrics or {}).items()
                                if name.endswith('_mAP'))
        self._tell(runner)

    def after_train(self, runner: Runner) -> None:
        self._tell(runner)

    def _tell(self, runner: Runner, done: int | None = None) -> None:
        scalars = runner.message_hub.log_scalars
        loss = f", loss {scalars['train/loss'].current():.3f}" if 'train/loss' in scalars else ''
        done = runner.iter if done is None else done
        self._show(f'{done} of {runner.max_iters} iterations, epoch {min(runner.epoch + 1, runner.max_epochs)} of '
                   f'{runner.max_epochs}{loss}{self._metrics}')
        self._shown = perf_counter()


def is_in_notebook() -> bool:
    """Whether a notebook's kernel runs this process, and is able to show what replaces what was shown before."""
    return 'ipykernel' in sys.modules and getattr(sys.modules['IPython'].get_ipython(), 'kernel', None) is not None


def _make_display() -> Callable[[str], None]:
    from IPython.display import HTML, display
    handle = display(HTML(''), display_id=True)
    return lambda line: handle.update(HTML(escape(line)))
