"""One call for each thing that is done with one detector: train it, distil into it, evaluate it."""
from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from mmdet.engine.hooks.utils import trigger_visualization_hook
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from torch import nn

from kd_det.checks.data import check_labels
from kd_det.checks.doctor import check_config, explain, warn_of_annotations
from kd_det.checks.image_reader import Memory
from kd_det.checks.images import check_images, student_channels
from kd_det.compat import load_checkpoint
from kd_det.compat.console import TextTable
from kd_det.compat.writing import is_first_process, kept_after_errors, locked_folder, refuse_to_replace
from kd_det.config import ConfigurationError
from kd_det.config.arguments import Bits, Count, Index, Name, Names, Parts, Ratio, Seed, Weight, declared
from kd_det.config.choices import EXPORTED, InheritanceRule, LearntFrom
from kd_det.config.distillation import compose_distillation
from kd_det.config.files import (
    find_quantization,
    is_distillation,
    list_leaf_datasets,
    rename_config,
    set_data_root,
    student_config,
)
from kd_det.config.options import merge_options, resolve_config, set_epochs, set_seed
from kd_det.distillers.quantization import build_quantizer
from kd_det.registry import HOME
from kd_det.training.finiteness import explain_divergence
from kd_det.training.hooks import CHECKPOINT_KEY, NotebookProgress, is_in_notebook
from kd_det.training.pictures import draw_curves, names_to_draw, read_scalars
from kd_det.training.runner import (
    add_trackers,
    build_optimizer,
    build_runner,
    check_launcher,
    check_start,
    ended_workers,
    find_saved_config,
    use_one_metainfo,
)

Launcher = Literal['none', 'pytorch', 'slurm', 'mpi']
CURVES = 4  # metrics whose curves a notebook shows


@dataclass(frozen=True)
class RunResult:
    """What a training, or an evaluation, left behind.

    Attributes:
        work_dir: Folder of its logs and checkpoints.
        config: The file that repeats it; None where there is none.
        checkpoint: The last checkpoint of a training, a plain student's; that which was evaluated.
        best_checkpoint: The best one by the config's ``save_best``; None where it keeps none.
        metrics: What the last evaluation found, such as ``coco/bbox_mAP``, 0 to 1.
        epochs: Done, those before a resume among them.
        iterations: Done, likewise.
        scalars: MMEngine's logs of the run and of those that it resumed, oldest first.
    """
    work_dir: Path
    config: Path | None = None
    checkpoint: Path | None = None
    best_checkpoint: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    iterations: int = 0
    scalars: tuple[Path, ...] = ()

    def tabulate(self) -> TextTable:
        """Makes a table of the metrics and of where everything is."""
        files = (('config', self.config), ('checkpoint', self.checkpoint), ('best checkpoint', self.best_checkpoint))
        rows = [(name, f'{value:.4g}') for name, value in self.metrics.items()]
        rows += [(name, str(file)) for name, file in files if file is not None]
        return TextTable(str(self.work_dir), ('', ''), rows, words=(0, 1))

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as JSON can hold it."""
        files = {name: None if getattr(self, name) is None else str(getattr(self, name))
                 for name in ('work_dir', 'config', 'checkpoint', 'best_checkpoint')}
        return {**asdict(self), **files, 'scalars': list(map(str, self.scalars))}

    def _repr_html_(self) -> str:
        """The table, and the curves of the loss and of the first metrics."""
        logged = read_scalars(self.scalars) if self.scalars else {}
        panels = {name: {self.work_dir.name: [logged[name]]} for name in ('loss', *self.metrics) if logged.get(name)}
        if not panels:
            return self.tabulate().to_html()
        picture = BytesIO()
        draw_curves(dict(list(panels.items())[:CURVES])).savefig(picture, format='png')
        encoded = base64.b64encode(picture.getvalue()).decode()
        return f'{self.tabulate().to_html()}<img alt="learning curves" src="data:image/png;base64,{encoded}">'


@declared
def train(config: str | Path | Config, *, data_root: str | None = None, work_dir: str | Path | None = None,
          epochs: Count | None = None, seed: Seed | None = None, amp: bool = False, auto_scale_lr: bool = False,
          resume: bool | str | Path = False, launcher: Launcher = 'none', check_images: Index | None = None,
          trackers: Sequence[Name] = (), options: dict[str, Any] | None = None) -> RunResult:
    """Trains a detector from a config, with or without distillation, after a look at what would fail.

    Args:
        config: A file, ``'package::folder/file.py'``, or a config, which stays as it is.
        data_root: Folder of the data, in place of the config's.
        work_dir: For logs and checkpoints; the config's, or ``work_dirs/CONFIG``, by default.
        epochs: Train for so many, the schedules stretched with them; as the config says by default.
        seed: Of all random numbers; the config's, or one that MMEngine draws, by default.
        amp: Train with automatic mixed precision, on a GPU.
        auto_scale_lr: Scale the learning rate with the batch size, by the config's ``base_batch_size``.
        resume: Go on from the latest checkpoint in the work dir, or from this one.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``: what started this process as one of several.
        check_images: Read so many images of each data set before, and stop at what can not be read; all by default, 0
            for none.
        trackers: ``'tensorboard'``, ``'wandb'``, ``'mlflow'``: where it logs, too.
        options: Settings that override the config, by dotted key.

    Raises:
        DiagnosisError: A file is missing, the data is empty or unreadable, class counts differ, or labels mean
            something else than the data's metainfo says.
        CheckpointError: The checkpoint to resume is of another detector, or that to start from has nothing of this one.
        ConfigurationError: Something of the config can not be built; or losses, features or weights become NaN or
            infinite.
    """
    config = resolve_config(config)
    _set_run(config, Path(config.filename or 'config').stem, data_root, work_dir, epochs, seed, amp, auto_scale_lr,
             launcher, trackers, options)
    return _train(config, resume, check_images)


@declared
def distill(student: str | Path | Config, teacher: str | Path | Sequence[str | Path] | None = None,
            checkpoint: str | Path | Sequence[str | Path] = (), method: str = 'fgd', *,
            data_root: str | None = None, work_dir: str | Path | None = None, epochs: Count | None = None,
            inherit: Parts = 'auto', balance: Ratio | None = None,
            seed: Seed | None = None, amp: bool = False, resume: bool | str | Path = False, launcher: Launcher = 'none',
            options: dict[str, Any] | None = None, family: str = '', auto_scale_lr: bool = False,
            check_images: Index | None = None, trackers: Sequence[Name] = (),
            on_config: Callable[[Config], None] | None = None,
            quantize: Bits | dict[str, Any] | None = None, peers: Index | Sequence[str] = 0, share: Names = (),
            guide: LearntFrom = 'peers', inherit_by: InheritanceRule = 'shape',
            policy: str | dict[str, Any] | None = None) -> RunResult:
    """Composes a distillation out of a student's config and a teacher, saves it in the work dir, and trains it.

    The student's config alone decides data, classes, schedule and evaluation.

    Args:
        student: Config of the detector to train: a file, ``'mmdet::folder/file.py'``, or a config.
        teacher: Config of the teacher: a file, or ``'mmdet::folder/file.py'``; a file with another guide as its
            ``teacher``, such as a Backbone; None beside ``peers`` for none; or several, of unlike teachers.
        checkpoint: The teacher's weights: a file or an address; or several, one for each teacher, or all trained with
            the one config. From several the student learns as from an ensemble, or as a ``policy`` says.
        method: One of :func:`kd_det.methods`, the file of another, ``'package::folder/file.py'``, or a sum: ``'a+b'``;
            ``'auto'`` lets a policy choose between all that fit, ``'auto:a+b'`` between these.
        data_root: See :func:`train`, as for all that is not told here.
        work_dir: For logs, checkpoints and the config; ``work_dirs/STUDENT_METHOD`` by default.
        epochs: Train for so many, the schedules stretched with them.
        inherit: Parts of the student that start from the teacher's weights where shapes agree; ``'auto'`` for all but
            the backbone, ``()`` for none.
        balance: Keep each method's gradient on the student's features at this ratio of the task's; ``'paper'`` for the
            published weights. 1, unless the method's file says otherwise.
        seed: Of all random numbers.
        amp: Automatic mixed precision.
        resume: Go on from the latest checkpoint in the work dir, or from this one.
        launcher: What started this process as one of several.
        options: Settings that override the config that is made, by dotted key.
        family: Whose published weights to use, of :data:`~kd_det.config.choices.FAMILIES`; told by the student's heads
            by default.
        auto_scale_lr: Scale the learning rate with the batch size.
        check_images: Read so many images of each data set before.
        trackers: Where it logs, too.
        on_config: Given the config, once all of it could be built and it is saved, before it is trained.
        quantize: Train the student as it computes with integers of so many bits; or the whole ``model.quantize``. It
            starts from a trained student, ``options=dict(load_from=…)``; with the method ``'none'`` it learns from the
            data alone.
        peers: How many detectors of the student's own kind learn beside it in the same steps, or their configs.
        share: Parts that they have in common with the student, from the image on, such as ``('backbone', 'neck')``.
        guide: What they learn from by the method: each other (``'peers'``), their ``'mean'``, their mean by a learnt
            ``'gate'``, or a learner of their fused features (``'fusion'``).
        inherit_by: How it starts from them, see :class:`~kd_det.distillers.inheritance.Inheritance`.
        policy: Who teaches in a step: one of :data:`~kd_det.config.choices.POLICIES`, or ``model.policy``; all at once
            by default.

    Raises:
        ConfigurationError: The student is a distillation already, the method does not serve it, or a setting is wrong.
        TeacherError: The teacher's config or weights can not serve; or it detects nothing on the validation images.
        DiagnosisError: See :func:`train`.
        CheckpointError: See :func:`train`.
    """
    teachers, checkpoints = (list(map(str, [each] if isinstance(each, (str, Path)) else each or ()))
                             for each in (teacher, checkpoint))
    config, name = compose_distillation(student if isinstance(student, Config) else str(student), teachers, checkpoints,
                                        method, inherit, family, balance, peers, share, guide, policy, quantize,
                                        inherit_by)
    _set_run(config, name, data_root, work_dir, epochs, seed, amp, auto_scale_lr, launcher, trackers, options)
    config = rename_config(config, Path(config.work_dir) / f'{name}.py')
    return _train(config, resume, check_images, on_config)


@declared
def evaluate(config: str | Path | Config, checkpoint: str | Path, *, data_root: str | None = None,
             work_dir: str | Path | None = None, tta: bool = False, out: str | Path | None = None, show: bool = False,
             show_dir: str | None = None, wait_time: Weight = 2, launcher: Launcher = 'none',
             options: dict[str, Any] | None = None, force: bool = False) -> RunResult:
    """Evaluates a checkpoint, or an exported file, on the config's test data.

    Of a distillation that is the student alone, no teacher is built. A student that was trained for integers computes
    in them, unless ``options`` say ``{'model.quantize': None}``. An exported file takes the detector's place; all else,
    data, pipeline and metrics, is the config's.

    Args:
        config: A file, ``'package::folder/file.py'``, or a config.
        checkpoint: A file, or an address; or a file that :func:`~kd_det.deploy.export.export` wrote, ``.onnx`` or
            ``.xml``.
        data_root: Folder of the data, in place of the config's.
        work_dir: For the log; the config's, or ``work_dirs/CONFIG``, by default.
        tta: Augment the images: by the config's own ``tta_model`` and ``tta_pipeline``, or by flips.
        out: Write the predictions to this file, ``.pkl``.
        show: Show the predictions in a window.
        show_dir: Save painted images in this folder within the work dir.
        wait_time: Seconds for which each is shown.
        launcher: See :func:`train`.
        options: Settings that override the config, by dotted key.
        force: Replace a file of the name ``out`` that holds no predictions.

    Raises:
        WritingError: There is such a file.
        DiagnosisError: A file is missing, or labels mean something else than the data's metainfo says.
        CheckpointError: The checkpoint is of another detector.
        ConfigurationError: Something of the config can not be built; or an exported file can not be run, or has other
            classes than the data.
    """
    if out:
        refuse_to_replace(out, lambda content: b'pred_instances' in content, 'predictions', force)
    whole, options = resolve_config(config), dict(options or {})
    if is_distillation(whole):  # all other options are the plain student's
        merge_options(whole, {key: options.pop(key) for key in (*options, ) if f'{key}.'.startswith('model.quantize.')})
    config, quantization = student_config(whole), find_quantization(whole)
    name = Path(config.filename or 'config').stem
    _set_run(config, name, data_root, work_dir, launcher=launcher, options=options)
    config = rename_config(config, f'{name}_test.py')  # the work dir keeps the config of its training
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        if not config.get(key):
            raise ConfigurationError(f"The config '{name}' has no {key}, so that there is nothing to test on.")
    is_exported = Path(checkpoint).suffix in EXPORTED
    if is_exported:
        if launcher != 'none':
            raise ConfigurationError(f"--launcher {launcher}: '{checkpoint}' is run by one process, on the CPU.")
        config.model = ConfigDict(type='FileDetector', file=str(checkpoint))
        config.load_from, config.resume = None, False
    else:
        config.load_from = str(checkpoint)
    if show or show_dir:
        config = trigger_visualization_hook(config, SimpleNamespace(show=show, show_dir=show_dir, wait_time=wait_time))
    if tta:
        _augment(config)
    check_config(config, splits=('test', ))
    with explain(config):
        runner = build_runner(config)
        warn_of_annotations(config, ('test', ))
        use_one_metainfo(runner.test_loop)
        metrics = runner.test_loop.evaluator.metrics
        check_labels(dict(test=runner.test_loop.dataloader.dataset), dict(test=metrics))
        if is_exported:
            detector = runner.model.module if tta else runner.model
            detector.adapt(runner.test_loop.dataloader.dataset, metrics)
        elif quantization is not None:
            _quantize(runner, quantization, checkpoint)
        if out:
            metrics.append(DumpDetResults(out_file_path=str(out)))
    check_start(runner)
    if show or show_dir:
        meta = runner.test_loop.dataloader.dataset.metainfo
        runner.visualizer.dataset_meta = dict(meta, classes=names_to_draw(meta.get('classes') or ()))
    with ended_workers(runner):
        found = runner.test()
    return RunResult(work_dir=Path(config.work_dir), config=_saved_config(runner), checkpoint=Path(checkpoint),
                     metrics={name: float(value) for name, value in found.items()})


def restore_quantizer(settings: dict[str, Any], checkpoint: str | Path, detector: nn.Module) -> bool:
    """Lets a student compute as it was trained to, in integers with the ranges of its checkpoint.

    Args:
        settings: See :func:`~kd_det.config.files.find_quantization`.
        checkpoint: A file, or an address.
        detector: The plain student in eval mode, with its weights or before it gets them; changed.

    Returns:
        Whether the checkpoint has ranges; without any the student stays float.

    Raises:
        ConfigurationError: The settings are wrong, or the ranges of another student.
    """
    ranges = load_checkpoint(checkpoint).get(CHECKPOINT_KEY, {}).get('ranges')
    if ranges is None:
        return False
    quantizer = build_quantizer(settings, detector)
    quantizer.load_state(ranges)
    quantizer.to(next(detector.parameters()).device).eval()
    return True


def _quantize(runner: Runner, settings: dict, checkpoint: str | Path) -> None:
    """Tests a student that was trained for integers as it was validated then."""
    detector = runner.model
    while hasattr(detector, 'module'):  # within wrappers for several processes, or for test-time augmentation
        detector = detector.module
    if restore_quantizer(settings, checkpoint, detector.eval()):
        runner.logger.info(f"The student computes in integers of {settings.get('bits', 8)} bits, as it was trained. "
                           'Its float weights are tested with --cfg-options model.quantize=None.')
    else:
        runner.logger.warning(f"'{checkpoint}' holds no ranges, so that the student computes in float: it was not "
                              'trained with model.quantize.')


def _set_run(config: Config, name: str, data_root: str | None, work_dir: str | Path | None, epochs: int | None = None,
             seed: int | None = None, amp: bool = False, auto_scale_lr: bool = False, launcher: str = 'none',
             trackers: Sequence[str] = (), options: dict[str, Any] | None = None) -> None:
    """Writes into a config how it is to be run; what ``options`` say of it counts last."""
    if epochs is not None:
        set_epochs(config, epochs)
    if seed is not None:
        set_seed(config, seed)
    if data_root:
        set_data_root(config, data_root)
    merge_options(config, options or {})
    check_launcher(launcher)
    config.launcher = launcher
    config.work_dir = str(work_dir or config.get('work_dir') or Path('work_dirs') / name)
    add_trackers(config, trackers)
    if amp:
        if get_device() == 'cpu':
            raise ConfigurationError('--amp needs a GPU, and there is none: leave it out.')
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.loss_scale = 'dynamic'
    if auto_scale_lr:
        if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
            raise ConfigurationError(
                '--auto-scale-lr: the config does not tell for which batch size its learning rate is '
                'meant; expected auto_scale_lr=dict(base_batch_size=…).')
        config.auto_scale_lr.enable = True


def _train(config: Config, resume: bool | str | Path, images: int | None,
           on_config: Callable[[Config], None] | None = None) -> RunResult:
    if resume:
        config.resume = True
        config.load_from = None if resume is True or resume == 'auto' else str(resume)
    check_config(config, splits=('train', 'val'))
    with locked_folder(config.work_dir, config.launcher):
        runner = _build(config, images)
        if on_config and is_main_process():
            on_config(config)
        if is_in_notebook() and is_main_process():
            runner.register_hook(NotebookProgress())
        with ended_workers(runner), explain_divergence(runner):
            runner.train()
    return _read_result(runner)


def _build(config: Config, images: int | None) -> Runner:
    """Builds a training, down to its optimizer; if something can not be built the work dir keeps the config it has."""
    saves = bool(config.filename) and is_first_process(config.launcher)
    with kept_after_errors(find_saved_config(config)) if saves else nullcontext():
        with explain(config):
            runner = build_runner(config)
            warn_of_annotations(config, ('train', 'val'))
            loops = dict(train=runner.train_loop, val=runner.val_loop)
            for loop in loops.values():
                use_one_metainfo(loop)
            datasets = {split: loop.dataloader.dataset for split, loop in loops.items() if loop is not None}
            check_labels(datasets, dict(val=runner.val_loop.evaluator.metrics) if runner.val_loop else {})
            memory = Memory(config.work_dir)
            for dataset in datasets.values():
                check_images(dataset, memory, images, student_channels(config))
            build_optimizer(runner)
        check_start(runner, whole=bool(config.get('resume')))  # as the config may say itself
    return runner


def _read_result(runner: Runner) -> RunResult:
    work_dir, hub = Path(runner.work_dir), runner.message_hub
    last = work_dir / 'last_checkpoint'
    best = hub.get_info('best_ckpt') if 'best_ckpt' in hub.runtime_info else None
    metrics = {name.partition('/')[2]: float(scalar.current()) for name, scalar in hub.log_scalars.items()
               if name.startswith('val/') and not name.endswith(('/time', '/data_time'))}
    return RunResult(
        work_dir=work_dir,
        config=_saved_config(runner),
        checkpoint=_existing(last.read_text(encoding='utf-8').strip()) if last.is_file() else None,
        best_checkpoint=_existing(best),
        metrics=metrics,
        epochs=runner.epoch,
        iterations=runner.iter,
        scalars=tuple(sorted(work_dir.glob('*/vis_data/scalars.json'))))


def _saved_config(runner: Runner) -> Path | None:
    """The file that the runner wrote: unlike that which was read, it holds what arguments and options have set."""
    name = Path(runner.cfg.filename).name if runner.cfg.filename else f'{runner.timestamp}.py'
    return _existing(Path(runner.work_dir) / name)


def _existing(file: str | Path | None) -> Path | None:
    with suppress(OSError, TypeError):
        return Path(file) if Path(file).is_file() else None
    return None


def _augment(config: Config) -> None:
    """Turns on test-time augmentation: the config's own ``tta_model`` and ``tta_pipeline``, or horizontal flips."""
    dataset = list_leaf_datasets(config.test_dataloader.dataset)[0]
    pipeline = config.get('tta_pipeline')
    if pipeline is None:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
        flips = [dict(type=f'{HOME}.RandomFlip', prob=probability) for probability in (1.0, 0.0)]
        pipeline = copy.deepcopy(dataset['pipeline'])
        packing = [dict(type=f'{HOME}.PackDetInputs', meta_keys=keys)]
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, packing])
    dataset['pipeline'] = pipeline
    wrapper = ConfigDict(config.get('tta_model') or dict(  # its types may be classes, which ** would write as such
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
    wrapper.module = config.model
    config.model = wrapper
