"""``kd-det inspect``: one batch of a distillation, as tables and pictures."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.cli.common import add_config_options, load_distillation, prepare_without_runner

if TYPE_CHECKING:
    from mmengine.config import Config

    from kd_det.distillers import DetectionDistiller


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help="config of a distillation: a file, or 'package::folder/file.py'; kd-det distill "
                        'saves one in its work dir')
    parser.add_argument('--image', metavar='FILE', help='look at this image, without ground truth, prepared as for '
                        'validation (at the first training batch by default)')
    parser.add_argument('--out', metavar='DIR', type=Path, help='folder for the pictures (work_dirs/CONFIG/inspection)')
    parser.add_argument('--checkpoint', metavar='FILE', help='of the student: look at what it is after some training; '
                        'through an untrained head hardly any gradient of the task passes')
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument('--teacher-checkpoint', metavar='FILE', help="the teacher's weights, in place of the config's")
    teacher.add_argument('--random-teacher', action='store_true', help='a dry run without the weights of any teacher')
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.checks.doctor import check_config, explain
    from kd_det.compat.console import PlainConsole
    from kd_det.config.classes import training_classes
    from kd_det.study.inspection import first_training_batch, image_batch, inspect_step, tap_table, term_table
    from kd_det.study.masks_shown import draw_step
    config = load_distillation(options)
    set_teacher(config, options)
    check_config(config, splits=() if options.image else ('train', ))
    prepare_without_runner(config, (config.get('randomness') or {}).get('seed') or 0)
    with explain(config):
        distiller = build_distiller(config, options.checkpoint)
        batch, names = (image_batch(config, options.image), training_classes(config)) if options.image else \
            first_training_batch(config)
        distiller.match_classes(names)
        step = inspect_step(distiller, batch)
    console = PlainConsole()
    console.print(tap_table(distiller, step), term_table(distiller, step))
    files = draw_step(distiller, step, options.out or Path('work_dirs') / Path(options.config).stem / 'inspection')
    console.print(f'{len(files)} pictures of masks and attentions are in {files[0].parent}.' if files else
                  'There are no pictures: no term compares features level by level, and only such terms look '
                  'somewhere.',
                  highlight=False)
    return 0


def set_teacher(config: Config, options: Namespace) -> None:
    """Applies ``--teacher-checkpoint`` and ``--random-teacher``."""
    from kd_det.config.files import ConfigurationError
    teachers = [config.model.teacher] if isinstance(config.model.teacher, dict) else config.model.teacher
    if options.teacher_checkpoint and len(teachers) > 1:
        raise ConfigurationError(f'--teacher-checkpoint is for one teacher, and this config has {len(teachers)}: set '
                                 'theirs with --cfg-options model.teacher.0.checkpoint=FILE …')
    for teacher in teachers:
        if options.teacher_checkpoint:
            teacher.checkpoint = options.teacher_checkpoint
        elif options.random_teacher:
            teacher.update(checkpoint=None, random_teacher=True)


def build_distiller(config: Config, checkpoint: str | None = None) -> DetectionDistiller:
    """The distiller as it is when training starts, or as a checkpoint has it."""
    from mmengine.device import get_device

    from kd_det.compat import load_checkpoint
    from kd_det.registry import build_detector
    from kd_det.teachers import load_strictly
    from kd_det.training.hooks import CHECKPOINT_KEY
    distiller = build_detector(config.model)
    distiller.init_weights()
    checkpoint = checkpoint or config.get('load_from')
    if checkpoint:
        load_strictly(distiller, checkpoint, role='student')
        loaded = load_checkpoint(checkpoint)
        if CHECKPOINT_KEY in loaded:
            distiller.load_terms(loaded[CHECKPOINT_KEY]['terms'])
    return distiller.to(get_device()).train()
