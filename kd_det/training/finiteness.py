"""Ends a training whose numbers are no more: losses, teachers' features or weights that are NaN or infinite."""
from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from kd_det.compat import describe_not_finite
from kd_det.config.files import ConfigurationError
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.monitor import OF_TERM, explain_losses
from kd_det.distillers.supervision import get_boxes
from kd_det.teachers.engine import to_local

LEAST_SCALE = 2.0**-8  # of a GradScaler that starts at 1 or above; float16 gradients above 1e7 would still fit


@HOOKS.register_module()
class FiniteHook(Hook):
    """Ends a training as soon as it can only fail, and says what is not finite, where, and since which step.

    Every training that kd_det starts has it, a plain one too, and every distillation whose config lists
    :class:`~kd_det.training.hooks.DistillHook`.

    - The losses of each step, which MMEngine reads for its log anyway. Where a ``GradScaler`` skips such steps, as
      mixed precision does, only many in a row end the run, or a scale that has fallen to nothing.
    - The teachers' features, every ``interval`` steps, for what the steps between have noted on the device.
    - The weights: before the first step, after an epoch, before a validation and before a checkpoint is saved.

    On several ranks all end, with the same words: they ask each other every ``interval`` steps.

    Args:
        interval: Steps between two looks for which the device or other ranks are waited for.
        patience: How many steps in a row a ``GradScaler`` may skip because a loss is not finite.
    """
    priority = 'NORMAL'  # after MMEngine's log has the losses, and before anything is saved

    def __init__(self, interval: int = 10, patience: int = 10) -> None:
        self.interval, self.patience = interval, patience
        self.skipped, self.first_skipped = 0, ''
        self.fault: str | None = None  # which the other ranks do not know of yet

    def before_train(self, runner: Runner) -> None:
        found = describe_weights(runner)
        if found:
            self.fault = (f'The student is not finite before the first step: {found[0]}. Look at where its weights '
                          'come from: load_from, the init_cfg of their parts, model.inherit.')
        self._agree()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        due = (runner.iter + 1) % self.interval == 0
        saves = _saves_now(runner)
        if self.fault is None:
            self.fault = self._find_fault(runner, due, data_batch, outputs) or (
                explain_weights(runner, runner.iter) if saves else None)
        if get_world_size() == 1 or due or saves:
            self._agree()

    def after_train_epoch(self, runner: Runner) -> None:
        self._check_weights(runner)

    def before_val(self, runner: Runner) -> None:
        self._check_weights(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Looks at what is saved, on the rank that saves: an EMA's average too."""
        for key in ('state_dict', 'ema_state_dict'):
            found = describe_not_finite(checkpoint.get(key) or {}, dict(_find_model(runner).named_parameters()))
            if found:
                raise ConfigurationError(f'The weights are not finite, and no checkpoint of them is saved: {found} in '
                                         f"'{key}'. {advise_on_divergence(runner)}")

    def _check_weights(self, runner: Runner) -> None:
        if self.fault is None:
            self.fault = explain_weights(runner, runner.iter - 1)
        self._agree()

    def _find_fault(self, runner: Runner, due: bool, data_batch: Any, outputs: dict | None) -> str | None:
        scalars = runner.message_hub.log_scalars
        scalers = _find_scalers(runner)
        is_finite = 'train/loss' not in scalars or math.isfinite(scalars['train/loss'].current())
        explained = None if is_finite and not due else self._explain(runner, data_batch, outputs, is_finite,
                                                                    lasting=bool(scalers))
        if not scalers:
            if explained is None and 'train/grad_norm' in scalars and \
                    not math.isfinite(scalars['train/grad_norm'].current()):
                return explain_weights(runner, runner.iter)
            return explained
        self.skipped = 0 if is_finite else self.skipped + 1
        if self.skipped == 1:
            self.first_skipped = explained or ''
        if self.skipped >= self.patience:
            return (f'{self.first_skipped} The loss has not been finite for {self.skipped} steps since, which the '
                    'GradScaler has skipped.')
        if is_finite and explained:
            return explained
        return _explain_scale(runner, scalers) if due else None

    def _explain(self, runner: Runner, data_batch: Any, outputs: dict | None, is_finite: bool,
                 lasting: bool) -> str | None:
        """Explains the losses of this step and the teachers' features of the last steps.

        With ``lasting``, features count that were not finite in every step that was noted.
        """
        scalars, distiller = runner.message_hub.log_scalars, _find_model(runner)
        noted = distiller.reads.find() if isinstance(distiller, DetectionDistiller) else {}
        iteration, reads = runner.iter, noted.get(runner.iter, [])
        if is_finite:
            noted = {step: [read for read in each if read.owner != 'student'] for step, each in noted.items()}
            steps = [step for step, each in noted.items() if each]
            if not steps or lasting and len(steps) < self.interval:
                return None
            iteration, reads = steps[0], noted[steps[0]]
        values = {name: scalars[f'train/{name}'].current() for name in (outputs or {}) if f'train/{name}' in scalars}
        terms = list(distiller.terms) if isinstance(distiller, DetectionDistiller) else []
        found = explain_losses(values, terms, reads, _when(runner, iteration))
        if found is None:
            return None
        text, fault = found
        if fault == 'teacher':
            index = int(reads[0].owner.partition('[')[2].rstrip(']') or 0)
            return f'{text} {distiller.teachers[index].advise_on_overflow()}'
        if fault == 'term':
            return f'{text} {OF_TERM}'
        return f'{text} {_explain_data(runner, data_batch) or advise_on_divergence(runner)}'

    def _agree(self) -> None:
        """Ends the training on every rank where any has found a fault."""
        faults = [self.fault]
        if get_world_size() > 1:
            number = torch.tensor([float(self.fault is not None)])
            all_reduce(number)
            faults = all_gather_object(self.fault) if number.item() else []
        for fault in filter(None, faults):
            raise ConfigurationError(fault)


def add_finite_hook(runner: Runner) -> None:
    """Gives a runner a :class:`FiniteHook` unless it has one."""
    if isinstance(runner, Runner) and not any(isinstance(hook, FiniteHook) for hook in runner.hooks):
        runner.register_hook(FiniteHook())


@contextmanager
def explain_divergence(runner: Runner) -> Iterator[None]:
    """Explains an error in a step that came of numbers that are not finite: matchers and samplers refuse them.

    Raises:
        ConfigurationError: The weights, or the teachers' features of this step, are not finite.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.split('.')[0] == 'kd_det':
            raise
        distiller, found = _find_model(runner), None
        if isinstance(distiller, DetectionDistiller):
            found = explain_losses({}, (), distiller.reads.find().get(runner.iter, []), _when(runner))
        text = (f'{found[0]} {distiller.teachers[0].advise_on_overflow()}' if found and found[1] == 'teacher' else
                explain_weights(runner, runner.iter - 1))
        if text is None:
            raise
        raise ConfigurationError(f'{text} ({type(error).__name__}: {error})'.replace('\n', ' ')) from error


def describe_weights(runner: Runner) -> tuple[str, bool] | None:
    """Describes which weights of what is trained, the terms' own among them, or else which buffers are not finite.

    Returns:
        The description, and whether it is of weights; None where all are finite.
    """
    model = _find_model(runner)
    for tensors, are_weights in ((model.named_parameters(), True), (model.named_buffers(), False)):
        found = describe_not_finite({name: to_local(each) for name, each in tensors}, None if are_weights else ())
        if found:
            return found, are_weights
    return None


def explain_weights(runner: Runner, iteration: int) -> str | None:
    """Explains weights that are not finite after an iteration, though losses were; None where all are."""
    found = describe_weights(runner)
    if found is None:
        return None
    distiller = _find_model(runner)
    terms = list(distiller.terms) if isinstance(distiller, DetectionDistiller) else []
    at_work = f" Terms at work: {', '.join(f'model.distill.{name}' for name in terms)}." if terms else ''
    what, cause = (('weights', 'The gradient of a loss was not, though the losses before were.') if found[1] else
                   ('statistics', 'A feature was not, in one of the steps before.'))
    return (f"The student's {what} are not finite after {_when(runner, iteration)[3:]}: {found[0]}. {cause}{at_work} "
            f'{advise_on_divergence(runner)}')


def advise_on_divergence(runner: Runner) -> str:
    """Says what to do about a training that diverges."""
    rates = []
    with suppress(Exception):  # an optimizer of another kind
        rates = [f'{rate:g}' for rate in dict.fromkeys(next(iter(runner.optim_wrapper.get_lr().values())))]
    rate = f' (now {rates[0]})' if rates else ''
    return (f'The training diverges: lower optim_wrapper.optimizer.lr{rate} or warm it up, or clip gradients with '
            'optim_wrapper.clip_grad=dict(max_norm=35); look at the boxes of the data with kd-det doctor CONFIG.')


def _explain_data(runner: Runner, data_batch: Any) -> str | None:
    """Whether it is the images or the boxes of the batch that are not finite."""
    with suppress(Exception):  # a batch of another kind
        for sample in data_batch['data_samples']:
            if not get_boxes(sample).isfinite().all():
                return f"A box of the image '{sample.get('img_path', sample.get('img_id'))}' is not finite: correct it."
        inputs = _find_model(runner).data_preprocessor(data_batch, True)['inputs']
        if not inputs.isfinite().all():
            return 'The images of this batch are not finite: look at mean and std of the data_preprocessor.'
    return None


def _find_scalers(runner: Runner) -> list[Any]:
    """The GradScalers at work, of one optimizer or several."""
    wrapper = getattr(runner, 'optim_wrapper', None)
    wrappers = list(wrapper.values()) if hasattr(wrapper, 'values') else [wrapper]
    scalers = [getattr(each, 'loss_scaler', None) for each in wrappers]
    return [scaler for scaler in scalers if scaler is not None and scaler.is_enabled()]


def _explain_scale(runner: Runner, scalers: list[Any]) -> str | None:
    for scaler in scalers:
        scale = scaler.get_scale()
        if scale < LEAST_SCALE * min(1.0, getattr(scaler, '_init_scale', 1.0)):
            return (f"The GradScaler's scale has fallen to {scale:g} {_when(runner)}: gradients are not finite in one "
                    f'step after the other, though losses are, and nothing is learnt. {advise_on_divergence(runner)}')
    return None


def _saves_now(runner: Runner) -> bool:
    """Whether a checkpoint is saved after this very step, and not at the end of an epoch."""
    return any(isinstance(hook, CheckpointHook) and not hook.by_epoch
               and (hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
                    or hook.save_last and hook.is_last_train_iter(runner)) for hook in runner.hooks)


def _when(runner: Runner, iteration: int | None = None) -> str:
    """A step, this one by default, as the log counts it: from 1 on."""
    iteration, epoch = runner.iter if iteration is None else iteration, ''
    with suppress(TypeError):  # data without an end has no length
        epoch = f' (epoch {iteration // len(runner.train_dataloader) + 1})'
    return f'in iteration {iteration + 1}{epoch}'


def _find_model(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
