"""``kd-det export``: a plain student's checkpoint and config, for stock MMDetection and whatever reads its models."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kd_det.cli.common import add_config_options, add_force_option, path, read_options


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help='config of the run that wrote the checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out',
                        metavar='OUT.pth',
                        type=path,
                        help='file to write; the config comes beside it, as OUT.py')
    add_force_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.training.export import export
    student = export(options.config, options.checkpoint, options.out, data_root=options.data_root,
                     options=read_options(options.cfg_options), force=options.force)
    print(f'{student.checkpoint} holds the {student.parameters:,} parameters of a {student.detector}, {student.config} '
          'its config.')
    return 0
