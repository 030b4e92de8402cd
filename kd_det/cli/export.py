"""``kd-det export``: a student as a file of its own: plain weights, or a graph for onnxruntime and OpenVINO."""
from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from kd_det.cli.common import add_config_options, add_force_option, count, index, path, print_tables, read_options

DYNAMIC, FORMATS = ('batch', 'size'), ('onnx', 'openvino', 'pth')


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help='config of the run that wrote the checkpoint')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('out',
                        metavar='OUT',
                        type=path,
                        help="file to write: .onnx or .xml (OpenVINO), a graph from the image to its boxes; or .pth, "
                        'plain weights, with a config for stock MMDetection beside it')
    parser.add_argument('--format', choices=FORMATS, help='what to write; by default what the name of OUT says')
    parser.add_argument('--learner', type=lambda text: text if text == 'ensemble' else index(text), default=0,
                        metavar='K', help='of a run with peers, which of the learners: 0 is the student, 1 the first '
                        'peer; or the ensemble of those that share a trunk')
    graph = parser.add_argument_group('graphs')
    graph.add_argument('--size', nargs=2, type=count, metavar=('HEIGHT', 'WIDTH'),
                       help='of the image; by default such that every image of the test pipeline fits')
    graph.add_argument('--dynamic', type=_open, default=(), metavar='batch,size',
                       help='leave the number of images, their size, or both open')
    graph.add_argument('--dtype', choices=('uint8', 'float32'), default='uint8', help='of the image, 0 to 255 (uint8)')
    graph.add_argument('--channels', choices=('rgb', 'bgr'), default='rgb', help="order of the image's channels (rgb)")
    graph.add_argument('--half', action='store_true', help='half precision, what decodes boxes excepted')
    graph.add_argument('--no-nms', action='store_true', help='end with the candidates for non-maximum suppression')
    graph.add_argument('--images', type=count, default=32, metavar='N',
                       help='compare on at most so many validation images (32)')
    add_force_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.deploy.checkpoint import ExportedStudent
    from kd_det.deploy.export import export
    exported = export(options.config, options.checkpoint, options.out, format=options.format,
                      size=tuple(options.size) if options.size else None, dynamic=options.dynamic,
                      dtype=options.dtype, channels=options.channels, half=options.half, suppress=not options.no_nms,
                      images=options.images, data_root=options.data_root, options=read_options(options.cfg_options),
                      force=options.force, learner=options.learner)
    if isinstance(exported, ExportedStudent):
        print(f'{exported.checkpoint} holds the {exported.parameters:,} parameters of a {exported.detector}, '
              f'{exported.config} its config.')
    else:
        from kd_det.compat.console import PlainConsole
        print_tables(PlainConsole(), [exported.tabulate()])
    return 0


def _open(text: str) -> tuple[str, ...]:
    names = tuple(text.split(','))
    if not set(names) <= set(DYNAMIC):
        raise ArgumentTypeError(f"expected batch, size or batch,size, got '{text}'")
    return names
