"""``kd-det predict``: an exported file on photographs, as pictures and COCO results."""
from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace

from kd_det.cli.common import Number, add_force_option, count, path, print_tables
from kd_det.config.choices import RUNTIMES


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('model', metavar='MODEL', type=path, help='file that kd-det export wrote: .onnx, .xml')
    parser.add_argument('images', metavar='IMAGE', nargs='+', type=path, help='photographs, and folders of them')
    parser.add_argument('--out', metavar='DIR', type=path,
                        help='folder for pictures, predictions.json (COCO results) and images.json, which names what '
                        'the former numbers (work_dirs/MODEL/predictions)')
    parser.add_argument('--threshold', type=Number(float, 0, 1), default=0.3, metavar='SCORE',
                        help='lowest score that is painted (0.3); predictions.json has all')
    parser.add_argument('--annotations', metavar='FILE', type=path, help="COCO file whose images' and categories' "
                        'numbers predictions.json has, by name; by default both are counted from 1')
    parser.add_argument('--runtime', choices=RUNTIMES, help="by what the file is run (by default as its name says)")
    parser.add_argument('--threads', type=count, metavar='N', help='how many the runtime may use')
    add_force_option(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.deploy.prediction import predict
    found = predict(options.model, options.images, out=options.out, threshold=options.threshold,
                    runtime=options.runtime, threads=options.threads, annotations=options.annotations,
                    force=options.force)
    print_tables(PlainConsole(), [found.tabulate()])
    for name, reason in found.unreadable.items():
        print(f"kd-det: error: '{name}' can not be read ({reason})", file=sys.stderr)
    return 2 if found.unreadable else 0
