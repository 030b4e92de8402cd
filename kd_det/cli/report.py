"""``kd-det report``: what runs left behind, on one page."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kd_det.cli.common import add_config_options, add_force_option, index, path, read_options


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('work_dirs', nargs='+', type=path, metavar='WORK_DIR',
                        help='of kd-det benchmark, sweep or compress, finished or not; or of single runs of distill or '
                        'train')
    parser.add_argument('--out', type=path, metavar='FILE', help='the page (report.html in the first WORK_DIR)')
    parser.add_argument('--images', type=index, default=8, metavar='N',
                        help='validation images to show, evenly spaced over the data (8)')
    parser.add_argument('--show', nargs='+', default=(), metavar='FILE',
                        help='validation images to show in place of these, by the names of their files')
    parser.add_argument('--teacher-checkpoint', metavar='FILE', help="the teacher's weights, where they are no longer "
                        'where the runs had them')
    add_force_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.study.report import report
    console = PlainConsole(highlight=False)

    def log(text: str) -> None:
        console.print(text, soft_wrap=True)

    made = report(options.work_dirs, out=options.out, images=options.images, show=options.show,
                  teacher_checkpoint=options.teacher_checkpoint, data_root=options.data_root,
                  options=read_options(options.cfg_options), force=options.force, log=log)
    log(f'Saved {made.file} ({made.file.stat().st_size / 1e6:.1f} MB).')
    return 0
