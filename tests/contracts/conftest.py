"""Scenes: one step of a tiny pair with all that a term or a mask may read, in the situations that training meets.

Student and teacher have the neck and the backbone of three levels, a GFL head, an RPN, a RoI head and the queries of a
DETR; all of random numbers, so that no detector is built.
"""
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from mmdet.registry import MODELS
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from kd_det.context import DistillContext
from kd_det.functional.queries import corners
from kd_det.heads import HeadRequest, QueryOutputs, Regions, RoIOutputs, TeacherTowers, read_dense
from kd_det.heads.towers import read_towers, record_towers, tower_widths
from kd_det.losses import DistillTerm

STRIDES, CLASSES, STUDENT_WIDTH, TEACHER_WIDTH = (8, 16, 32), 3, 8, 12
BOXES = ([[4., 4., 60., 40.], [50., 8., 90., 60.]], [[2., 2., 30., 20.]], [[10., 6., 26., 50.]])

# Situation: shape of the batch and of its images. 'plain' has padding beside the second image.
SCENES = dict(
    plain=((64, 96), [(64, 96), (40, 56), (64, 96)]),
    no_boxes=((64, 96), [(64, 96), (40, 56), (64, 96)]),
    unlabelled=((64, 96), [(64, 96), (40, 56), (64, 96)]),
    all_padding=((64, 96), [(64, 96), (0, 0), (64, 96)]),
    one_cell=((8, 8), [(8, 8)]))


class Scene(NamedTuple):
    """A step, and what a term is told before it.

    Attributes:
        context: The step, with all outputs of heads.
        student: The student's tensors that a gradient can reach, all leaves.
        widths: Of the towers of the student's and of the teacher's dense head.
    """
    context: DistillContext
    student: list[Tensor]
    widths: tuple

    def connect(self, term: DistillTerm) -> DistillTerm:
        """Connects a term as the distiller does, with the specs of what it declares, and no others."""
        sides = ((term.student_taps, term.student_heads, self.context.student_levels),
                 (term.teacher_taps, term.teacher_heads, self.context.teacher_levels[term.teacher_index]))
        specs = [{**{path: levels[path] for path in taps},
                  **{head: widths for head in heads if HeadRequest.parse(head).part == 'towers'}}
                 for (taps, heads, levels), widths in zip(sides, self.widths)]
        term.connect(*specs)
        return term

    def show(self, student_heads=(), teacher_heads=(), student_taps=None, teacher_taps=None, **changes):
        """The context with nothing but what is declared; of taps all by default."""
        context = self.context

        def choose(values: dict, names) -> dict:
            return values if names is None else {name: value for name, value in values.items() if name in names}

        shown = dict(
            student=choose(context.student, student_taps), teachers=[choose(context.teachers[0], teacher_taps)],
            student_outputs=choose(context.student_outputs, student_heads),
            teacher_outputs=[choose(context.teacher_outputs[0], teacher_heads)])
        return dataclasses.replace(context, **{**shown, **changes})

    def show_to(self, term: DistillTerm, **changes) -> DistillContext:
        """The context as a term declares what it reads."""
        return self.show(term.student_heads, term.teacher_heads, term.student_taps, term.teacher_taps, **changes)


def find_tensors(value) -> Iterator[Tensor]:
    """All tensors within a context, or a part of it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from find_tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from find_tensors(each)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from find_tensors(getattr(value, field.name))


@pytest.fixture
def tensors_of():
    """All tensors within a context, or a part of it."""
    return lambda value: list(find_tensors(value))


@pytest.fixture(params=SCENES)
def situation(request) -> str:
    """Each situation in turn."""
    return request.param


@pytest.fixture(scope='session')
def built_heads():
    """Heads by their width; no test changes their weights."""
    return {}


@pytest.fixture
def make_scene(dense_head_config, built_heads):
    """Makes the :class:`Scene` of a situation; ``equal``: the teacher has and predicts what the student does.

    It draws the same numbers each time.
    """

    def build_head(family: str, width: int, **changes) -> nn.Module:
        head = MODELS.build(dense_head_config(family, width, CLASSES, **changes)).requires_grad_(False)
        for parameter in head.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)  # or all cells would be predicted alike
        return head

    def find_heads(width: int) -> dict[str, nn.Module]:
        if width not in built_heads:
            built_heads[width] = dict(bbox_head=build_head('gfl', width, stacked_convs=2),
                                      rpn_head=build_head('rpn', width))
        return built_heads[width]

    def assign(outputs, boxes: list[Tensor]) -> None:
        """Every fifth prior of an image with boxes learns from one of them."""
        has_boxes = torch.tensor([len(each) > 0 for each in boxes])
        outputs.assigned = tuple((torch.arange(each.shape[1]) % 5 == 0) & has_boxes[:, None] for each in outputs.logits)
        outputs.targets = tuple(torch.randn(*each.shape, 4) * each[..., None] for each in outputs.assigned)

    def make(situation: str, equal: bool = False, student_width: int = STUDENT_WIDTH) -> Scene:
        torch.manual_seed(0)
        batch_shape, image_shapes = SCENES[situation]
        boxes = [torch.tensor(each) for each, _ in zip(BOXES, image_shapes)]
        if situation == 'one_cell':
            boxes = [torch.tensor([[1., 1., 7., 7.]])]
        boxes = [torch.zeros(0, 4) if situation == 'no_boxes' or 0 in shape else each
                 for each, shape in zip(boxes, image_shapes)]
        labels = [torch.arange(len(each)) % CLASSES for each in boxes]
        cells = [tuple(-(-side // stride) for side in batch_shape) for stride in STRIDES]
        student = [torch.randn(len(boxes), student_width, *each).requires_grad_() for each in cells]
        teacher = [level.detach().clone() if equal else torch.randn(len(boxes), TEACHER_WIDTH, *level.shape[-2:])
                   for level in student]
        context = DistillContext.of_features(student, teacher, STRIDES, boxes, labels, image_shapes, batch_shape)
        context.labelled = tuple(situation != 'unlabelled' or index == 0 for index in range(len(boxes)))
        for taps in (context.student, context.teachers[0], context.student_levels, context.teacher_levels[0]):
            taps['backbone'] = taps['neck']

        heads = find_heads(student_width)
        teacher_heads = heads if equal else find_heads(TEACHER_WIDTH)
        with record_towers(heads['bbox_head']) as towers:
            outputs = {name: read_dense(head, head(tuple(student))) for name, head in heads.items()}
        for each in outputs.values():
            assign(each, boxes)
        with torch.no_grad():
            taught = {name: read_dense(head, head(tuple(teacher))) for name, head in teacher_heads.items()}
        outputs['bbox_head.towers'] = read_towers(towers)
        taught['bbox_head.towers'] = TeacherTowers(teacher_heads['bbox_head'])

        regions, moves = make_regions(boxes, batch_shape), []
        for side in (outputs, taught):
            moves += [torch.randn(len(regions.labels), CLASSES + 1), torch.randn(len(regions.labels), CLASSES, 4),
                      torch.randn(2, len(boxes), 5, CLASSES), torch.rand(2, len(boxes), 5, 4) * 0.4 + 0.3]
            if equal and side is taught:
                moves[4:] = [each.detach().clone() for each in moves[:4]]
            elif side is outputs:
                moves = [each.requires_grad_() for each in moves]
            logits, deltas, query_logits, query_boxes = moves[-4:]
            roi = RoIOutputs(regions, logits, deltas)
            side['roi_head'] = roi if side is outputs else (roi, )
            side['bbox_head.queries'] = QueryOutputs(query_logits, query_boxes, 'sigmoid')
        queries = outputs['bbox_head.queries']
        queries.assigned, queries.box_cost = assign_queries(queries, boxes, labels, image_shapes), cost_of_boxes
        context.student_outputs, context.teacher_outputs = outputs, [taught]
        widths = tower_widths(heads['bbox_head']), tower_widths(teacher_heads['bbox_head'])
        return Scene(context, [*student, *moves[:4]], widths)

    return make


@pytest.fixture(scope='session')
def known_scenes():
    """Scenes that are made once."""
    return {}


@pytest.fixture
def find_scene(make_scene, known_scenes):
    """The :class:`Scene` of a situation, one for all tests: they neither change it nor call backward."""

    def find(situation: str, **changes) -> Scene:
        key = situation, *changes.items()
        if key not in known_scenes:
            known_scenes[key] = make_scene(situation, **changes)
        return known_scenes[key]

    return find


def make_regions(boxes: list[Tensor], batch_shape: tuple[int, int]) -> Regions:
    """Four regions of each image: the first of an image with boxes is its first box, all others are background."""
    height, width = batch_shape
    rois, labels = [], []
    for index, each in enumerate(boxes):
        corners = torch.rand(4, 2) * torch.tensor([width / 2, height / 2])
        placed = torch.cat([corners, corners + torch.tensor([width / 3, height / 3])], 1)
        placed[:len(each[:1])] = each[:1]
        rois.append(torch.cat([torch.full((4, 1), float(index)), placed], 1))
        labels.append(torch.tensor([0 if row < len(each[:1]) else CLASSES for row in range(4)]))
    labels = torch.cat(labels)
    targets = torch.randn(len(labels), 4) * (labels < CLASSES)[:, None]
    return Regions(torch.cat(rois), labels, targets, torch.full((len(labels), 4), 0.1), torch.zeros_like(labels))


def assign_queries(queries: QueryOutputs, boxes: list[Tensor], labels: list[Tensor], image_shapes: list) -> Tensor:
    """(D, N, Q): the index of the box that a query has at the least cost, -1 for none."""
    assigned = torch.full(queries.logits.shape[:3], -1)
    for layer in range(len(assigned)):
        for image, truth in enumerate(boxes):
            cost = cost_of_boxes(queries.logits[layer, image], queries.boxes[layer, image], truth, labels[image],
                                 image_shapes[image])
            rows, columns = linear_sum_assignment(cost.detach())
            assigned[layer, image, rows] = torch.as_tensor(columns)
    return assigned


def cost_of_boxes(logits: Tensor, boxes: Tensor, truth: Tensor, labels: Tensor, image_shape: tuple[int, int]) -> Tensor:
    """(n, m), as a student's matcher computes it."""
    height, width = image_shape
    return torch.cdist(corners(boxes) / 1000 * boxes.new_tensor([width, height] * 2), truth) - logits[:, labels]


def find_arguments(kind: type) -> list[str]:
    """The names of all arguments of a class, those that it hands on to its bases among them."""
    names: list[str] = []
    for each in kind.__mro__:
        if '__init__' not in vars(each) or each is nn.Module:
            continue
        parameters = inspect.signature(each.__init__).parameters.values()
        names += [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return [name for name in dict.fromkeys(names) if name != 'self']


@pytest.fixture
def documented_arguments():
    """Asserts that a class tells what it is, and each argument that it takes by name."""

    def check(kind: type) -> None:
        text = inspect.getdoc(kind)
        own = inspect.signature(kind.__init__).parameters
        missing = [name for name in own if name not in ('self', 'kwargs') and not re.search(rf'\b{name}\b.*:', text)]
        assert text.splitlines()[0].endswith(('.', ':')) and not missing
        assert 'kwargs' not in own or '**kwargs: ' in text

    return check


@pytest.fixture
def refuse_arguments():
    """Asserts that a class refuses, when it is built, a value of no use for any of its arguments."""

    def check(config: dict) -> None:
        accepted = []
        for name in find_arguments(MODELS.get(config['type'])):
            try:
                MODELS.build({**config, name: object()})
            except (ValueError, TypeError):
                continue
            accepted.append(name)
        assert not accepted

    return check
