"""Ends a training whose numbers are no more: losses, teachers' features or weights that are NaN or infinite."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from mmdet.datasets.samplers import GroupMultiSourceSampler, MultiSourceSampler
from mmdet.registry import HOOKS
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object, all_reduce, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from kd_det.compat import describe_not_finite
from kd_det.config.arguments import Count, Index, declared
from kd_det.config.files import ConfigurationError
from kd_det.distillers.detection_distiller import DetectionDistiller
from kd_det.distillers.monitor import OF_TERM, Read, explain_losses
from kd_det.distillers.supervision import get_boxes
from kd_det.teachers.engine import to_local

ENDLESS = (InfiniteSampler, MultiSourceSampler, GroupMultiSourceSampler)  # each rank takes its share of them

LEAST_SCALE = 2.0**-8  # of a GradScaler that starts at 1 or above; float16 gradients above 1e7 would still fit


@HOOKS.register_module()
class FiniteHook(Hook):
    """Ends a training as soon as it can only fail, and says what is not finite, where, and since which step.

    Every training that kd_det starts has it, a plain one too, and every distillation whose config lists
    :class:`~kd_det.training.hooks.DistillHook`.

    - The losses of each step, which MMEngine reads for its log anyway. Where a ``GradScaler`` skips such steps, as
      mixed precision does, or perhaps the strategy of a ``FlexibleRunner``, only many in a row end the run, or a scale
      that has fallen to nothing; and where the scale is fixed, many steps in a row that the optimizer did not make.
    - The teachers' features, every ``interval`` steps, for what the steps between have noted on the device.
    - The weights: before the first step, after an epoch, before a validation and before a checkpoint is saved.

    On several ranks all end, with the same words: they ask each other every ``interval`` steps.

    Args:
        interval: Steps between two looks for which the device or other ranks are waited for.
        patience: How many steps in a row a ``GradScaler`` may skip because a loss, or at a fixed scale a gradient, is
            not finite.
    """
    priority = 'NORMAL'  # after MMEngine's log has the losses, and before anything is saved

    @declared
    def __init__(self, interval: Count = 10, patience: Index = 10) -> None:
        self.interval, self.patience = interval, max(1, patience)
        self.skipped, self.first_skipped = 0, ''
        self.fault: tuple[int, str] | None = None  # since which iteration, what; other ranks may not know of it yet
        self.broken_steps: dict[int, list[Read]] = {}  # by iteration, what of the teachers was not finite
        self.batch: Any = None  # of this step, as the data loader gave it
        self.fixed_scales: list[FixedScale] = []

    def before_train(self, runner: Runner) -> None:
        self.fixed_scales = [FixedScale(each) for each in _list_wrappers(runner)
                             if getattr(each, '_scale_update_param', None) and each.loss_scaler.is_enabled()]
        found = describe_weights(runner)
        if found:
            self._note(runner, f'The student is not finite before the first step: {found[0]}. Look at where its '
                               'weights come from: load_from, the init_cfg of their parts, model.inherit.')
        self._agree()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.batch = data_batch

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        due = (runner.iter + 1) % self.interval == 0
        saves = _saves_now(runner)
        if self.fault is None:
            self._note(runner, self._find_fault(runner, due, outputs) or (
                explain_weights(runner, runner.iter) if saves else None))
        if get_world_size() == 1 or due or saves:
            self._agree()

    def after_train_epoch(self, runner: Runner) -> None:
        self._check_weights(runner)

    def before_val(self, runner: Runner) -> None:
        self._check_weights(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Looks at what is saved, on the rank that saves: an EMA's average too."""
        for key in ('state_dict', 'ema_state_dict'):
            found = describe_not_finite(checkpoint.get(key) or {}, dict(find_model(runner).named_parameters()))
            if found:
                raise ConfigurationError(f'The weights are not finite, and no checkpoint of them is saved: {found} in '
                                         f"'{key}'. {advise_on_divergence(runner)}")

    def _check_weights(self, runner: Runner) -> None:
        if self.fault is None:
            self._read_noted(runner)
            self._note(runner, explain_weights(runner, runner.iter - 1)
                       or self._explain_teachers(runner))
        self._agree()

    def _find_fault(self, runner: Runner, due: bool, outputs: dict | None) -> str | None:
        scalars, scalers = runner.message_hub.log_scalars, _find_scalers(runner)
        is_finite = 'train/loss' not in scalars or math.isfinite(scalars['train/loss'].current())
        noted = {} if is_finite and not due else self._read_noted(runner)
        explained = self._explain_teachers(runner) if is_finite else \
            self._explain(runner, runner.iter, noted.get(runner.iter, []), outputs or {})
        if not scalers and not _may_skip(runner):
            norm = scalars.get('train/grad_norm')
            return explain_weights(runner, runner.iter) \
                if explained is None and norm is not None and not math.isfinite(norm.current()) else explained
        self.skipped = 0 if is_finite else self.skipped + 1
        left_out = [each for each in self.fixed_scales if each.count_left_out(due) >= self.patience]
        if is_finite:
            return explained or (left_out[0].explain(runner) if left_out else
                                 _explain_scale(runner, scalers) if due else None)
        self.first_skipped = self.first_skipped if self.skipped > 1 else explained or ''
        by_whom = ', which the GradScaler has skipped' if scalers else ''
        return (f'{self.first_skipped} The loss has not been finite for {self.skipped} steps since{by_whom}.'
                if self.skipped >= self.patience else None)

    def _read_noted(self, runner: Runner) -> dict[int, list[Read]]:
        """What of the terms' reads was not finite, by step, since this was asked last; waits for the device."""
        distiller = find_model(runner)
        noted = distiller.reads.find() if isinstance(distiller, DetectionDistiller) else {}
        for step, reads in noted.items():
            of_teachers = [read for read in reads if read.owner != 'student']
            if of_teachers:
                self.broken_steps[step] = of_teachers
            elif _may_skip(runner):  # recovered
                self.broken_steps.clear()
        return noted

    def _explain_teachers(self, runner: Runner) -> str | None:
        """Explains teachers' features that were not finite; with a GradScaler, in many steps in a row."""
        if len(self.broken_steps) < (self.patience if _may_skip(runner) else 1):
            return None
        step, reads = next(iter(self.broken_steps.items()))
        return self._explain(runner, step, reads, {})

    def _explain(self, runner: Runner, step: int, reads: list[Read], outputs: Iterable[str]) -> str | None:
        """Explains the losses of a step, by what of the terms' reads was not finite in it.

        Args:
            runner: The runner.
            step: The iteration.
            reads: What was not finite.
            outputs: The names of what was logged of the step, if it is this one.
        """
        scalars, distiller = runner.message_hub.log_scalars, find_model(runner)
        values = {name: scalars[f'train/{name}'].current() for name in outputs if f'train/{name}' in scalars}
        terms = list(distiller.terms) if isinstance(distiller, DetectionDistiller) else []
        found = explain_losses(values, terms, reads, _when(runner, step))
        if found is None:
            return None
        text, fault = found
        if fault == 'teacher':
            return f'{text} {_advise_on_teacher(distiller, reads)}'
        if fault == 'term':
            return f'{text} {OF_TERM}'
        weights = describe_weights(runner)
        state = (f'A gradient of the step before was not finite, or weights have grown too large: {weights[0]} now.'
                 f'{_list_terms(runner)} ' if weights and any(read.owner == 'student' for read in reads) else '')
        return f'{text} {state}{_explain_data(runner, self.batch) or advise_on_divergence(runner)}'

    def _note(self, runner: Runner, text: str | None) -> None:
        self.fault = None if text is None else (runner.iter, text)

    def _agree(self) -> None:
        """Ends the training on every rank where any has found a fault."""
        faults = [self.fault]
        if get_world_size() > 1:
            number = torch.tensor([float(self.fault is not None)])
            all_reduce(number)
            faults = all_gather_object(self.fault) if number.item() else []
        found = [fault for fault in faults if fault is not None]
        if found:  # gradients carry what one rank has found to all others in the next step
            raise ConfigurationError(min(found)[1])


class FixedScale:
    """Counts the steps in a row that an optimizer does not make at a fixed loss scale, for gradients are not finite.

    A scale that follows the gradients falls with each of them; this one does not, and nothing tells.

    Args:
        wrapper: MMEngine's ``AmpOptimWrapper``.
    """

    def __init__(self, wrapper: Any) -> None:
        self.wrapper, self.was_called = wrapper, False
        self.left_out: int | torch.Tensor = 0
        wrapper.optimizer.register_step_post_hook(self._note)

    def _note(self, optimizer: Any, *_: Any) -> None:
        found = getattr(optimizer, 'found_inf', None)  # told to a fused one, which leaves its step out on the device
        self.was_called, self.left_out = True, 0 if found is None else found * (self.left_out + 1)

    def count_left_out(self, waits: bool) -> int:
        """How many, after a step of training; 0 where the device knows it alone and is not to be waited for."""
        if self.wrapper.should_update():  # with accumulated gradients now and then
            self.left_out, self.was_called = self.left_out + (not self.was_called), False
        return int(self.left_out) if waits or isinstance(self.left_out, int) else 0

    def explain(self, runner: Runner) -> str:
        scale = self.wrapper.loss_scaler.get_scale()
        return (f'The optimizer has made none of its last {int(self.left_out)} steps, {_when(runner)} and before: '
                f"gradients are not finite at the fixed optim_wrapper.loss_scale of {scale:g}. Lower it, or take "
                f"loss_scale='dynamic'. Where that does not help: {advise_on_divergence(runner)}")


def add_finite_hook(runner: Runner) -> None:
    """Gives a runner, a ``FlexibleRunner`` too, a :class:`FiniteHook` unless it has one."""
    if not any(isinstance(hook, FiniteHook) for hook in runner.hooks):
        runner.register_hook(FiniteHook())


@contextmanager
def explain_divergence(runner: Runner) -> Iterator[None]:
    """Explains an error in a step that came of numbers that are not finite: matchers and samplers refuse them.

    Raises:
        ConfigurationError: The teachers' features of this step are not finite, or the weights, or the batch.
    """
    try:
        yield
    except Exception as error:
        if type(error).__module__.split('.')[0] == 'kd_det':
            raise
        hook = next((hook for hook in runner.hooks if isinstance(hook, FiniteHook)), FiniteHook())
        reads = hook._read_noted(runner).get(runner.iter, [])
        text = (hook._explain(runner, runner.iter, reads, ()) or explain_weights(runner, runner.iter - 1)
                or _explain_data(runner, hook.batch))
        if not text:
            raise
        raise ConfigurationError(f'{text} ({type(error).__name__}: {error})'.replace('\n', ' ')) from error


def describe_weights(runner: Runner) -> tuple[str, bool] | None:
    """Describes which weights of what is trained, the terms' own among them, or else which buffers are not finite.

    Returns:
        The description, and whether it is of weights; None where all are finite.
    """
    model = find_model(runner)
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
    what, cause = (('weights', 'The gradient of a loss was not, though the losses before were.') if found[1] else
                   ('statistics', 'A feature was not, in one of the steps before.'))
    return (f"The student's {what} are not finite after {_when(runner, iteration)[3:]}: {found[0]}. {cause}"
            f'{_list_terms(runner)} {advise_on_divergence(runner)}')


def _advise_on_teacher(distiller: DetectionDistiller, reads: Iterable[Read]) -> str:
    owner = next(read.owner for read in reads if read.owner != 'student')
    return distiller.teachers[int(owner.partition('[')[2].rstrip(']') or 0)].advise_on_overflow()


def _list_terms(runner: Runner) -> str:
    distiller = find_model(runner)
    terms = list(distiller.terms) if isinstance(distiller, DetectionDistiller) else []
    return f" Terms at work: {', '.join(f'model.distill.{name}' for name in terms)}." if terms else ''


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
        inputs = find_model(runner).data_preprocessor(data_batch, True)['inputs']
        if not inputs.isfinite().all():
            return 'The images of this batch are not finite: look at mean and std of the data_preprocessor.'
    return None


def _list_wrappers(runner: Runner) -> list[Any]:
    """What MMEngine wraps the optimizer in, or each of several."""
    wrapper = getattr(runner, 'optim_wrapper', None)
    return list(wrapper.values()) if hasattr(wrapper, 'values') else [wrapper]


def _may_skip(runner: Runner) -> bool:
    """Whether a step whose loss is not finite may be left out: by a GradScaler, or by a strategy's own optimizer."""
    return bool(_find_scalers(runner)) or not all(isinstance(each, OptimWrapper) for each in _list_wrappers(runner))


def _find_scalers(runner: Runner) -> list[Any]:
    """The GradScalers at work, of one optimizer or several."""
    scalers = [getattr(each, 'loss_scaler', None) for each in _list_wrappers(runner)]
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
        epoch = f' (epoch {int(iteration // count_batches(runner)) + 1})'
    return f'in iteration {iteration + 1}{epoch}'


def count_batches(runner: Runner) -> float:
    """The batches of an epoch that this rank sees, of an endless sampler too, which has the length of all data."""
    loader = runner.train_dataloader
    shared = get_world_size() if isinstance(find_sampler(loader), ENDLESS) else 1
    return len(loader) / shared


def find_sampler(loader: DataLoader) -> Any:
    """The sampler of a loader's images, which its sampler of batches has where the config names one of these."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def find_common_seed(runner: Runner) -> int:
    """The seed of the run, the same on all ranks, also with ``randomness=dict(diff_rank_seed=True)``."""
    return runner.seed - (get_rank() if runner._randomness_cfg.get('diff_rank_seed') else 0)


def find_model(runner: Runner) -> nn.Module:
    """The model of a run, out of the wrapper by which several processes train it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
