"""``kd-det demo``: distillation at work on generated data, from nothing to a table and pictures."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from kd_det.cli.common import add_force_option, count, path

DISTILLED_CONFIG = 'kd_det::demo/fgd_faster_rcnn_r101_r18.py'


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('--out', type=path, default=Path('demo'), metavar='DIR',
                        help='folder of data, trainings, results and pictures (demo)')
    parser.add_argument('--seeds', type=count, default=1, metavar='N',
                        help='train both students N times, from seeds 0 to N - 1, under one teacher (1)')
    parser.add_argument('--epochs', type=count, metavar='N', help="epochs of the students (their config's)")
    parser.add_argument('--teacher-epochs', type=count, metavar='N', help="epochs of the teacher (its config's)")
    parser.add_argument('--images', type=count, default=240, metavar='N', help='training images (240)')
    parser.add_argument('--val-images', type=count, default=80, metavar='N', help='validation images (80)')
    parser.add_argument('--size', type=count, default=128, metavar='PIXELS',
                        help='height and width of the images (128)')
    parser.add_argument('--config', default=DISTILLED_CONFIG, metavar='CONFIG',
                        help=f'how the distilled student learns ({DISTILLED_CONFIG})')
    add_force_option(parser)


def run(options: Namespace) -> int:
    from kd_det.study.demo import DemoSettings, run_demo
    run_demo(DemoSettings(options.out, options.config, options.seeds, options.epochs, options.teacher_epochs,
                          options.images, options.val_images, options.size, options.force))
    return 0
