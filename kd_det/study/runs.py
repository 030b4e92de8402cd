"""One training of a benchmark: its identity, its result, and the code, libraries and machine that it ran with."""
from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.evaluation import CocoMetric
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner, find_latest_checkpoint
from pydantic import TypeAdapter, ValidationError
from torch import nn
from torch.utils.data import DataLoader

from kd_det import __version__
from kd_det.checks.doctor import explain
from kd_det.compat.writing import is_first_process, locked_folder, write_whole
from kd_det.config import ConfigurationError
from kd_det.registry import HOME
from kd_det.study.identity import sha256
from kd_det.training.finiteness import explain_divergence, find_model
from kd_det.training.runner import build_runner

PACKAGES = ('torch', 'torchvision', 'mmengine', 'mmdet', 'mmcv', 'mmcv-lite', 'numpy', 'pycocotools',
            'faster-coco-eval')
CHECKOUT = Path(__file__).resolve().parents[2]
RESULT_FILE = 'result.json'
LATER = {'environment', 'seconds', 'class_ap'}  # of a run, which earlier versions did not note
OF_CLASS = '_precision'  # ends CocoMetric's name of the AP of a class


@dataclass(frozen=True)
class Run:
    """What came of a training.

    Attributes:
        identity: Hash of all that the run depends on; equal identities give equal results.
        start: Hash of the detector's weights before the first step.
        order: Hash of the images' ids in the order in which they were trained on.
        checkpoint: The trained detector; a file within the run's folder.
        scalars: mmengine's log of losses and metrics; a file within the run's folder.
        metrics: CocoMetric's numbers after the last epoch, 0 to 1; -1 where there is no object of that size.
        parameters: Number of the detector's parameters.
        flops: Multiply-adds of the detector for one image, see :func:`count_multiply_adds`.
        seconds_per_iteration: Median over the training steps, without the loading of data; comparable where the machine
            did nothing else.
        peak_memory: The most bytes that the process held until the training ended (resident set).
        peak_device_memory: The most bytes that tensors took on the GPU; None without one.
        epochs: Passes through the training images.
        iterations: Training steps.
        environment: Commit, versions and machine that it was trained with, see
            :func:`describe_environment`; empty where an earlier version did not note them.
        seconds: From the building of its parts to its last validation, without the start of the process; None where an
            earlier version did not note them.
        class_ap: CocoMetric's AP of each class that has objects, by name, 0 to 1; empty where an earlier version did
            not note it.
    """
    identity: str
    start: str
    order: str
    checkpoint: str
    scalars: str
    metrics: dict[str, float]
    parameters: int
    flops: int | None
    seconds_per_iteration: float
    peak_memory: int | None
    peak_device_memory: int | None
    epochs: int
    iterations: int
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    class_ap: dict[str, float] = field(default_factory=dict)

    def resolve_paths(self, folder: Path) -> Run:
        """Returns the run with the paths of its files as they are seen from where its folder is."""
        return replace(self, checkpoint=str(Path(folder, self.checkpoint)), scalars=str(Path(folder, self.scalars)))

    def to_dict(self, root: Path | None = None) -> dict[str, Any]:
        """Returns what JSON can hold of the run; with a root its paths are relative to that folder."""
        values = asdict(self)
        if root is not None:
            values.update({name: os.path.relpath(values[name], root) for name in ('checkpoint', 'scalars')})
        return values


def train(name: str, config: Config, identity: str, log: Callable[[str], None] = print,
          after_step: Callable[[Runner], None] = lambda runner: None) -> Run:
    """Trains and evaluates, and remembers what came of it in the config's work dir.

    Of several processes (``config.launcher``) each notes what it saw, and the first writes it.

    Args:
        name: Begins each line of the log.
        config: The config, with its work dir and a CocoMetric.
        identity: See :func:`~kd_det.study.identity.identify_run`.
        log: Given a line after each epoch.
        after_step: Called after each training step.

    Returns:
        The run, with paths as seen from here.

    Raises:
        WritingError: Another run trains in its work dir.
    """
    folder, launcher = Path(config.work_dir), config.get('launcher', 'none')
    with locked_folder(folder, launcher):
        if is_first_process(launcher):
            Path(folder, RESULT_FILE).unlink(missing_ok=True)
        run = _train(name, config, identity, log, after_step)
        if is_first_process(launcher):
            write_whole(folder / RESULT_FILE, json.dumps(asdict(run), indent=2))
    return run.resolve_paths(folder)


def _train(name: str, config: Config, identity: str, log: Callable[[str], None],
           after_step: Callable[[Runner], None]) -> Run:
    """As :func:`train`, but what comes of it has paths within its folder."""
    begin = time.monotonic()
    config.experiment_name = f'{name}_{time.time_ns()}'  # mmengine keeps loggers and visualizers by name
    config.visualizer = config.get('visualizer') or {}
    config.visualizer.setdefault('type', f'{HOME}.DetLocalVisualizer')
    config.visualizer.setdefault('vis_backends', [dict(type='LocalVisBackend')])
    config.visualizer.name = config.experiment_name
    with explain(config):
        runner = build_runner(config)
    environment = describe_environment()
    recorder = TrainingRecorder(name, log, after_step)
    runner.register_hook(recorder, priority='LOWEST')
    with explain_divergence(runner):
        runner.train()
    if not recorder.metrics:
        raise ConfigurationError('It was never evaluated: train_cfg.val_begin lies behind its last epoch.')
    seconds = time.monotonic() - begin
    memory, device_memory = measure_process_memory()  # of the training, not of what follows
    detector = find_model(runner)
    detector = getattr(detector, 'student', detector)
    return Run(
        identity=identity,
        start=recorder.start,
        order=recorder.order.hexdigest(),
        checkpoint=Path(find_latest_checkpoint(runner.work_dir)).name,
        scalars=str(Path(runner.log_dir, 'vis_data', 'scalars.json').relative_to(runner.work_dir)),
        metrics=recorder.metrics,
        parameters=sum(parameter.numel() for parameter in detector.parameters()),
        flops=count_multiply_adds(detector, runner.val_dataloader) if is_main_process() else None,
        seconds_per_iteration=float(np.median(recorder.seconds)),
        peak_memory=memory,
        peak_device_memory=device_memory,
        epochs=runner.max_epochs,
        iterations=runner.max_iters,
        environment=environment,
        seconds=seconds,
        class_ap=recorder.class_ap)


def load_finished_run(folder: Path, identity: str, tell: Callable[[str], None] = lambda reason: None) -> Run | None:
    """Loads the run that was finished in a folder.

    Args:
        folder: Its work dir.
        identity: What the run must have.
        tell: Given the reason, a sentence, why one that is there does not count.

    Returns:
        The run, with paths as seen from here; None where there is none of this identity, or one that can not be read.
    """
    file = Path(folder, RESULT_FILE)
    if not file.is_file():
        return None
    try:
        stored = read_json(file)
        if stored.get('identity') != identity or set(stored) | LATER != {each.name for each in fields(Run)}:
            tell('The run that is there had other data, weights or settings.')
            return None
        check_run(stored, f"'{file}': ")
        run = Run(**stored).resolve_paths(folder)
    except ConfigurationError as error:
        tell(str(error))
        return None
    lost = [file for file in (run.checkpoint, run.scalars) if not Path(file).is_file()]
    if lost:
        tell(f"'{lost[0]}' is gone.")
    return None if lost else run


def check_run(content: Any, place: str = '') -> None:
    """Checks that a dict has the fields of a :class:`Run`, and what every benchmark reads of its metrics.

    Raises:
        ConfigurationError: It has not; the message begins with the place.
    """
    try:
        check_shape(content, Run)
        check_shape(content['metrics'].get('bbox_mAP'), float, 'metrics.bbox_mAP')
    except ConfigurationError as error:
        raise ConfigurationError(f'{place}{error}') from None


def read_json(file: Path) -> dict:
    """Reads a JSON file that an earlier run wrote.

    Raises:
        ConfigurationError: It is cut, damaged or holds no object; the message tells where.
    """
    try:
        text = file.read_text(encoding='utf-8')
        # No count that a run writes is longer; what is would not fit into a float either.
        content = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 19 else float(digits))
    except UnicodeDecodeError:
        raise ConfigurationError(f"'{file}': expected JSON, got no text.") from None
    except json.JSONDecodeError as error:
        is_cut = error.pos >= len(text.rstrip()) or error.msg.startswith('Unterminated string')
        place = f'cut off in line {error.lineno}' if is_cut else f'line {error.lineno}'
        raise ConfigurationError(f"'{file}': {place}: no JSON ({error.msg}).") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"'{file}' can not be read: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigurationError(f"'{file}': expected an object of JSON, got {content!r:.60}.")
    return content


def check_shape(content: Any, kind: Any, place: str = '') -> None:
    """Checks that what JSON holds has a type, its parts too.

    Args:
        content: Of the file.
        kind: The type, as pydantic takes it; of a dataclass, its fields in a dict.
        place: The key of the content, for the message.

    Raises:
        ConfigurationError: It has not; the message names the part.
    """
    try:
        _make_adapter(kind).validate_json(json.dumps(content), strict=True)  # of JSON a dict may be a dataclass
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = '.'.join(map(str, [place, *first['loc']] if place else first['loc']))
        got = '' if first['type'] == 'missing' else f', got {first["input"]!r:.60}'
        raise ConfigurationError(f"{place}{': ' if place else ''}{first['msg'].lower()}{got}.") from None


@cache
def _make_adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def read_command_line() -> str:
    """Returns the command line of this process, as a user would repeat it."""
    program = Path(sys.argv[0])
    program = ['python', sys.argv[0]] if program.suffix == '.py' and program.stem != '__main__' else ['kd-det']
    return shlex.join([*program, *sys.argv[1:]])


def describe_environment(threads: int | None = None) -> dict:
    """Describes what a training depends on beside its config and data.

    Args:
        threads: PyTorch's threads of one training; those of this process by default.

    Returns:
        ``commit`` (see :func:`find_commit`), ``versions`` and ``machine``.
    """
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # mmcv or mmcv-lite, or a fork under another name
            pass
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return dict(
        commit=find_commit(),
        versions=dict(python=platform.python_version(), kd_det=__version__, **found),
        machine=dict(system=platform.platform(), processors=os.cpu_count(), devices=devices,
                     threads=threads or torch.get_num_threads(),
                     **({'processes': get_world_size()} if get_world_size() > 1 else {})))


def find_commit(checkout: Path = CHECKOUT) -> str | None:
    """Finds the commit of the git checkout that kd_det is imported from.

    Returns:
        Its hash, with ``-dirty`` where files were changed, or added that git does not ignore; None without a checkout
        or without git.
    """
    if not (checkout / '.git').exists():  # a checkout around the environment that kd_det is installed in is another's
        return None
    answers = [_git(checkout, *question) for question in (('rev-parse', 'HEAD'), ('status', '--porcelain'))]
    if None in answers:
        return None
    return answers[0] + ('-dirty' if answers[1] else '')


def _git(checkout: Path, *arguments: str) -> str | None:
    try:
        return subprocess.run(['git', '--no-optional-locks', '-C', str(checkout), *arguments], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, no commit yet, or somebody else's checkout
        return None


def use_fast_coco_evaluation() -> bool:
    """Lets MMDetection's CocoMetric evaluate with faster-coco-eval, whose numbers are those of pycocotools.

    Returns:
        Whether it is installed.
    """
    if find_spec('faster_coco_eval') is None:
        return False
    from faster_coco_eval import COCOeval_faster
    from mmdet.evaluation.metrics import coco_metric
    coco_metric.COCOeval = COCOeval_faster
    return True


class TrainingRecorder(Hook):
    """Records what :class:`Run` holds of a training, and logs a line after each epoch."""

    def __init__(self, name: str, log: Callable[[str], None], after_step: Callable[[Runner], None]) -> None:
        self.name, self.log, self.after_step = name, log, after_step
        self.seconds, self.metrics, self.class_ap, self.order = [], {}, {}, hashlib.sha256()
        self.measures_boxes = False

    def before_train(self, runner: Runner) -> None:
        state = find_model(runner).state_dict()  # of a distiller: the student's
        self.start = sha256(b''.join(key.encode() + value.cpu().numpy().tobytes() for key, value in state.items()))
        for metric in runner.val_loop.evaluator.metrics if runner.val_loop else ():
            if isinstance(metric, CocoMetric):
                self.measures_boxes = 'bbox' in metric.metrics
                self._read_classes(metric)

    def _read_classes(self, metric: CocoMetric) -> None:
        """Lets a metric tell the AP of each class here alone: the first number that it gives may decide the best."""
        compute, is_told = metric.compute_metrics, metric.classwise

        def compute_metrics(results: list) -> dict[str, float]:
            found = compute(results)
            take = found.get if is_told else found.pop
            of_classes = {name: take(f'{name}{OF_CLASS}', nan) for name in metric.dataset_meta['classes']}
            self.class_ap = {name: float(value) for name, value in of_classes.items() if isfinite(value)}
            return found

        metric.classwise, metric.compute_metrics = True, compute_metrics

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch=None) -> None:
        images = [getattr(sample, 'img_id', None) for sample in data_batch['data_samples']]
        self.order.update(json.dumps(images, default=str).encode())
        self._start_time = _read_clock()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.seconds.append(_read_clock() - self._start_time)
        self.after_step(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        if not is_main_process():
            return
        loss = runner.message_hub.get_scalar('train/loss').mean(len(runner.train_dataloader))
        pace = np.median(self.seconds)
        left = pace * (runner.max_iters - len(self.seconds))
        self.log(f'{self.name}: epoch {runner.epoch + 1}/{runner.max_epochs}, loss {loss:.3f}, {pace:.2f} s per '
                 f'iteration, about {left:.0f} s left')

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        if not metrics or self.measures_boxes and not any(name.endswith('bbox_mAP') for name in metrics):
            # CocoMetric tells nothing where nothing at all was detected, whatever other metrics tell.
            metrics = {**dict.fromkeys(('bbox_mAP', 'bbox_mAP_50', 'bbox_mAP_75'), 0.0), **(metrics or {})}
        self.metrics = {name[len('coco/'):] if name.startswith('coco/') else name: float(value)
                        for name, value in metrics.items()}
        if 'bbox_mAP' not in self.metrics:
            raise ConfigurationError(f"The val_evaluator gives {', '.join(metrics)}, but no bbox_mAP: expected a "
                                     "CocoMetric with metric='bbox'.")
        if is_main_process():
            self.log(f"{self.name}: mAP {100 * self.metrics['bbox_mAP']:.1f}")


def _read_clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what the step asked for is done
    return time.perf_counter()


def measure_process_memory() -> tuple[int | None, int | None]:
    """Returns the most bytes that this process held so far, in memory and by tensors on the GPU; None if not known."""
    on_device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    try:
        import resource
    except ImportError:  # Windows
        return None, on_device
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, on_device


@torch.no_grad()
def count_multiply_adds(detector: nn.Module, images: DataLoader) -> int | None:
    """Counts the multiply-adds that a detector needs for one image, without the decoding and suppression of its boxes.

    Of a two-stage detector it depends a little on how many regions it proposes.

    Args:
        detector: The detector; a copy of it is run.
        images: A loader of validation images: the first is taken.

    Returns:
        The number, or None where the detector can not be traced; the log then tells why.
    """
    detector = copy.deepcopy(detector).eval()
    batch = images.collate_fn([images.dataset[0]])
    batch = detector.data_preprocessor(batch, False)
    detector.forward = partial(detector.forward, data_samples=batch['data_samples'])
    try:
        found = get_model_complexity_info(detector, inputs=batch['inputs'], show_table=False, show_arch=False)
        return int(found['flops'])
    except Exception as error:  # the tracer's: it must not cost the training that came before
        print_log(f'FLOPs are not known: {type(error).__name__}: {error}', 'current')
        return None
