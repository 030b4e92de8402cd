"""Time and peak memory of the feature losses, forward and backward, beside the same written operator by operator.

    python -m benchmarks.losses --out losses.json

Five levels (strides 8 to 128) of a padded batch; FGD with its masks, its context blocks and their gradients, the others
with the features that they get from their adapters. Plain forms: benchmarks/plain.py. Seconds are medians; both forms
take turns, so that what else the machine does weighs on both. Memory is what tensors made by forward and backward take
at the peak, student's and teacher's features not included, see kd_det/study/step_costs.py.
"""
from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import plain
from kd_det.context import DistillContext, LevelSpec
from kd_det.functional import features
from kd_det.losses import FGD
from kd_det.study.step_costs import measure_peak_memory, measure_seconds

STRIDES = (8, 16, 32, 64, 128)
MB = 2**20


class Case(NamedTuple):
    """One loss in two forms, each without arguments; and what both take the gradient of."""
    name: str
    plain: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    learning: list[Tensor]


class Pyramids:
    """Random features of student and teacher, and boxes of some 30 to 330 pixels a side."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.options, self.shape = options, tuple(options.image)
        sizes = [[ceil(side / stride) for side in self.shape] for stride in STRIDES]
        self.student, self.teacher = ([torch.randn(options.batch, options.channels, *size, device=options.device)
                                       for size in sizes] for _ in range(2))
        for feature in self.student:
            feature.requires_grad_()
        self.masks = [(torch.rand_like(feature[:, 0]) < 0.3).float() for feature in self.teacher]

    def fgd(self, num_boxes: int) -> Case:
        levels = tuple(LevelSpec(self.options.channels, stride) for stride in STRIDES)
        boxes = [self._boxes(num_boxes) for _ in range(self.options.batch)]
        context = DistillContext(
            student=dict(neck=tuple(self.student)), teachers=[dict(neck=tuple(self.teacher))],
            student_levels=dict(neck=levels), teacher_levels=[dict(neck=levels)], boxes=boxes,
            labels=[each.new_zeros(num_boxes).long() for each in boxes], batch_shape=self.shape,
            image_shapes=[self.shape] * self.options.batch)
        term = FGD()
        term.connect(context.student_levels, context.teacher_levels[0])
        term.to(self.options.device)
        blocks = list(zip(term.student_context, term.teacher_context))

        def written_down() -> Tensor:
            lists = [each.tolist() for each in boxes]
            return sum(plain.fgd(student, teacher, lists, self.shape, *pair)
                       for student, teacher, pair in zip(self.student, self.teacher, blocks))

        return Case('FGD', written_down, lambda: sum(term(context).values()), [*self.student, *term.parameters()])

    def others(self) -> list[Case]:
        forms = dict(
            DeFeat=(plain.defeat, lambda *each: sum(features.decoupled_imitation(*each))),
            FKD=(plain.fkd_imitation, fkd_imitation),
            CWD=(lambda s, t, _: plain.cwd(s, t), lambda s, t, _: features.channel_wise_kl(s, t, 1.0)),
            PKD=(lambda s, t, _: plain.pkd(s, t), lambda s, t, _: features.pearson_distance(s, t)),
            MGD=(lambda s, t, _: plain.mgd(s, t), lambda s, t, _: features.generation_distance(s, t)),
        )
        return [Case(name, *(self._over_levels(form) for form in both), self.student) for name, both in forms.items()]

    def _over_levels(self, loss: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: sum(loss(*level) for level in zip(self.student, self.teacher, self.masks))

    def _boxes(self, count: int) -> Tensor:
        size = torch.tensor(self.shape[::-1], device=self.options.device)
        centre = torch.rand(count, 2, device=size.device) * size
        side = 30 + 300 * torch.rand(count, 2, device=size.device)**2
        return torch.cat([(centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, size - 1)], 1)


def fkd_imitation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The attended difference alone: its other parts are vectors, or convolutions."""
    return features.fkd_loss(student, teacher, mask, student[:, :, 0, 0].detach(), student[:, :1].detach(),
                             feature_weight=1.0, pooling_weight=0.0)['imitation']


def list_cases(options: argparse.Namespace) -> Iterator[tuple[int | None, Case]]:
    """Yields all losses, FGD with each number of boxes an image."""
    pyramids = Pyramids(options)
    yield from ((boxes, pyramids.fgd(boxes)) for boxes in options.boxes)
    yield from ((None, case) for case in pyramids.others())


def measure(case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and MB of both forms.

    Raises:
        RuntimeError: The forms differ, in value or in gradient.
    """
    def gradients(form: Callable[[], Tensor]) -> Sequence[Tensor]:
        value = form()
        return (value.detach(), *torch.autograd.grad(value, case.learning))

    forms = (case.plain, case.ours)
    for expected, actual in zip(*map(gradients, forms)):
        # A bias before a softmax has the gradient 0, which the plain form only finds up to rounding.
        if expected.numel() > 1 and (actual - expected).norm() > 1e-4 * expected.norm():
            raise RuntimeError(f'{case.name}: the two forms differ.')
    times = [[measure_seconds(partial(gradients, form), options.device, 1, warmup=0) for form in forms]
             for _ in range(options.repeats + 1)][1:]
    peaks = [measure_peak_memory(partial(gradients, form), options.device) / MB for form in forms]
    return dict(zip(('plain_s', 'ours_s', 'plain_mb', 'ours_mb'), (*map(median, zip(*times)), *peaks)))


def table_of(rows: Sequence[dict]) -> Table:
    table = Table(title='Forward and backward of five levels')
    for heading in ('loss', 'boxes', 'plain', 'ours', 'faster', 'plain', 'ours', 'share of memory'):
        table.add_column(heading, justify='left' if heading == 'loss' else 'right')
    for row in rows:
        table.add_row(row['loss'], str(row['boxes'] or ''), f"{1e3 * row['plain_s']:.0f} ms",
                      f"{1e3 * row['ours_s']:.0f} ms", f"{row['plain_s'] / row['ours_s']:.1f} ×",
                      f"{row['plain_mb']:.0f} MB", f"{row['ours_mb']:.0f} MB",
                      f"{row['ours_mb'] / row['plain_mb']:.0%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--losses', nargs='+', default=['FGD', 'DeFeat', 'FKD', 'CWD', 'PKD', 'MGD'])
    parser.add_argument('--boxes', nargs='+', type=int, default=[10, 60, 500], help='boxes an image, for FGD')
    parser.add_argument('--image', nargs=2, type=int, default=[800, 1344], help='height and width of the padded batch')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--channels', type=int, default=256)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, help='write the numbers to this file, as JSON')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    for boxes, case in list_cases(options):
        if case.name in options.losses:
            rows.append(dict(loss=case.name, boxes=boxes, **measure(case, options)))
    Console().print(table_of(rows))
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != 'out'}
        versions = dict(python=platform.python_version(), torch=torch.__version__)
        options.out.write_text(json.dumps(dict(settings=settings, versions=versions, rows=rows), indent=2) + '\n',
                               encoding='utf-8')


if __name__ == '__main__':
    main()
