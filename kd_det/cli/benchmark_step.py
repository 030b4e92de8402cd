"""``kd-det benchmark-step``: what a distilled step costs beside the student's own."""
from __future__ import annotations

import json
import platform
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from kd_det.cli.common import add_config_options, load_distillation, positive, prepare_without_runner, read_options

if TYPE_CHECKING:
    from mmengine.config import Config
    from rich.table import Table

    from kd_det.checks.synthetic import Size
    from kd_det.distillers import DetectionDistiller
    from kd_det.study.step_costs import StepCosts

MEGABYTE = 2**20


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument('config', help="config of a distillation: a file, or 'package::folder/file.py'; its data and "
                        'checkpoints are not needed, for weights and images are random')
    parser.add_argument('--batch-size', type=positive, default=2, metavar='N', help='images in the batch (2)')
    parser.add_argument('--size', type=positive, nargs=2, metavar=('H', 'W'),
                        help='of the images (the largest that the training pipeline makes of 480 x 640 pixels)')
    parser.add_argument('--boxes', type=int, default=10, metavar='N', help='objects in each image (10)')
    parser.add_argument('--repeats', type=positive, default=5, metavar='N',
                        help='rounds, of which the medians count (5)')
    parser.add_argument('--threads', type=positive, metavar='N', help="PyTorch's threads on the CPU (its own choice)")
    parser.add_argument('--device', help='cpu, cuda, … (a GPU where there is one)')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write the numbers to this file, as JSON')
    add_config_options(parser)


def run(options: Namespace) -> int:
    import torch
    from mmengine.device import get_device

    from kd_det.checks.synthetic import USUAL_SIZES, synthetic_batch, training_sizes
    from kd_det.compat.console import PlainConsole
    from kd_det.config.files import ConfigurationError
    from kd_det.study.step_costs import measure_step, random_distiller
    from kd_det.teachers.bridge import SIZE_MISMATCH
    options.device = options.device or get_device()
    config = load_distillation(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    prepare_without_runner(config, seed=0)
    distiller = random_distiller(config, options.device)
    options.size = tuple(options.size or max(training_sizes(config, USUAL_SIZES[:1]), key=prod))
    batch = synthetic_batch(distiller.student, options.batch_size, options.size, options.boxes)
    try:
        costs = measure_step(distiller, batch, config.optim_wrapper, options.repeats)
    except RuntimeError as error:
        if not SIZE_MISMATCH.search(str(error)):
            raise
        raise ConfigurationError(
            f'A step fails on images of {options.size[0]} × {options.size[1]} pixels: {error}. Where the levels of the '
            "student's pyramid do not fit each other at that size, set data_preprocessor.pad_size_divisor=32 in its "
            'config, or its largest stride; another size is tried with --size H W (--debug shows where).') from error
    PlainConsole().print(costs_table(costs, options.batch_size, options.size, weights_of_teachers(distiller)))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record(costs, distiller, config, options), indent=2) + '\n', encoding='utf-8')
    return 0


def weights_of_teachers(distiller: DetectionDistiller) -> int:
    """Bytes."""
    tensors = (tensor for teacher in distiller.teachers
               for tensor in (*teacher.model.parameters(), *teacher.model.buffers()))
    return sum(tensor.nbytes for tensor in tensors)


def costs_table(costs: StepCosts, images: int, size: Size, weights: int) -> Table:
    """The parts, and what distilling costs in plain forwards of the teacher.

    Args:
        costs: What was measured.
        images: In the batch.
        size: Height and width of the images.
        weights: Bytes of the teachers' weights.
    """
    from rich.table import Table

    from kd_det.study.step_costs import DISTILLED, PLAIN_TEACHER, STUDENT
    plain, student = costs.parts[PLAIN_TEACHER].seconds, costs.parts[STUDENT].memory
    more = (costs.parts[DISTILLED].memory - student) / MEGABYTE
    low, high = costs.middle_half
    table = Table('Part', 'Time', 'Plain teacher forwards', 'Images / s', 'Peak memory',
                  title=f'A training step, {images} × {size[0]} × {size[1]} pixels',
                  caption=f'Distilling costs {costs.distilling * 1e3:.1f} ms, {costs.ratio:.2f} plain '
                  f'forwards of the teacher ({low:.2f} to {high:.2f} in the middle half of the rounds), and {more:.1f} '
                  f'MiB at the peak beside {weights / MEGABYTE:.1f} MiB of its weights', caption_justify='left')
    for column in table.columns[1:]:
        column.justify = 'right'
    for name, cost in costs.parts.items():
        rate = f'{images / cost.seconds:.2f}' if name in (STUDENT, DISTILLED) else ''
        table.add_row(name, f'{cost.seconds * 1e3:.1f} ms', f'{cost.seconds / plain:.2f}', rate,
                      f'{cost.memory / MEGABYTE:.1f} MiB')
    return table


def record(costs: StepCosts, distiller: DetectionDistiller, config: Config, options: Namespace) -> dict:
    """All that was measured, and on what."""
    import torch
    return dict(
        config=options.config, options=read_options(options.cfg_options),
        batch_size=options.batch_size, size=list(options.size), boxes=options.boxes, repeats=options.repeats,
        device=options.device, threads=torch.get_num_threads(), processor=platform.machine(), torch=torch.__version__,
        engines=[asdict(teacher.engine) for teacher in distiller.teachers],
        parts={name: cost._asdict() for name, cost in costs.parts.items()},
        distilling=costs.distilling, ratio=costs.ratio, middle_half=costs.middle_half,
        teacher_weights=weights_of_teachers(distiller))
