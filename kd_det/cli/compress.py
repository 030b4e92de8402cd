"""``kd-det compress``: the whole way from a teacher to a file on a device."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kd_det.cli.common import (
    add_config_options,
    add_importance_option,
    add_inheritance_option,
    add_weight_options,
    count,
    inherited_parts,
    path,
    print_tables,
    read_options,
    seed,
    share,
)
from kd_det.config.choices import RUNTIMES


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('student', metavar='STUDENT', help="config of the student, or 'mmdet::folder/file.py'")
    parser.add_argument('--teacher', required=True, metavar='CONFIG', help='config of the teacher')
    parser.add_argument('--teacher-checkpoint', required=True, metavar='FILE', help="the teacher's weights")
    parser.add_argument('--out', type=path, required=True, metavar='DIR',
                        help='folder for all of it; what is finished there is not done again')
    parser.add_argument('--method', default='fgd', help='by which it is distilled, see kd-det methods (fgd)')
    parser.add_argument('--macs', type=share, metavar='SHARE',
                        help='prune to this share of the multiply-accumulate operations, and distil again')
    add_importance_option(parser)
    parser.add_argument('--int8', action='store_true',
                        help='quantise after training, and beside that in a training with distillation')
    parser.add_argument('--epochs', type=count, metavar='N', help="of each distillation (the config's own)")
    parser.add_argument('--quantized-epochs', type=count, metavar='N',
                        help='of that in integers (a quarter of the others)')
    parser.add_argument('--calibrate', type=count, default=64, metavar='N',
                        help='images on which ranges are found after training (64)')
    parser.add_argument('--size', nargs=2, type=count, metavar=('HEIGHT', 'WIDTH'),
                        help='of the image of the files; by default such that every image of the test pipeline fits')
    parser.add_argument('--runtime', nargs='+', choices=RUNTIMES, default=RUNTIMES, help='in which latency is measured')
    parser.add_argument('--threads', type=count, default=1, metavar='N', help='how many it may use there (1)')
    parser.add_argument('--seed', type=seed, default=0, help='of all trainings (0)')
    add_inheritance_option(parser)
    add_weight_options(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.study.compression import PAGE, compress
    result = compress(options.student, options.teacher, options.teacher_checkpoint, options.out, method=options.method,
                      macs=options.macs, importance=options.importance, int8=options.int8, epochs=options.epochs,
                      quantized_epochs=options.quantized_epochs, calibrate=options.calibrate,
                      size=tuple(options.size) if options.size else None, runtimes=options.runtime,
                      threads=options.threads, seed=options.seed, inherit=inherited_parts(options),
                      balance=options.balance, data_root=options.data_root, options=read_options(options.cfg_options))
    print_tables(PlainConsole(), [result.tabulate()])
    print(f'{result.file} goes to the device; {result.folder / PAGE} shows the way.')
    return 0
