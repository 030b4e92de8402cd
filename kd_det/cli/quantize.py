"""``kd-det quantize``: a student as a file that computes in integers, by calibration on images."""
from __future__ import annotations

from argparse import ArgumentParser, Namespace

from kd_det.cli.common import add_config_options, add_force_option, count, path, print_tables, read_options
from kd_det.config.choices import RANGES


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help='config of the run that wrote the checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out', metavar='OUT', type=path, help='file to write, .onnx')
    parser.add_argument('--calibrate', type=count, default=64, metavar='N',
                        help='calibrate and compare on so many images, of the training data where it is here (64)')
    parser.add_argument('--ranges', nargs='+', choices=RANGES, default=RANGES,
                        help='ways to find the ranges of activations; all are tried by default, and the best is taken')
    parser.add_argument('--symmetric', action='store_true', help='symmetric ranges of activations, for TensorRT')
    parser.add_argument('--size', nargs=2, type=count, metavar=('HEIGHT', 'WIDTH'),
                        help='of the image; by default such that every image of the test pipeline fits')
    parser.add_argument('--dtype', choices=('uint8', 'float32'), default='uint8', help='of the image, 0 to 255 (uint8)')
    parser.add_argument('--channels', choices=('rgb', 'bgr'), default='rgb', help="order of the image's channels (rgb)")
    add_force_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.deploy.quantization import quantize
    quantized = quantize(options.config, options.checkpoint, options.out, calibrate=options.calibrate,
                         size=tuple(options.size) if options.size else None, dtype=options.dtype,
                         channels=options.channels, ranges=options.ranges, symmetric=options.symmetric,
                         data_root=options.data_root, options=read_options(options.cfg_options), force=options.force)
    print_tables(PlainConsole(), [quantized.tabulate()])
    return 0
