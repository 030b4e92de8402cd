"""``kd-det report``: what runs left behind, on one page."""
from __future__ import annotations

import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path

from kd_det.cli.common import add_config_options, apply_config_options


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR',
                        help='of kd-det benchmark or sweep, finished or not; or of single runs of distill or train')
    parser.add_argument('--out', type=Path, metavar='FILE', help='the page (report.html in the first WORK_DIR)')
    parser.add_argument('--images', type=int, default=8, metavar='N',
                        help='validation images to show, evenly spaced over the data (8)')
    parser.add_argument('--show', nargs='+', default=(), metavar='FILE',
                        help='validation images to show in place of these, by the names of their files')
    parser.add_argument('--teacher-checkpoint', metavar='FILE', help="the teacher's weights, where they are no longer "
                        'where the runs had them')
    add_config_options(parser)


def run(options: Namespace) -> int:
    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    from kd_det.compat.console import PlainConsole
    from kd_det.study.report.page import collect, render
    from kd_det.study.report.runs import read_studies
    console = PlainConsole(highlight=False)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    register_all_modules(init_default_scope=True)
    MMLogger.get_current_instance().setLevel('WARNING')
    warnings.filterwarnings('ignore', category=UserWarning)  # of PyTorch about mmdet's meshgrid, for each detector
    studies = []
    for study in read_studies(options.work_dirs):
        for each in study.runs:
            apply_config_options(each.config, options)
        teacher = study.teacher
        if teacher and options.teacher_checkpoint:
            teacher['checkpoint'] = options.teacher_checkpoint
        studies.append(collect(study, options.images, teacher, say, options.show))
        for note in studies[-1]['notes']:
            say(f'Note: {note}')
    out = options.out or options.work_dirs[0] / 'report.html'
    out.write_text(render(studies), encoding='utf-8')
    say(f'Saved {out} ({out.stat().st_size / 1e6:.1f} MB).')
    return 0
