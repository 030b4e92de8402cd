"""``kd-det train``: MMDetection's training, with its options."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.cli.common import add_image_option, add_run_options, add_tracking_option, apply_run_options
from kd_det.config.tracking import track

if TYPE_CHECKING:
    from mmengine.config import Config


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help="config file, or 'package::folder/file.py'")
    add_training_options(parser)


def run(options: Namespace) -> int:
    from kd_det.config.files import load_config
    config = load_config(options.config)
    apply_training_options(config, options, name=Path(options.config).stem)
    train(config, options.resume, options.check_images)
    return 0


def add_training_options(parser: ArgumentParser) -> None:
    """Adds the options of a training run."""
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate with the batch size, by the config's base_batch_size")
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from this checkpoint, or from the latest one in the work dir')
    add_image_option(parser)
    add_tracking_option(parser)
    add_run_options(parser)


def apply_training_options(config: Config, options: Namespace, name: str) -> None:
    """Applies what :func:`add_training_options` added to the config, all but ``--resume``.

    Raises:
        ConfigurationError: Mixed precision without a GPU, or a config that does not tell how to scale its learning
            rate.
    """
    from mmengine.device import get_device

    from kd_det.config.files import ConfigurationError
    apply_run_options(config, options, name)
    track(config, options.track)
    if options.amp:
        if get_device() == 'cpu':
            raise ConfigurationError('--amp needs a GPU, and there is none: leave it out.')
        config.optim_wrapper.type = 'AmpOptimWrapper'
        config.optim_wrapper.loss_scale = 'dynamic'
    if options.auto_scale_lr:
        if 'base_batch_size' not in (config.get('auto_scale_lr') or {}):
            raise ConfigurationError(
                '--auto-scale-lr: the config does not tell for which batch size its learning rate is '
                'meant; expected auto_scale_lr=dict(base_batch_size=…).')
        config.auto_scale_lr.enable = True


def train(config: Config, resume: str | None = None, images: int | None = None) -> None:
    """Trains, after a look at what would fail.

    Args:
        config: The config.
        resume: A checkpoint, or ``'auto'`` for the latest one in the work dir.
        images: Read so many images of each data set before, and stop at what can not be read; all by default.

    Raises:
        DiagnosisError: A file is missing, the data is empty or unreadable, class counts differ, or labels mean
            something else than the data's metainfo says.
        CheckpointError: The checkpoint to resume is of another detector, or that to start from has nothing of this one.
        ConfigurationError: Something of the config can not be built.
    """
    from kd_det.checks.data import check_labels
    from kd_det.checks.doctor import check_config, explain
    from kd_det.checks.image_reader import Memory
    from kd_det.checks.images import check_images, student_channels
    from kd_det.training.runner import build_optimizer, build_runner, check_start, use_one_metainfo
    if resume:
        config.resume = True
        config.load_from = None if resume == 'auto' else resume
    check_config(config, splits=('train', 'val'))
    with explain(config):
        runner = build_runner(config)
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
    runner.train()
