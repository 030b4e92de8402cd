"""Time and peak memory of losses and masks, forward and backward, beside the same written operator by operator.

    python -m benchmarks.losses --out losses.json
    python -m benchmarks.losses --losses outputs --threads 1 --clock process --out losses_of_outputs.json

Five levels (strides 8 to 128) of a padded batch; FGD with its masks, its context blocks and their gradients, the others
with the features that they get from their adapters. Outputs of heads are those of a RetinaNet, with nine anchors a
cell, and of a GFL, without anchors, of COCO's 80 classes. Plain forms: benchmarks/plain.py. Seconds are medians; both
forms take turns, so that what else the machine does weighs on both. Memory is what tensors made by forward and backward
take at the peak, student's and teacher's features or outputs not included, see kd_det/study/step_costs.py.
"""
from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import plain
from kd_det.context import DistillContext, LevelSpec
from kd_det.functional import features, masks
from kd_det.functional.blocks import is_on_host
from kd_det.heads import DenseOutputs
from kd_det.losses import FGD, DenseClassification, DenseRegression, RankMimicking
from kd_det.masks import build_mask
from kd_det.study.step_costs import measure_peak_memory, measure_seconds

STRIDES = (8, 16, 32, 64, 128)
MB, CLASSES, OUTPUTS = 2**20, 80, 'outputs'


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
        boxes = [self.draw_boxes(num_boxes) for _ in range(self.options.batch)]
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

    def draw_boxes(self, count: int) -> Tensor:
        size = torch.tensor(self.shape[::-1], device=self.options.device)
        centre = torch.rand(count, 2, device=size.device) * size
        side = 30 + 300 * torch.rand(count, 2, device=size.device)**2
        return torch.cat([(centre - side / 2).clamp(min=0), torch.minimum(centre + side / 2, size - 1)], 1)


class Outputs:
    """Random outputs of two dense heads, and boxes as those of the pyramids.

    Args:
        options: The command's.
        anchors: Priors of each cell, three shapes in as many sizes as it takes.
        activation: Of the classes.
        bins: Of distributions over distances; 0 for none.
    """

    def __init__(self, options: argparse.Namespace, pyramids: Pyramids, anchors: int = 9, activation: str = 'sigmoid',
                 bins: int = 0) -> None:
        self.device, self.pyramids = options.device, pyramids
        self.shapes = tuple(tuple(feature.shape[-2:]) for feature in pyramids.student)
        self.priors = tuple(self._make_priors(stride, shape, anchors) for stride, shape in zip(STRIDES, self.shapes))
        self.student, self.teacher = (self._make_outputs(options.batch, activation, bins) for _ in range(2))
        self.learning = [level.requires_grad_() for level in (
            *self.student.logits, *self.student.regressions, *(self.student.distributions or ()))]
        self.draw_boxes(10)

    def draw_boxes(self, count: int) -> int:
        """Draws so many boxes for each image, in place of those before."""
        batch = len(self.learning[0])
        boxes = [self.pyramids.draw_boxes(count) for _ in range(batch)]
        labels = [torch.randint(CLASSES, (count, ), device=self.device) for _ in boxes]
        nothing = [torch.zeros(batch, 1, *shape, device=self.device) for shape in self.shapes]
        self.context = DistillContext.of_features(nothing, nothing, STRIDES, boxes, labels,
                                                  batch_shape=self.pyramids.shape)
        return count

    def _make_priors(self, stride: int, shape: Sequence[int], anchors: int) -> Tensor:
        y, x = torch.meshgrid(*(stride * torch.arange(side, device=self.device) for side in shape), indexing='ij')
        sizes = [4 * stride * 2**(index // 3 / 3) for index in range(anchors)]
        ratios = [2**((index % 3 - 1) / 2) if anchors > 1 else 1 for index in range(anchors)]
        corners = [[-size * ratio / 2, -size / ratio / 2, size * ratio / 2, size / ratio / 2]
                   for size, ratio in zip(sizes, ratios)]
        return (torch.stack([x, y, x, y], -1).view(-1, 1, 4) + torch.tensor(corners, device=self.device)).view(-1, 4)

    def _make_outputs(self, batch: int, activation: str, bins: int) -> DenseOutputs:
        def draw(*size: int) -> tuple[Tensor, ...]:
            return tuple(torch.randn(batch, len(each), *size, device=self.device) for each in self.priors)

        regressions = draw(4)
        return DenseOutputs(
            logits=tuple(each.mul_(1.5).sub_(3) for each in draw(CLASSES + (activation == 'softmax'))),
            activation=activation, regressions=regressions, shapes=self.shapes, strides=STRIDES,
            decode=lambda: tuple(prior + 8 * each for prior, each in zip(self.priors, regressions)),
            generate_priors=lambda: self.priors, distributions=draw(4, bins) if bins else None,
            assigned=tuple(each > 3 for each in draw()))

    def case(self, name: str, written_down: Callable[..., Tensor], ours: Callable[[DistillContext], Tensor],
             learns: bool = True) -> Case:
        """Of a plain form, given all outputs, and of a term or mask in a step that has computed nothing yet."""
        def fresh() -> tuple[DenseOutputs, DenseOutputs]:
            return replace(self.student), replace(self.teacher)

        def measured() -> Tensor:
            student, teacher = fresh()
            return ours(replace(self.context, student_outputs=dict(bbox_head=student),
                                teacher_outputs=[dict(bbox_head=teacher)]))

        return Case(name, lambda: written_down(*fresh(), self.context), measured, self.learning if learns else [])


def cases_of_outputs(options: argparse.Namespace) -> Iterator[tuple[int | None, Case]]:
    """Yields the terms and masks that read dense heads; each set of outputs is let go of with its last case.

    Boxes are ten an image, and more where it is them that cost.
    """
    def term(kind: type, **arguments: Any) -> Callable[[DistillContext], Tensor]:
        built = kind(**arguments, **{} if kind is RankMimicking else dict(normalizer='none'))
        return lambda context: sum(built(context).values())

    def mask(config: str) -> Callable[[DistillContext], Tensor]:
        built = build_mask(config)
        return lambda context: torch.cat([built.cells(context.read_level(level)).flatten()
                                          for level in range(len(STRIDES))])

    pyramids = Pyramids(options)
    outputs = Outputs(options, pyramids)
    yield None, outputs.case('KD, classes', partial(plain.classes, beta=0, temperature=2.0),
                             term(DenseClassification, beta=0, temperature=2.0))
    yield None, outputs.case('BCKD, classes', partial(plain.classes, beta=1), term(DenseClassification))
    yield None, outputs.case('KD by CWTM', partial(plain.classes, beta=0, treatment='cwtm'),
                             term(DenseClassification, beta=0, treatment='cwtm'))
    yield None, outputs.case('KD by DKPP', partial(plain.classes, beta=0, treatment='dkpp'),
                             seeded(term(DenseClassification, beta=0, treatment='dkpp')))
    yield None, outputs.case('FRS, classes', partial(plain.classes, beta=0, weighting='richness'),
                             term(DenseClassification, beta=0, weighting='richness'))
    yield None, outputs.case('BCKD, boxes', partial(plain.boxes, weighting='gap'),
                             term(DenseRegression, weighting='gap'))
    yield None, outputs.case('CrossKD, boxes', partial(plain.boxes, weighting='confidence'), term(DenseRegression))
    yield None, outputs.case('RM', plain.rank_mimicking, term(RankMimicking))
    yield None, outputs.case('PFI, mask', plain.prediction_difference, mask('PredictionDifference'), learns=False)
    yield None, outputs.case('FRS, mask', plain.confidence, mask('TeacherConfidence'), learns=False)
    for count in map(outputs.draw_boxes, (10, 30, 100)):
        yield count, outputs.case('PGD, mask', plain.prediction_quality, mask('PredictionQuality'), learns=False)
        yield count, outputs.case('LD, region', plain.valuable_region, find_valuable, learns=False)
    outputs = Outputs(options, pyramids, activation='softmax')
    yield None, outputs.case('KD, softmax', partial(plain.classes, temperature=2.0),
                             term(DenseClassification, temperature=2.0))
    outputs = Outputs(options, pyramids, anchors=1, bins=17)
    yield None, outputs.case('LD, positives', partial(plain.distributions, weighting='positives'),
                             term(DenseRegression, form='distribution', weighting='positives'))
    yield None, outputs.case('LD, valuable', partial(plain.distributions, weighting='valuable'),
                             term(DenseRegression, form='distribution', weighting='valuable'))


def find_valuable(context: DistillContext) -> Tensor:
    """The region of a head with several anchors a cell, which is more than LD's own have."""
    outputs = context.student_outputs['bbox_head']
    if is_on_host(outputs.priors[0]):
        return masks.valuable_region_of_grids(outputs.priors, outputs.shapes, context.boxes)
    return masks.valuable_region(outputs.priors, context.boxes)


def seeded(form: Callable[[DistillContext], Tensor]) -> Callable[[DistillContext], Tensor]:
    """The same, which draws the same random numbers each time."""
    def draw(context: DistillContext) -> Tensor:
        torch.manual_seed(0)
        return form(context)

    return draw


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
        learnt = torch.autograd.grad(value, case.learning, allow_unused=True) if case.learning else ()
        return (value.detach(), *(each for each in learnt if each is not None))

    forms = (case.plain, case.ours)
    for expected, actual in zip(*map(gradients, forms)):
        # A bias before a softmax has the gradient 0, which the plain form only finds up to rounding.
        if expected.numel() > 1 and (actual - expected).norm() > 1e-4 * expected.norm():
            raise RuntimeError(f'{case.name}: the two forms differ.')
    time = measure_process_seconds if getattr(options, 'clock', 'wall') == 'process' else partial(
        measure_seconds, device=options.device, repeats=1, warmup=0)
    times = [[time(partial(gradients, form)) for form in forms]
             for _ in range(options.repeats + 1)][1:]
    peaks = [measure_peak_memory(partial(gradients, form), options.device) / MB for form in forms]
    return dict(zip(('plain_s', 'ours_s', 'plain_mb', 'ours_mb'), (*map(median, zip(*times)), *peaks)))


def measure_process_seconds(call: Callable[[], object]) -> float:
    """What the process itself computed, whatever else the machine does; of one thread."""
    start = process_time()
    call()
    return process_time() - start


def table_of(rows: Sequence[dict]) -> Table:
    table = Table(title='Forward and backward of five levels; of masks, forward')
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
    parser.add_argument('--losses', nargs='+', default=['FGD', 'DeFeat', 'FKD', 'CWD', 'PKD', 'MGD'],
                        help="names of rows; 'features', or 'outputs' for all that read the outputs of dense heads")
    parser.add_argument('--boxes', nargs='+', type=int, default=[10, 60, 500], help='boxes an image, for FGD')
    parser.add_argument('--image', nargs=2, type=int, default=[800, 1344], help='height and width of the padded batch')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--channels', type=int, default=256)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--clock', choices=['wall', 'process'], default='wall',
                        help="'process' on a busy CPU, with one thread: the seconds of the process itself")
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, help='write the numbers to this file, as JSON')
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rows = []
    for group, cases in (('features', list_cases(options)), (OUTPUTS, cases_of_outputs(options))):
        rows.extend(dict(loss=case.name, boxes=boxes, **measure(case, options)) for boxes, case in cases
                    if {case.name, group} & set(options.losses))
    Console().print(table_of(rows))
    if options.out:
        settings = {name: value for name, value in vars(options).items() if name != 'out'}
        versions = dict(python=platform.python_version(), torch=torch.__version__)
        options.out.write_text(json.dumps(dict(settings=settings, versions=versions, rows=rows), indent=2) + '\n',
                               encoding='utf-8')


if __name__ == '__main__':
    main()
