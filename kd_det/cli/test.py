"""``kd-det test``: MMDetection's evaluation of a checkpoint or an exported file, with its options."""
from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace

from kd_det.cli.common import add_force_option, add_run_options, amount, read_options


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config',
                        help="config file, or 'package::folder/file.py'; of a distillation, its student is tested: one "
                        'that was trained for integers computes in them, unless --cfg-options model.quantize=None')
    parser.add_argument('checkpoint', help='checkpoint file, or a file that kd-det export wrote: .onnx, .xml')
    parser.add_argument('--out', type=_pickle_file, metavar='FILE.pkl', help='write the predictions to this file')
    parser.add_argument('--show', action='store_true', help='show the predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='save painted images in this folder within the work dir')
    parser.add_argument('--wait-time', type=amount, default=2, metavar='SECONDS', help='how long --show shows each (2)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    add_force_option(parser)
    add_run_options(parser)


def run(options: Namespace) -> int:
    from kd_det.training.runs import evaluate
    os.environ.setdefault('LOCAL_RANK', str(options.local_rank))
    evaluate(options.config, options.checkpoint, data_root=options.data_root, work_dir=options.work_dir,
             tta=options.tta, out=options.out, show=options.show, show_dir=options.show_dir,
             wait_time=options.wait_time, launcher=options.launcher, options=read_options(options.cfg_options),
             force=options.force)
    return 0


def _pickle_file(path: str) -> str:
    if not path.endswith(('.pkl', '.pickle')):
        raise ArgumentTypeError(f"'{path}' does not end in .pkl or .pickle")
    return path
