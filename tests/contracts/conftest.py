"""Scenes: one step of a tiny pair with all that a term or a mask may read, in the situations that training meets.

Student and teacher have the neck and the backbone of three levels, a GFL head, an RPN, a RoI head, and the queries and
the decoder of a DETR; all of random numbers, so that no detector is built.
"""
import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from mmdet.registry import MODELS
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from kd_det.config.classes import ClassMatch
from kd_det.context import DistillContext
from kd_det.distillers.class_sets import restrict_to_shared_classes
from kd_det.functional.queries import corners
from kd_det.heads import (
    DenseOutputs,
    HeadRequest,
    QueryDecoder,
    QueryOutputs,
    Regions,
    RoIOutputs,
    TeacherTowers,
    read_dense,
)
from kd_det.heads.decoders import BoxQueries
from kd_det.heads.towers import TowerFeatures, TowerMoments, measure_moments, read_towers, record_towers, tower_widths
from kd_det.losses import DistillTerm
from kd_det.teachers.probe import make_shape_samples

STRIDES, CLASSES, STUDENT_WIDTH, TEACHER_WIDTH = (8, 16, 32), 3, 8, 12
BOXES = ([[4., 4., 60., 40.], [50., 8., 90., 60.]], [[2., 2., 30., 20.]], [[10., 6., 26., 50.]])

# Situation: shape of the batch and of its images. 'plain' has padding beside the second image.
SCENES = dict(
    plain=((64, 96), [(64, 96), (40, 56), (64, 96)]),
    no_boxes=((64, 96), [(64, 96), (40, 56), (64, 96)]),
    unlabelled=((64, 96), [(64, 96), (40, 56), (64, 96)]),
    all_padding=((64, 96), [(64, 96), (0, 0), (64, 96)]),
    one_cell=((8, 8), [(8, 8)]))


class Form(NamedTuple):
    """What a scene is made of, beside random numbers.

    Attributes:
        batch_shape: Height and width in pixels.
        image_shapes: Of each image.
        boxes: x1, y1, x2, y2 of each image's boxes.
        labels: The classes of each image's boxes.
        labelled: Whether it is known what an image shows.
        classes: Their number.
        widths: Channels of the student's and of the teacher's levels.
        seed: Of the random numbers.
    """
    batch_shape: tuple[int, int]
    image_shapes: list[tuple[int, int]]
    boxes: list[list[list[float]]]
    labels: list[list[int]]
    labelled: tuple[bool, ...]
    classes: int = CLASSES
    widths: tuple[int, int] = (STUDENT_WIDTH, TEACHER_WIDTH)
    seed: int = 0


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
def form_scene(dense_head_config, built_heads):
    """Makes the :class:`Scene` of a :class:`Form`; ``equal``: the teacher has and predicts what the student does.

    It draws the same numbers each time.
    """

    def build_head(family: str, width: int, classes: int, **changes) -> nn.Module:
        head = MODELS.build(dense_head_config(family, width, classes, **changes)).requires_grad_(False)
        for parameter in head.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)  # or all cells would be predicted alike
        return head

    def find_heads(width: int, classes: int) -> dict[str, nn.Module]:
        if (width, classes) not in built_heads:
            with torch.random.fork_rng([]):
                torch.manual_seed(0)
                built_heads[width, classes] = dict(bbox_head=build_head('gfl', width, classes, stacked_convs=2),
                                                   rpn_head=build_head('rpn', width, classes))
        return built_heads[width, classes]

    def assign(outputs, boxes: list[Tensor]) -> None:
        """Every fifth prior of an image with boxes learns from one of them, the next one from nothing."""
        has_boxes = torch.tensor([len(each) > 0 for each in boxes])
        outputs.assigned = tuple((torch.arange(each.shape[1]) % 5 == 0) & has_boxes[:, None] for each in outputs.logits)
        outputs.ignored = tuple(each.roll(1, 1) for each in outputs.assigned)
        outputs.targets = tuple(torch.randn(*each.shape, 4) * each[..., None] for each in outputs.assigned)

    def make(form: Form, equal: bool = False) -> Scene:
        torch.manual_seed(form.seed)
        batch_shape, image_shapes, classes, (student_width, teacher_width) = (
            form.batch_shape, form.image_shapes, form.classes, form.widths)
        boxes = [torch.tensor(each, dtype=torch.float32).view(-1, 4) for each in form.boxes]
        labels = [torch.tensor(each, dtype=torch.long) for each in form.labels]
        cells = [tuple(-(-side // stride) for side in batch_shape) for stride in STRIDES]
        student = [torch.randn(len(boxes), student_width, *each).requires_grad_() for each in cells]
        teacher = [level.detach().clone() if equal else torch.randn(len(boxes), teacher_width, *level.shape[-2:])
                   for level in student]
        context = DistillContext.of_features(student, teacher, STRIDES, boxes, labels, image_shapes, batch_shape)
        context.labelled = form.labelled
        for taps in (context.student, context.teachers[0], context.student_levels, context.teacher_levels[0]):
            taps['backbone'] = taps['neck']

        heads = find_heads(student_width, classes)
        teacher_heads = heads if equal else find_heads(teacher_width, classes)
        with record_towers(heads['bbox_head'], 1) as towers:
            outputs = {name: read_dense(head, head(tuple(student))) for name, head in heads.items()}
        for each in outputs.values():
            assign(each, boxes)
        with torch.no_grad(), record_towers(teacher_heads['bbox_head'], 1) as taught_towers:
            taught = {name: read_dense(head, head(tuple(teacher))) for name, head in teacher_heads.items()}
            moments = measure_moments(read_towers(taught_towers), make_shape_samples(batch_shape, image_shapes))
        outputs['bbox_head.towers.1'] = read_towers(towers)
        taught['bbox_head.towers.1'] = TeacherTowers(teacher_heads['bbox_head'], 1, moments)

        regions, moves = make_regions(boxes, labels, batch_shape, classes), []
        for side in (outputs, taught):
            moves += [torch.randn(len(regions.labels), classes + 1), torch.randn(len(regions.labels), classes, 4),
                      torch.randn(2, len(boxes), 5, classes), torch.rand(2, len(boxes), 5, 4) * 0.4 + 0.3]
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
        memory = torch.randn(len(boxes), 6, student_width, requires_grad=True)
        of_teacher = memory if equal else torch.randn(len(boxes), 6, teacher_width)
        for side, remembered in ((outputs, memory), (taught, of_teacher.detach().clone())):
            side['bbox_head.decoder'] = BoxReader(remembered, None, {}, classes, 'sigmoid')
        context.student_outputs, context.teacher_outputs = outputs, [taught]
        widths = tower_widths(heads['bbox_head']), tower_widths(teacher_heads['bbox_head'])
        return Scene(context, [*student, *moves[:4], memory], widths)

    return make


@pytest.fixture
def make_scene(form_scene):
    """Makes the :class:`Scene` of a situation, see :func:`form_scene`."""

    def make(situation: str, equal: bool = False, student_width: int = STUDENT_WIDTH) -> Scene:
        batch_shape, image_shapes = SCENES[situation]
        boxes = [[[1., 1., 7., 7.]]] if situation == 'one_cell' else [each for each, _ in zip(BOXES, image_shapes)]
        boxes = [[] if situation == 'no_boxes' or 0 in shape else each for each, shape in zip(boxes, image_shapes)]
        labels = [[index % CLASSES for index in range(len(each))] for each in boxes]
        labelled = tuple(situation != 'unlabelled' or index == 0 for index in range(len(boxes)))
        widths = student_width, TEACHER_WIDTH
        return form_scene(Form(batch_shape, image_shapes, boxes, labels, labelled, widths=widths), equal)

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


@st.composite
def draw_form(draw, least_side: int = 4, least_boxes: int = 0) -> Form:
    """Any small :class:`Form`: of one to three images, with up to three boxes each, in a batch of up to 12 × 12 cells.

    Args:
        least_side: Of an image, in pixels.
        least_boxes: Of each image.
    """
    side = st.integers(max(least_side, 8), 96)
    batch_shape = draw(side), draw(side)
    image_shapes = draw(st.lists(st.tuples(*(st.integers(least_side, each) for each in batch_shape)), min_size=1,
                                 max_size=3))
    classes, share = draw(st.integers(1, 4)), st.floats(0, 1, width=32)
    boxes = []
    for height, width in image_shapes:
        corners = draw(st.lists(st.tuples(share, share, share, share), min_size=least_boxes, max_size=3,
                                unique=True))
        boxes.append([[x * (width - 3), y * (height - 3), 2 + x * (width - 3) + w * (1 - x) * (width - 3),
                       2 + y * (height - 3) + h * (1 - y) * (height - 3)] for x, y, w, h in corners])
    labels = [[draw(st.integers(0, classes - 1)) for _ in each] for each in boxes]
    width = st.sampled_from([4, 8, 12])
    return Form(batch_shape, image_shapes, boxes, labels, tuple(draw(st.booleans()) for _ in boxes), classes,
                (draw(width), draw(width)), draw(st.integers(0, 9)))


@pytest.fixture
def forms():
    """The strategy :func:`draw_form`."""
    return draw_form


def rearrange(context: DistillContext, images: Sequence[int], orders: Sequence[Sequence[int]]) -> DistillContext:
    """The step of a batch of some of its images, each with its boxes in another order.

    Args:
        context: The step.
        images: Which image each of the new batch is; one may come more than once.
        orders: For each of the old images which box each of the new order is.
    """

    def pick(value):
        if isinstance(value, tuple) and all(isinstance(each, Tensor) for each in value):
            return tuple(each[list(images)] for each in value)
        return value

    def change(outputs):
        if isinstance(outputs, DenseOutputs):
            fields = {field.name: pick(getattr(outputs, field.name)) for field in dataclasses.fields(outputs)}
            return DenseOutputs(**{**fields, 'decode': lambda: pick(outputs.boxes)})
        if isinstance(outputs, TowerFeatures):
            return outputs._replace(classes=pick(outputs.classes), boxes=pick(outputs.boxes))
        if isinstance(outputs, QueryOutputs):
            assigned = outputs.assigned
            if assigned is not None:
                new = [torch.tensor([*map(order.index, range(len(order))), -1]) for order in orders]  # -1 stays -1
                assigned = torch.stack([new[image][assigned[:, image]] for image in images], 1)
            return dataclasses.replace(outputs, logits=outputs.logits[:, images], boxes=outputs.boxes[:, images],
                                       assigned=assigned)
        if isinstance(outputs, QueryDecoder):
            return dataclasses.replace(outputs, memory=outputs.memory[list(images)])
        if isinstance(outputs, RoIOutputs):
            rows = [(outputs.regions.rois[:, 0] == image).nonzero().flatten() for image in images]
            regions = outputs.regions.select(torch.cat(rows))
            index = torch.arange(len(images)).repeat_interleave(torch.tensor([*map(len, rows)]))
            regions = regions._replace(rois=torch.cat([index[:, None].float(), regions.rois[:, 1:]], 1))
            return RoIOutputs(regions, outputs.logits[torch.cat(rows)], outputs.deltas[torch.cat(rows)])
        if isinstance(outputs, tuple) and not isinstance(outputs, TeacherTowers):
            return tuple(map(change, outputs))
        assert isinstance(outputs, TeacherTowers)
        return outputs._replace(moments=TowerMoments(*map(pick, outputs.moments)))

    def of_images(values):
        return [values[image] for image in images]

    return dataclasses.replace(
        context, student={path: pick(levels) for path, levels in context.student.items()},
        teachers=[{path: pick(levels) for path, levels in taps.items()} for taps in context.teachers],
        boxes=of_images([boxes[list(order)] for boxes, order in zip(context.boxes, orders)]),
        labels=of_images([labels[list(order)] for labels, order in zip(context.labels, orders)]),
        labelled=tuple(of_images(context.labelled)), image_shapes=of_images(context.image_shapes),
        student_outputs={name: change(each) for name, each in context.student_outputs.items()},
        teacher_outputs=[{name: change(each) for name, each in outputs.items()}
                         for outputs in context.teacher_outputs])


@pytest.fixture
def permute():
    """Draws from hypothesis' data a scene that says the same: images, the boxes of each, and classes in another order.

    Returns it, and which image of the first each of it is.
    """

    def draw(scene: Scene, data) -> tuple[Scene, list[int]]:
        context = scene.context
        classes = context.student_outputs['roi_head'].num_classes
        images, order, *orders = (data.draw(st.permutations(range(count)))
                                  for count in (len(context.boxes), classes, *map(len, context.boxes)))
        names = tuple(map(str, range(classes)))
        renamed = restrict_to_shared_classes(context, 0, ClassMatch(names, names, tuple(order), tuple(order)))
        return scene._replace(context=rearrange(renamed, images, orders)), images

    return draw


@pytest.fixture
def double():
    """Makes the scene in which each image comes twice, and tells which image of the first each of it is."""

    def make(scene: Scene) -> tuple[Scene, list[int]]:
        orders = [range(len(boxes)) for boxes in scene.context.boxes]
        images = [*range(len(orders))] * 2
        return scene._replace(context=rearrange(scene.context, images, orders)), images

    return make

def make_regions(boxes: list[Tensor], classes: list[Tensor], batch_shape: tuple[int, int], background: int) -> Regions:
    """Four regions of each image: the first of an image with boxes is its first box, all others are background."""
    height, width = batch_shape
    rois, labels = [], []
    for index, each in enumerate(boxes):
        corners = torch.rand(4, 2) * torch.tensor([width / 2, height / 2])
        placed = torch.cat([corners, corners + torch.tensor([width / 3, height / 3])], 1)
        placed[:len(each[:1])] = each[:1]
        rois.append(torch.cat([torch.full((4, 1), float(index)), placed], 1))
        labels.append(torch.full((4, ), background))
        labels[-1][:len(each[:1])] = classes[index][:1]
    labels = torch.cat(labels)
    targets = torch.randn(len(labels), 4) * (labels < background)[:, None]
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


class BoxReader(QueryDecoder):
    """What a decoder of two layers might say: it depends on the box and on the memory, not on the class."""

    def decode(self, queries: BoxQueries) -> QueryOutputs:
        seen = self.memory.mean(2, keepdim=True).mT.expand(-1, queries.boxes.shape[1], -1)
        read = torch.cat([queries.boxes, seen], -1)
        weights = torch.arange(read.shape[-1] * 2 * (self.num_labels + 4)).view(read.shape[-1], -1).sin()
        logits, boxes = (read @ weights).unflatten(-1, (2, -1)).movedim(2, 0).split([self.num_labels, 4], -1)
        return QueryOutputs(logits, boxes.sigmoid(), 'sigmoid')


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
