"""``kd-det inspect``: one batch of a distillation, as tables and pictures."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kd_det.cli.common import add_config_options, add_force_option, path, print_tables, read_options


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help="config of a distillation: a file, or 'package::folder/file.py'; kd-det distill "
                        'saves one in its work dir')
    parser.add_argument('--image', metavar='FILE', help='look at this image, without ground truth, prepared as for '
                        'validation (at the first training batch by default)')
    parser.add_argument('--out', metavar='DIR', type=path, help='folder for the pictures (work_dirs/CONFIG/inspection)')
    parser.add_argument('--checkpoint', metavar='FILE', help='of the student: look at what it is after some training; '
                        'through an untrained head hardly any gradient of the task passes')
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument('--teacher-checkpoint', metavar='FILE', help="the teacher's weights, in place of the config's")
    teacher.add_argument('--random-teacher', action='store_true', help='a dry run without the weights of any teacher')
    add_force_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.study.inspection import inspect
    inspection = inspect(
        options.config, image=options.image, checkpoint=options.checkpoint,
        teacher_checkpoint=options.teacher_checkpoint, random_teacher=options.random_teacher, out=options.out,
        data_root=options.data_root, options=read_options(options.cfg_options), force=options.force)
    console, pictures = PlainConsole(), inspection.pictures
    print_tables(console, inspection.tabulate())
    console.print(f'{len(pictures)} pictures of masks and attentions are in {pictures[0].parent}.' if pictures else
                  'There are no pictures: no term compares features level by level, and only such terms look '
                  'somewhere.',
                  highlight=False, soft_wrap=True)
    return 0
