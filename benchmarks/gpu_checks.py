"""What must be right on a GPU: sections of benchmarks/gpu.py.

Each is a generator of checks. With ``--dry`` these run on the CPU, on detectors of a few channels and images of some 64
pixels.
"""
from __future__ import annotations

import copy
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mmdet
import torch
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmcv.ops.sync_bn import SyncBatchNormFunction
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

import kd_det  # noqa: F401  registers everything, and serves mmcv's operators
from benchmarks.gpu import Check, Found, Setting
from kd_det.checks.synthetic import random_distiller, synthetic_batch
from kd_det.compat.process import preserved_randomness
from kd_det.config.choices import CONFIG_ROOT
from kd_det.config.composition import PAPER, distillation_config
from kd_det.config.detectors import read_model_config
from kd_det.config.files import load_config
from kd_det.config.methods import methods
from kd_det.distillers import DetectionDistiller
from kd_det.functional import blocks
from kd_det.losses.base import sum_parts
from kd_det.registry import build_detector, prepare_without_runner
from kd_det.study.pair import read_pair
from kd_det.study.step_costs import TEACHER, TERM, differentiate, list_parts
from kd_det.training.runner import build_runner

# By kind of detector: student and teacher on a GPU, and the config that is both in a dry run.
PAIRS = {'Faster R-CNN': ('faster_rcnn_r101_r18', f'{CONFIG_ROOT}/demo/baseline_faster_rcnn_r18.py'),
         'GFL': ('gfl_r101_r18', f'{CONFIG_ROOT}/demo/baseline_gfl_r18.py'),
         'YOLOX': ('yolox_l_s', f'{Path(mmdet.__file__).parent}/.mim/configs/yolox/yolox_nano_8xb8-300e_coco.py'),
         'DINO': ('dino_r50_r18', f'{CONFIG_ROOT}/demo/baseline_dino_r18.py')}
REDUCED = ('float16', 'bfloat16')

# What makes the host wait by its nature, by the kind of detector.
ON_THE_HOST = 'queries are matched on the host'
WAITING = {('Faster R-CNN', TEACHER): "MMDetection's RoI extractor looks for the regions of each level",
           ('DINO', TEACHER): "MMDetection's transformer loops over the shapes of the levels",
           ('DINO', f'{TERM}querykd_classes'): ON_THE_HOST, ('DINO', f'{TERM}querykd_boxes'): ON_THE_HOST,
           ('DINO', f'{TERM}targetquery'): "MMDetection's decoder compares the shapes of the levels with its memory"}
WAITING_ON_CPU = {('Faster R-CNN', f'{TERM}dkd'): 'F.one_hot looks at its indices, on the CPU alone'}
# Terms whose value depends on what is drawn on the device.
DRAWN = ('mgd', )
SAME = 5e-3  # relative deviation of a value or a gradient: sums in another order, without TF32


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Lets convolutions and matrix products round to TF32, or not."""
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [each.allow_tf32 for each in backends]
    try:
        for each in backends:
            each.allow_tf32 = allowed
        yield
    finally:
        for each, value in zip(backends, before):
            each.allow_tf32 = value


def deviation(actual: Tensor, expected: Tensor) -> float:
    """The relative error in the Euclidean norm; infinite for what is not finite."""
    actual, expected = (each.detach().cpu().double() for each in (actual, expected))
    error = float((actual - expected).norm() / expected.norm().clamp(min=1e-12))
    return error if error == error else float('inf')


def compose(setting: Setting, kind: str, method: str) -> Config:
    """The config of a distillation between random detectors."""
    student, teacher = read_pair_of(setting, kind)
    config = distillation_config(student, None, None, method, inherit=(), balance=PAPER)
    config.model.teacher = dict(config=read_teacher(teacher), checkpoint='none: random weights')
    return config


@cache
def read_pair_of(setting: Setting, kind: str) -> tuple[Config, str]:
    """The student's config, and the file of the teacher's."""
    large, small = PAIRS[kind]
    if setting.dry:
        return load_config(small), small
    pair = read_pair(f'{CONFIG_ROOT}/_base_/pairs/{large}.py')
    return pair.student, pair.teacher


read_teacher = cache(read_model_config)  # MMEngine reads many files for one


@cache
def build_all(setting: Setting, kind: str) -> tuple[DetectionDistiller, dict]:
    """A distiller with the terms of all methods that serve a kind of detectors, and a batch of noise."""
    config = compose(setting, kind, '+'.join(each.name for each in methods() if kind in (each.detectors or ())))
    prepare_without_runner(config, seed=0)
    distiller = random_distiller(config, setting.device)
    return distiller, synthetic_batch(distiller.student, 3, setting.choose((320, 320), (64, 64)), boxes=4)


# --------------------------------------------------------------------------------------------------------- operators

ROIS = torch.tensor([[0, 1.3, 2.1, 30.2, 25.7], [1, 0, 0, 43, 35], [0, 8, 8, 9, 9.5]])
TARGET = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
SHAPES, START = torch.tensor([(3, 4), (2, 2)]), torch.tensor([0, 12])
BOXES = torch.rand(200, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([60, 60, 30, 30])
BOXES[:, 2:] += BOXES[:, :2] + 5
SCORES = (torch.arange(200) * 77 % 200 + 1) / 256  # no two alike in any precision

# Each a function of a mover of constants to device and precision, and of random tensors of the given shapes.
OPERATORS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = dict(
    roi_align=(lambda to, x: ops.roi_align(x, to(ROIS), 3, 0.25), [(2, 3, 9, 11)]),
    roi_pool=(lambda to, x: ops.roi_pool(x, to(ROIS), 3, 0.25), [(2, 3, 9, 11)]),
    deform_roi_pool=(lambda to, x, offset: ops.deform_roi_pool(x, to(ROIS), offset, 3, 0.25),
                     [(2, 3, 9, 11), (3, 2, 3, 3)]),
    deform_conv=(lambda to, x, offset, weight: ops.deform_conv2d(x, offset, weight, 1, 1),
                 [(2, 4, 5, 5), (2, 18, 5, 5), (6, 4, 3, 3)]),
    modulated_deform_conv=(lambda to, *each: ops.modulated_deform_conv2d(*each, None, 1, 1),
                           [(2, 4, 5, 5), (2, 18, 5, 5), (2, 9, 5, 5), (6, 4, 3, 3)]),
    modulated_deform_conv_of_larger_maps=(lambda to, *each: ops.modulated_deform_conv2d(*each, None, 1, 1),
                                          [(2, 4, 5, 5), (2, 18, 7, 6), (2, 9, 7, 6), (6, 4, 3, 3)]),
    carafe=(lambda to, x, masks: ops.carafe(x, masks, 3, 2, 2), [(2, 4, 3, 5), (2, 18, 6, 10)]),
    masked_conv=(lambda to, x, weight, bias: ops.masked_conv2d(x, to(torch.eye(5, 7) > 0)[None], weight, bias, 1),
                 [(1, 4, 5, 7), (6, 4, 3, 3), (6, )]),
    sigmoid_focal_loss=(lambda to, x: ops.sigmoid_focal_loss(x, to(TARGET), 2.0, 0.25, None, 'none'), [(8, 4)]),
    softmax_focal_loss=(lambda to, x: ops.softmax_focal_loss(x, to(TARGET), 2.0, 0.25, None, 'sum'), [(8, 4)]),
    ms_deform_attn=(lambda to, value, *others: MultiScaleDeformableAttnFunction.apply(
        value, to(SHAPES), to(START), *others, 64), [(2, 16, 2, 4), (2, 3, 2, 2, 2, 2), (2, 3, 2, 2, 2)]),
    sync_bn=(lambda to, x, weight, bias: SyncBatchNormFunction.apply(
        x, to(torch.zeros(3)).float(), to(torch.ones(3)).float(), weight, bias, 0.1, 1e-5, None, 1, 'default'),
        [(4, 3, 5, 5), (3, ), (3, )]),
    nms=(lambda to: ops.nms(to(BOXES), to(SCORES), 0.5), []),
    nms_of_pixels=(lambda to: ops.nms(to(BOXES), to(SCORES), 0.5, offset=1), []),
    soft_nms=(lambda to: ops.soft_nms(to(BOXES), to(SCORES), method='gaussian'), []),
    nms_match=(lambda to: ops.nms_match(to(torch.cat([BOXES, SCORES[:, None]], 1)), 0.5), []),
)
# mmcv itself refuses these.
UNSERVED = dict(sync_bn=('bfloat16', ))
TOLERANCES = dict(float32=1e-4, float16=2e-3, bfloat16=2e-2)  # relative


def run_operator(name: str, device: str, dtype: str) -> list[Tensor]:
    """What an operator of :data:`OPERATORS` puts out, and its gradients, on the CPU."""
    operator, shapes = OPERATORS[name]
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    inputs = [torch.rand(shape, generator=generator).to(device, kind).requires_grad_() for shape in shapes]
    found = operator(lambda each: each.to(device, kind if each.is_floating_point() else None), *inputs)
    outputs = [torch.as_tensor(each) for each in (found if isinstance(found, (tuple, list)) else [found])]
    if outputs[0].requires_grad and name != 'masked_conv':  # which has no backward pass, in mmcv neither
        outputs += torch.autograd.grad(outputs[0].float().square().sum(), inputs)
    return [each.detach().cpu() for each in outputs]


def operators(setting: Setting) -> Iterator[Check]:
    """Each operator that kd_det serves to mmcv, forward and backward, against itself on the CPU."""

    def compare(name: str) -> Found:
        numbers = {}
        for dtype in TOLERANCES:
            if dtype not in UNSERVED.get(name, ()):
                pairs = zip(run_operator(name, setting.device, dtype), run_operator(name, 'cpu', dtype), strict=True)
                numbers[dtype] = max(deviation(*pair) for pair in pairs)
        return _within(numbers, TOLERANCES)

    def repeat() -> Found:
        torch.use_deterministic_algorithms(True)  # in which PyTorch refuses RoIAlign's own gradient on a GPU
        try:
            return compare('roi_align')
        finally:
            torch.use_deterministic_algorithms(False)

    with tf32(False):
        for name in OPERATORS:
            yield Check(name, partial(compare, name))
        yield Check('roi_align, deterministic', repeat)


def _within(numbers: dict[str, float], most: dict[str, float] | float) -> Found:
    """Deviations, none of which may exceed its tolerance."""
    above = [name for name, value in numbers.items() if not value <= (most[name] if isinstance(most, dict) else most)]
    shown = numbers.items() if len(numbers) <= 4 else [max(numbers.items(), key=lambda each: each[1])]
    text = ', '.join(f'{name} {value:.0e}' for name, value in shown)
    return Found(text if len(numbers) <= 4 else f'{len(numbers)} compared, at most {text}', numbers,
                 f"too far off: {', '.join(f'{name} {numbers[name]:.1e}' for name in above)}" if above else '')


# ------------------------------------------------------------------------------------------------------------- terms


def terms(setting: Setting) -> Iterator[Check]:
    """Every term of every method on the device against the same term on the CPU, of the same features and outputs."""

    def compare(kind: str) -> Found:
        distiller, batch = build_all(setting, kind)
        observed, numbers = observe(distiller, batch).context, {}
        # Both cut from the graph: one level's gradient would hold those of the levels that are computed from it.
        context, moved = (replace(move(observed, device, setting.device), valid_cells={})
                          for device in (setting.device, 'cpu'))
        for name, term in distiller.terms.items():
            if name not in DRAWN:
                value, gradients = differentiate(term, context)
                expected, its = differentiate(copy.deepcopy(term).cpu(), moved)
                numbers[name] = deviation(value, expected)
                if not term.student_heads:  # decoded boxes hang on what the head put out on the device
                    numbers[f'{name}, gradient'] = deviation(*(
                        torch.cat([each.flatten().cpu() for each in found if each is not None])
                        for found in (gradients, its)))
        return _within(numbers, SAME)

    with tf32(False):
        for kind in PAIRS:
            yield Check(kind, partial(compare, kind))


def observe(distiller: DetectionDistiller, batch: dict) -> Any:
    """A forward of all terms with what they read, see :meth:`DetectionDistiller.observe`."""
    data = distiller.data_preprocessor(batch, True)
    return distiller.observe(data['inputs'], data['data_samples'], distiller.terms)


def move(value: Any, device: str, home: str) -> Any:
    """What a step has put out at home, on a device and without its graph; functions still compute at home."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True).requires_grad_(value.requires_grad)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).to(device)
    if isinstance(value, tuple):
        moved = [move(each, device, home) for each in value]
        return type(value)(*moved) if hasattr(value, '_fields') else tuple(moved)
    if isinstance(value, list):
        return [move(each, device, home) for each in value]
    if isinstance(value, dict):
        return {key: move(each, device, home) for key, each in value.items()}
    if is_dataclass(value):
        return replace(value, **{each.name: move(getattr(value, each.name), device, home)
                                 for each in fields(value) if each.init})
    if callable(value):
        return lambda *given: move(value(*move(given, home, home)), device, home)
    return value


def amp(setting: Setting) -> Iterator[Check]:
    """A step of all methods under autocast: losses, terms and their gradients are finite, at the published weights."""

    def step(kind: str, dtype: torch.dtype) -> Found:
        distiller, batch = build_all(setting, kind)
        with torch.autocast(setting.device, dtype):
            observation = observe(distiller, batch)
            total = distiller.parse_losses(observation.losses)[0]
        wrong = [] if total.isfinite() else ['losses of the student']
        for name, term in distiller.terms.items():
            value, gradients = differentiate(term, observation.context)
            total = total + distiller.schedules[name](distiller.progress) * sum_parts(observation.values[name])
            if not all(each.isfinite().all() for each in (value, *gradients) if each is not None):
                wrong.append(name)
        weights = [each for each in distiller.parameters() if each.requires_grad]
        found = torch.autograd.grad(total, weights, allow_unused=True)
        if not all(each.isfinite().all() for each in found if each is not None):
            wrong.append("gradient of the sum by the student's weights")
        loss = float(total.detach())
        return Found(f'{len(distiller.terms)} terms, loss {loss:.4g}', dict(loss=loss),
                     f"not finite: {', '.join(wrong)}" if wrong else '')

    for kind in PAIRS:
        for dtype in setting.choose(REDUCED, ('float16', )):
            yield Check(f'{kind}, {dtype}', partial(step, kind, getattr(torch, dtype)))


class NoHostSync(TorchDispatchMode):
    """Fails where an operation, forward or backward, would make the host wait for a GPU; on the CPU, too."""

    WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select', '_unique', 'equal', 'linalg_solve')

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split('.')[0]
        indices = args[1] if name in ('index', 'index_put_') else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        assert name not in self.WAITING and not by_mask, f'{func} waits for the device'
        return func(*args, **(kwargs or {}))


class NoHostData(TorchFunctionMode):
    """Fails where the host would wait for a GPU to take what it knows, which ``non_blocking`` copies do not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        placed = func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get('device') is not None
        assert func is not Tensor.new_tensor and not placed, f'{func.__name__} of host data waits for the device'
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Fails where the host would wait for the device."""
    if device == 'cpu':  # as if it were a GPU, of which the host knows no values
        with NoHostData(), NoHostSync(), patch.object(blocks, 'is_on_host', lambda tensor: False):
            yield
        return
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


def waits(setting: Setting) -> Iterator[Check]:
    """Teacher and terms, forward and backward, while PyTorch refuses whatever makes the host wait for the device."""

    def run(kind: str) -> Found:
        distiller, batch = build_all(setting, kind)
        waiting, expected = {}, {}
        known = {**WAITING, **WAITING_ON_CPU} if setting.dry else WAITING
        for check in (nullcontext, partial(no_waiting, setting.device)):  # at first libraries start, which may wait
            for name, call in list_parts(distiller, batch):
                if name == TEACHER or name.startswith(TERM):
                    try:
                        with check():
                            call()
                    except (RuntimeError, AssertionError) as error:
                        place = find_place(error)
                        (expected if (kind, name) in known else waiting)[name] = known.get((kind, name), place)
        text = f'{len(distiller.terms)} terms and their teacher'
        text += f"; by their nature: {', '.join(expected)}" if expected else ''
        return Found(text, dict(waiting, **expected), '; '.join(f'{name}: {why}' for name, why in waiting.items()))

    for kind in PAIRS:
        yield Check(kind, partial(run, kind))
    build_all.cache_clear()  # what comes after this needs the memory


def find_place(error: Exception) -> str:
    """The line of kd_det, or else of MMDetection, in which something went wrong, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    for package in ('kd_det', 'mmdet'):
        own = [each for each in frames if f'/{package}/' in each.filename]
        if own:
            return f'{package}/{own[-1].filename.rpartition(f"/{package}/")[2]}:{own[-1].lineno}: {error}'
    return str(error)


# ---------------------------------------------------------------------------------------------------------- a training


@DATASETS.register_module()
class Noise(Dataset):
    """Four images of noise with boxes, always the same."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.metainfo = dict(classes=tuple(f'class {index}' for index in range(6)))
        with preserved_randomness():
            torch.manual_seed(0)
            batch = synthetic_batch(nn.Conv2d(3, 1, 1), 4, size, boxes=3)
        self.items = [dict(inputs=image, data_samples=sample)
                      for image, sample in zip(batch['inputs'], batch['data_samples'])]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return copy.deepcopy(self.items[index])


def resume(setting: Setting) -> Iterator[Check]:
    """A training of the demo's pair in mixed precision, resumed after its first epoch; two that are not interrupted."""
    def train(folder: str, name: str, dtype: str, epochs: int, again: bool = False) -> Any:
        config = compose(Setting(dry=True), 'Faster R-CNN', 'fgd')
        config.model.teacher = dict(config=PAIRS['Faster R-CNN'][1], checkpoint=f'{folder}/teacher.pth')
        config.default_hooks.distill.preflight = None
        scale = dict(init_scale=256.0, growth_interval=2)  # it changes within the training
        amp = dict(type='AmpOptimWrapper', dtype=dtype, loss_scale=scale)
        wrapper = dict(config.optim_wrapper, **setting.choose(amp, {}))
        runner = build_runner(Config(dict(
            default_scope='mmdet', model=config.model, optim_wrapper=wrapper, randomness=dict(seed=0),
            work_dir=f'{folder}/{name}', resume=again, experiment_name=f'{name} {dtype} {epochs}', log_level='ERROR',
            default_hooks=dict(distill=config.default_hooks.distill,
                               checkpoint=dict(type='CheckpointHook', interval=10)),  # and at the end
            visualizer=dict(type='Visualizer', name=f'{name} {dtype} {epochs}', vis_backends=[]),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=epochs),
            train_dataloader=dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
                                  dataset=dict(type='Noise', size=(64, 64))))))
        runner.train()
        return runner

    def run(dtype: str) -> Found:
        with tempfile.TemporaryDirectory() as folder:
            prepare_without_runner(seed=1)
            teacher = build_detector(read_model_config(PAIRS['Faster R-CNN'][1]))
            teacher.init_weights()
            torch.save(dict(state_dict=teacher.state_dict()), f'{folder}/teacher.pth')
            whole = [train(folder, name, dtype, 2) for name in setting.choose(('first', 'second'), ('first', ))]
            half = train(folder, 'resumed', dtype, 1)
            runners = [*whole, train(folder, 'resumed', dtype, 2, again=True)]
            middle, *weights = (torch.cat([each.detach().flatten().cpu() for each in runner.model.parameters()])
                                for runner in (half, *runners))
            scales = {runner.optim_wrapper.loss_scaler.get_scale() for runner in runners
                      if hasattr(runner.optim_wrapper, 'loss_scaler')}
        *again, off = (deviation(each, weights[0]) for each in weights[1:])
        noise = max(again, default=0.0)
        failed = '' if off <= 10 * noise and len(scales) < 2 else 'resumed, it ends elsewhere'
        if not (all(runner.iter == 4 for runner in runners) and 0 < deviation(middle, weights[0]) < 1):
            failed = f'they end after {[runner.iter for runner in runners]} steps, not 4, or learn nothing, or too much'
        return Found(f'resumed {off:.0e} off, repeated {noise:.0e}' + (f'; loss scales {scales}' if scales else ''),
                     dict(resumed=off, repeated=noise, scales=sorted(scales)), failed)

    for dtype in setting.choose(REDUCED, ('float32', )):  # there is mixed precision on GPUs alone
        yield Check(f'FGD, {dtype}', partial(run, dtype))
