"""``kd-det train``: MMDetection's training, with its options."""
from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from typing import Any

from kd_det.cli.common import add_image_option, add_run_options, add_tracking_option, count, read_options, seed


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help="config file, or 'package::folder/file.py'")
    add_training_options(parser)


def run(options: Namespace) -> int:
    from kd_det.training.runs import train
    train(options.config, **read_training_options(options))
    return 0


def add_training_options(parser: ArgumentParser) -> None:
    """Adds the options of a training run."""
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate with the batch size, by the config's base_batch_size")
    parser.add_argument('--epochs', type=count, metavar='N',
                        help='train for so many epochs, the schedules stretched with them')
    parser.add_argument('--seed', type=seed, metavar='N', help="of all random numbers (the config's, or one drawn)")
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from this checkpoint, or from the latest one in the work dir')
    add_image_option(parser)
    add_tracking_option(parser)
    add_run_options(parser)


def read_training_options(options: Namespace) -> dict[str, Any]:
    """What :func:`add_training_options` added, as :func:`kd_det.train` and :func:`kd_det.distill` take it."""
    os.environ.setdefault('LOCAL_RANK', str(options.local_rank))
    return dict(data_root=options.data_root, work_dir=options.work_dir, epochs=options.epochs, seed=options.seed,
                amp=options.amp, auto_scale_lr=options.auto_scale_lr, resume=options.resume or False,
                launcher=options.launcher, check_images=options.check_images, trackers=options.track,
                options=read_options(options.cfg_options))
