"""A module that looks like the student within it."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

import torch
from mmdet.registry import MODELS
from mmengine.model import BaseModel
from torch import Tensor, nn

from kd_det.compat.process import preserved_randomness
from kd_det.config.classes import number_of_classes
from kd_det.config.detectors import check_student, plain_detector
from kd_det.context import DistillContext, Progress
from kd_det.distillers.building import Connections, build_task_weight, build_terms, checked_teachers, measured_taps
from kd_det.distillers.class_sets import ClassSets, has_classes
from kd_det.distillers.inheritance import Provenance, inherit, parts_in_common, pretrained_parameters
from kd_det.distillers.monitor import GradientMonitor, IdleWatch
from kd_det.distillers.supervision import Supervision, build_pseudo_labels, given, labelled_losses
from kd_det.distillers.weights import Losses, Value, WeightConfig, logged, scaled, total, untouched, weighted
from kd_det.heads import StudentOutputs, TeacherOutputs
from kd_det.losses import DistillTerm
from kd_det.losses.base import find_read_levels
from kd_det.registry import build_detector
from kd_det.taps import Features, record_calls
from kd_det.teachers import Teacher

TERMS = 'distill_terms'  # the only child that a plain student lacks


class StudentWrapper(BaseModel):
    """Shows a detector's children, parameters, buffers and attributes as its own, under the same names.

    The terms are one child more, because optimizer and data-parallel training must see their weights; ``state_dict``
    leaves them out. Prediction is the detector's own.

    Args:
        detector: The student.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(data_preprocessor=detector.data_preprocessor)
        self.__dict__['student'] = detector  # past nn.Module.__setattr__: its weights are registered only once
        self._parameters, self._buffers = detector._parameters, detector._buffers
        self._non_persistent_buffers_set = detector._non_persistent_buffers_set
        self._modules.update(detector._modules)
        self._modules[TERMS] = nn.ModuleDict()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if 'student' not in self.__dict__:
                raise
            return getattr(self.__dict__['student'], name)

    @property
    def terms(self) -> nn.ModuleDict:
        """The distillation terms by name; those with a weight."""
        return self._modules[TERMS]

    def train(self, mode: bool = True) -> StudentWrapper:
        self.training = mode
        self.student.train(mode)
        self.terms.train(mode)
        return self

    def forward(self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'):
        """As the student's; only ``mode='loss'`` distils."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return self.student(inputs, data_samples, mode=mode)

    def state_dict(self, *args, destination=None, prefix: str = '', keep_vars: bool = False):
        """The plain student's state dict."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        for entries in (state, getattr(state, '_metadata', {})):
            for key in [key for key in entries if f'{key}.'.startswith(f'{prefix}{TERMS}.')]:
                del entries[key]
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # A plain student's weights are complete: the terms, which are stored apart, keep theirs.
        for key, value in self.terms.state_dict(prefix=f'{prefix}{TERMS}.').items():
            state_dict.setdefault(key, value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


MEGABYTE = 2**20


class StepCost:
    """Time and memory of what a step does for its terms: the teachers' forward and the terms' own.

    Attributes:
        seconds: Of the last step whose time is known; on a GPU that is one that it has finished.
        megabytes: What the last step held for its backward pass. On a GPU all that was allocated in that time; on
            the CPU, where PyTorch keeps no count, the teachers' features alone.
    """

    def __init__(self) -> None:
        self._seconds = self.megabytes = 0.0
        self._running: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    @property
    def seconds(self) -> float:
        while self._running and self._running[0][1].query():
            start, end = self._running.popleft()
            self._seconds = start.elapsed_time(end) / 1e3
        return self._seconds

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Measures the block; :meth:`hold` within it tells what the teachers put out."""
        if device.type == 'cuda':
            before = torch.cuda.memory_allocated(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._running.append((start, end))
            self.megabytes = (torch.cuda.memory_allocated(device) - before) / MEGABYTE
        else:
            begin = perf_counter()
            yield
            self._seconds = perf_counter() - begin

    def hold(self, features: Sequence[dict[str, Features]]) -> None:
        """Counts the features of the teachers."""
        levels = {id(level): level for each in features for group in each.values() for level in group}
        self.megabytes = sum(level.nbytes for level in levels.values()) / MEGABYTE


class Observation(NamedTuple):
    """One step before anything is weighted: the student's own losses, what the terms may read, and their values."""
    losses: Losses
    context: DistillContext
    values: dict[str, Value]


@MODELS.register_module()
class DetectionDistiller(StudentWrapper):
    """Trains a student detector under the guidance of one or several frozen teachers.

    It looks like the student (:class:`~kd_det.distillers.detection_distiller.StudentWrapper`): parameter names,
    ``state_dict`` keys, attributes such as ``bbox_head`` and prediction are the plain student's. The terms' weights
    stay out of ``state_dict`` (:class:`~kd_det.training.hooks.DistillHook` stores them beside it), and a teacher is no module of
    it.

    Args:
        student: Model dict of the student, as in any mmdet config.
        teacher: ``dict(config=…, checkpoint=…)``, or a list of those; see :class:`~kd_det.teachers.Teacher`. They are
            built when training starts, never for a test run.
        distill: Name -> term. Beside the term's own arguments each takes ``weight``: a number or a schedule, see
            :mod:`kd_det.distillers.weights`; a term whose weight is 0 throughout is left out. Each is logged as
            ``loss_<name>``, its parts as ``distill/<name>_<part>``, a weight that changes as ``distill/<name>_weight``.
        inherit: Parts of the student (``('neck', 'rpn_head', 'roi_head')``) that start from the first teacher's weights
            where shapes agree; ``'auto'`` for all but the backbone that are of the same type in both.
        task_weight: Of the student's own losses: a number or a schedule, such as
            ``dict(type='Start', value=1.0, epochs=2)`` for a student that at first learns from its teacher alone
            (FitNets, arXiv 1412.6550).
        pseudo_labels: ``dict(score=0.5, …)`` for confident boxes of a teacher as ground truth, see
            :class:`~kd_det.distillers.supervision.PseudoLabels`.

    Raises:
        ConfigurationError: A term's name or argument is wrong; the message says where in the config.
        TeacherError: A teacher lacks its config or checkpoint.
    """

    def __init__(self,
                 student: dict,
                 teacher: dict | Sequence[dict],
                 distill: dict[str, dict],
                 inherit: str | Sequence[str] = (),
                 task_weight: WeightConfig = 1.0,
                 pseudo_labels: dict | None = None) -> None:
        check_student(student, 'model.student')
        detector = build_detector(plain_detector(student))
        super().__init__(detector)
        self.provenance = Provenance(detector)
        self.inherited_parts = (inherit, ) if isinstance(inherit, str) else tuple(inherit)
        self.not_inherited: list[str] = []
        self.terms_origin = 'random'
        self.progress, self.cost = Progress(), StepCost()
        self.teacher_configs = checked_teachers(teacher)
        self.teachers: list[Teacher] | None = None
        self.class_sets = ClassSets()
        self.pseudo_labels = build_pseudo_labels(pseudo_labels, detector, self.teacher_configs)
        self.task_weight = build_task_weight(task_weight)

        with preserved_randomness():  # the student is drawn as if there were no distillation
            self.weights, terms = build_terms(distill, len(self.teacher_configs))
            self.connections = Connections(detector, self.teacher_configs, terms)
        self.terms.update(terms)
        self.monitor, self.idle_watch = GradientMonitor(self.weights), IdleWatch(terms)
        self._changing_weights = [name for name, weight in self.weights.items() if not weight.is_constant]

    # ------------------------------------------------------------------------------------ the teachers

    @property
    def teacher(self) -> Teacher | None:
        """The first teacher, once training has begun."""
        return self.teachers[0] if self.teachers else None

    def build_teachers(self) -> list[Teacher]:
        """Builds and loads the teachers unless that is done.

        Raises:
            TeacherError: A teacher has no checkpoint.
            CheckpointError: A checkpoint does not fit; the message names the keys.
        """
        if self.teachers is None:
            anchor = next(self.student.parameters())
            self.teachers = [
                Teacher(**config, taps=taps, heads=heads, student_preprocessor=self.data_preprocessor).to_like(anchor)
                for config, taps, heads in zip(self.teacher_configs, self.connections.teacher_taps,
                                               self.connections.teacher_heads)
            ]
        return self.teachers

    def match_classes(self, classes: Sequence[str] | None) -> list[str]:
        """Matches the teachers' classes with the student's, see :meth:`~kd_det.distillers.class_sets.ClassSets.match`.

        Args:
            classes: Names of the student's classes, by label; None where the training data does not tell them.

        Returns:
            What was found of each teacher, for the log.
        """
        if classes is not None and number_of_classes(self.student) not in (None, len(classes)):
            classes = None  # the head's labels are then not those of the data
        read = {term.teacher_index for term in self.terms.values() if any(map(has_classes, term.teacher_heads))}
        read |= {self.pseudo_labels.teacher_index} if self.pseudo_labels else set()
        return self.class_sets.match(classes, self.build_teachers(), read, self.inherited_parts)

    def _apply(self, function, *args, **kwargs) -> DetectionDistiller:
        super()._apply(function, *args, **kwargs)
        for teacher in self.teachers or ():
            teacher._apply(function)
        return self

    def init_weights(self) -> None:
        """Initialises the student as it would itself, builds the teachers, and lets the student inherit."""
        self.student.init_weights()
        self._is_init = True
        self.provenance.mark(pretrained_parameters(self.student), 'pretrained')
        teachers = self.build_teachers()
        if self.inherited_parts == ('auto', ):
            self.inherited_parts = parts_in_common(self.student, teachers[0].model)
        inherited, self.not_inherited = inherit(self.student, teachers[0], self.inherited_parts)
        self.provenance.mark(inherited, 'inherited')

    # ------------------------------------------------------------------------------------ the terms

    def load_terms(self, state: dict[str, Tensor]) -> None:
        """Restores the terms' weights from a checkpoint.

        Raises:
            RuntimeError: They are another term's, or of another shape; the message names the keys.
        """
        self.terms.load_state_dict(state)
        self.terms_origin = 'checkpoint'

    def set_progress(self, iteration: int, epoch: float) -> None:
        """Tells the schedules where the training stands."""
        self.progress = Progress(iteration, epoch)

    def loss(self, inputs: Tensor, data_samples: list) -> Losses:
        """One training step: the student's own losses and the terms'.

        Args:
            inputs: (N, 3, H, W), preprocessed.
            data_samples: mmdet's data samples with ``gt_instances``.

        Returns:
            The student's losses; ``loss_<name>`` of each term; for the log only its parts, its weight where that
            changes, and, in steps that measure it, its gradient in units of the task's.

        Raises:
            ConfigurationError: No term can teach the student anything.
        """
        weights = {name: weight(self.progress) for name, weight in self.weights.items()}
        active = [name for name, weight in weights.items() if weight != 0]
        observation = self.observe(inputs, data_samples, active)
        measured = self._measure(observation)
        weights = {name: weight * self.monitor.scale(name) for name, weight in weights.items()}
        task_weight = self.task_weight(self.progress)
        losses = scaled(observation.losses, task_weight)
        for name, weight in weights.items():
            if name in active:
                losses.update(weighted(name, observation.values[name], weight))
            else:
                losses.update(untouched(name, self.terms[name], inputs.device))
        losses.update(logged(weight={name: weights[name] for name in self._changing_weights}))
        losses.update(logged(gradient={name: weights[name] * share for name, share in measured.items()}))
        if not self.task_weight.is_constant:
            losses.update(logged(weight=dict(task=task_weight)))
        return losses

    def _measure(self, observation: Observation) -> dict[str, Tensor]:
        """Compares the gradients of terms with the task's, where that is due; see :meth:`GradientMonitor.measure`."""
        if not torch.is_grad_enabled():
            return {}
        self.idle_watch.look(self, observation)
        losses, context, values = observation
        due = self.monitor.due(self.progress, values)
        if not due:
            return {}
        features = {name: self.measured_features(name, context) for name in due}
        totals = {name: total(values[name]) for name in due}
        labels = {name: self.class_sets.shared_labels(context.labels, self.terms[name].teacher_index) for name in due}
        return self.monitor.measure(self.parse_losses(losses)[0], totals, features, labels)

    def observe(self, inputs: Tensor, data_samples: list, names: Iterable[str]) -> Observation:
        """Runs the student's own loss, and the terms of these names with what they read of the teachers.

        Args:
            inputs: (N, 3, H, W), preprocessed.
            data_samples: mmdet's data samples with ``gt_instances``.
            names: Of the terms; without any the teachers do not run.
        """
        names, supervision = tuple(names), self._supervise(inputs, data_samples)
        image_shapes = [tuple(sample.img_shape[:2]) for sample in data_samples]
        with self.connections.capture() as (student, student_outputs), \
                record_calls(self.student, 'extract_feat') as extractions:
            losses = dict(self.student.loss(inputs, supervision.samples))
        if not all(supervision.labelled):
            losses = labelled_losses(self.student, inputs, extractions[0].returned, supervision, losses)
        losses.update(supervision.log)
        with self.cost.measured(inputs.device):
            teachers, teacher_outputs = zip(*self.observe_teachers(names, inputs, image_shapes, student_outputs))
            self.cost.hold(teachers)
            context = DistillContext(
                student=student,
                teachers=list(teachers),
                student_levels=self.connections.student_levels,
                teacher_levels=self.connections.teacher_levels,
                boxes=supervision.boxes,
                labels=supervision.labels,
                labelled=supervision.labelled,
                batch_shape=tuple(inputs.shape[-2:]),
                image_shapes=image_shapes,
                progress=self.progress,
                student_outputs=student_outputs,
                teacher_outputs=list(teacher_outputs))
            seen_by = [self.class_sets.restricted(context, index) for index in range(len(teachers))]
            with torch.autocast(inputs.device.type, enabled=False):
                values = {name: self.terms[name](seen_by[self.terms[name].teacher_index]) for name in names}
        return Observation(losses, context, values)

    def _supervise(self, inputs: Tensor, data_samples: list) -> Supervision:
        """What is known of the objects in a batch, from its data and from the teacher of the pseudo-labels."""
        supervision, pseudo_labels = given(data_samples), self.pseudo_labels
        if pseudo_labels is None or not pseudo_labels.wants(supervision, self.progress):
            return supervision
        teacher = self.build_teachers()[pseudo_labels.teacher_index]
        counts = number_of_classes(teacher.model), number_of_classes(self.student)
        found = self.class_sets.translated(teacher.detect(inputs, data_samples), pseudo_labels.teacher_index, counts)
        return pseudo_labels(supervision, found, self.progress)

    def measured_taps(self, term: DistillTerm) -> tuple[str, ...]:
        """The paths where the gradient of a term is measured."""
        return measured_taps(self.student, term)

    def measured_features(self, name: str, context: DistillContext) -> list[Tensor]:
        """The student's features where the gradient of a term is measured."""
        return [level for path in self.measured_taps(self.terms[name]) for level in context.student[path]]

    def observe_teachers(self, active: Iterable[str], images: Tensor, image_shapes: Sequence[tuple[int, int]],
                         student: StudentOutputs) -> Iterator[tuple[dict[str, Features], TeacherOutputs]]:
        """Runs what the active terms read of each teacher, and nothing of a teacher that none of them reads."""
        for index, teacher in enumerate(self.build_teachers()):
            terms = [self.terms[name] for name in active if self.terms[name].teacher_index == index]
            heads = tuple(dict.fromkeys(head for term in terms for head in term.teacher_heads))
            taps = tuple(dict.fromkeys(path for term in terms for path in term.teacher_taps))
            levels = find_read_levels(terms, self.connections.teacher_levels[index])
            yield teacher.observe(images, image_shapes, heads, student, taps, levels) if heads or taps else ({}, {})
