"""``kd-det benchmark-step``: what a distilled step costs beside the student's own."""
from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from kd_det.cli.common import (
    add_config_options,
    add_force_option,
    count,
    index,
    path,
    print_tables,
    read_options,
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help="config of a distillation: a file, or 'package::folder/file.py'; its data and "
                        'checkpoints are not needed, for weights and images are random')
    parser.add_argument('--batch-size', type=count, default=2, metavar='N', help='images in the batch (2)')
    parser.add_argument('--size', type=count, nargs=2, metavar=('H', 'W'),
                        help='of the images (the largest that the training pipeline makes of 480 x 640 pixels)')
    parser.add_argument('--boxes', type=index, default=10, metavar='N', help='objects in each image (10)')
    parser.add_argument('--repeats', type=count, default=5, metavar='N',
                        help='rounds, of which the medians count (5)')
    parser.add_argument('--threads', type=count, metavar='N', help="PyTorch's threads on the CPU (its own choice)")
    parser.add_argument('--device', help='cpu, cuda, … (a GPU where there is one)')
    parser.add_argument('--out', type=path, metavar='FILE', help='write the numbers to this file, as JSON')
    add_force_option(parser)
    add_config_options(parser)


def run(options: Namespace) -> int:
    from kd_det.compat.console import PlainConsole
    from kd_det.compat.writing import refuse_to_replace, write_whole
    from kd_det.study.step_costs import measure_step_costs
    if options.out:
        refuse_to_replace(options.out, lambda content: b'"teacher_weights"' in content, 'the costs of a step',
                          options.force)
    costs = measure_step_costs(
        options.config, batch_size=options.batch_size, size=options.size, boxes=options.boxes, repeats=options.repeats,
        threads=options.threads, device=options.device, data_root=options.data_root,
        options=read_options(options.cfg_options))
    print_tables(PlainConsole(), [costs.tabulate()])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, json.dumps(costs.to_dict(), indent=2) + '\n')
    return 0
