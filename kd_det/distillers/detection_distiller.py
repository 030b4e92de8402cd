"""The method's core: one training step of a student under the guidance of its teachers, from top to bottom.

:meth:`DetectionDistiller.loss` is the step, and :meth:`DetectionDistiller.observe`, which it calls first, its forward:
student, teachers, terms. Below them stand what comes before the first step (teachers, inheritance, classes), and what a
step costs.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import torch
from mmdet.registry import MODELS
from torch import Tensor

from kd_det.compat.process import preserved_randomness
from kd_det.config.arguments import Name, Names, declared
from kd_det.context import DistillContext, Progress
from kd_det.distillers.building import (
    Connections,
    build_student,
    build_task_schedule,
    build_terms,
    list_teacher_configs,
)
from kd_det.distillers.class_sets import ClassSets, has_classes
from kd_det.distillers.inheritance import WeightOrigins, find_common_parts, find_pretrained_parameters, inherit
from kd_det.distillers.monitor import (
    GradientMonitor,
    IdleTermCheck,
    Read,
    ReadRecord,
    list_reads,
    require_finite_weights,
)
from kd_det.distillers.quantization import build_quantizer
from kd_det.distillers.schedules import ScheduleConfig
from kd_det.distillers.student_wrapper import QUANTIZER, StudentWrapper
from kd_det.distillers.supervision import (
    Losses,
    Supervision,
    build_pseudo_labels,
    compute_labelled_losses,
    read_supervision,
    scale_losses,
)
from kd_det.heads import StudentOutputs, TeacherOutputs
from kd_det.losses.base import Parts, find_read_levels, sum_parts
from kd_det.taps import Features, record_calls
from kd_det.teachers import Teacher

MEBIBYTE = 2**20


class Observation(NamedTuple):
    """One step before anything is weighted: the student's own losses, what the terms may read, and their values."""
    losses: Losses
    context: DistillContext
    values: dict[str, Tensor | Parts]


@MODELS.register_module()
class DetectionDistiller(StudentWrapper):
    """Trains a student detector under the guidance of one or several frozen teachers.

    It looks like the student (:class:`~kd_det.distillers.student_wrapper.StudentWrapper`): parameter names,
    ``state_dict`` keys, attributes such as ``bbox_head`` and prediction are the plain student's. The terms' parameters
    stay out of ``state_dict`` (:class:`~kd_det.training.hooks.DistillHook` stores them beside it), and a teacher is no
    module of it.

    **What is drawn at random.** The seed of the run (``randomness.seed``, which MMEngine draws where the config names
    none) sets the generators before the model is built. From them the student is drawn, as it would be without
    distillation; then the adapters of all terms, in the order of ``distill``, from where the student's construction
    left the generators, which are then put back. So the same seed gives the same adapters, a term more at the end
    changes none before it, and a resumed run has them from its checkpoint. A random teacher is drawn likewise, from
    where :meth:`init_weights` left the generators; the teachers after the first each from a seed of their own, which
    follows from the same state.

    Args:
        student: Model dict of the student, as in any mmdet config.
        teacher: ``dict(config=…, checkpoint=…)``, or a list of those; see :class:`~kd_det.teachers.Teacher`. They are
            built when training starts, never for a test run.
        distill: Name -> term. Beside the term's own arguments each takes ``weight``: a number or a schedule, see
            :mod:`kd_det.distillers.schedules`; a term whose weight is 0 throughout is left out. Each is logged as
            ``loss_<name>``, its parts as ``distill/<name>_<part>``, a weight that changes as ``distill/<name>_weight``.
        inherit: Parts of the student (``('neck', 'rpn_head', 'roi_head')``) that start from the first teacher's weights
            where shapes agree; ``'auto'`` for all but the backbone that are of the same type in both.
        task_weight: Of the student's own losses: a number or a schedule, such as
            ``dict(type='Start', value=1.0, epochs=2)`` for a student that at first learns from its teacher alone
            (FitNets, arXiv 1412.6550).
        pseudo_labels: ``dict(score=0.5, …)`` for confident boxes of a teacher as ground truth, see
            :class:`~kd_det.distillers.supervision.PseudoLabels`.
        quantize: ``dict(bits=8, …)`` for a student that is trained as it computes in integers, see
            :class:`~kd_det.distillers.rounding.Quantization`; without terms, too. It starts from a trained one:
            ``load_from``.

    Attributes:
        terms: The terms by name; those whose weight is not 0 throughout.
        schedules: The schedule of each term's weight, by the same names.
        task_schedule: That of the student's own losses.
        teachers: The teachers in the config's order; None before training.
        origins: Where the student's weights came from.

    Raises:
        ConfigurationError: A term's name or argument is wrong; the message says where in the config.
        TeacherError: A teacher lacks its config or checkpoint.
    """

    @declared
    def __init__(self,
                 student: dict[str, Any],
                 teacher: dict[str, Any] | Sequence[dict[str, Any]],
                 distill: dict[str, Any],
                 inherit: Name | Names = (),
                 task_weight: ScheduleConfig = 1.0,
                 pseudo_labels: dict[str, Any] | None = None,
                 quantize: dict[str, Any] | None = None) -> None:
        detector = build_student(student)
        super().__init__(detector)
        self.origins = WeightOrigins(detector)
        self.inherited_parts = (inherit, ) if isinstance(inherit, str) else tuple(inherit)
        self.not_inherited: list[str] = []
        self.terms_origin = 'random'
        self.progress, self.cost = Progress(), StepCost()
        self.teacher_configs = list_teacher_configs(teacher)
        self.teachers: list[Teacher] | None = None
        self.class_sets = ClassSets(detector)
        self.pseudo_labels = build_pseudo_labels(pseudo_labels, detector, self.teacher_configs)
        self.task_schedule = build_task_schedule(task_weight)

        with preserved_randomness():  # the student is drawn as if there were no distillation
            self.schedules, terms = build_terms(distill, len(self.teacher_configs))
            self.connections = Connections(detector, self.teacher_configs, terms)
        self.terms.update(terms)
        if quantize is not None:
            self._modules[QUANTIZER] = build_quantizer(quantize, detector, self.connections.student_taps.paths)
        self.monitor, self.idle_check = GradientMonitor(self.schedules), IdleTermCheck(terms)
        self.reads = ReadRecord()

    # ------------------------------------------------------------------------------------ the training step

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
            ConfigurationError: No term can teach the student anything; or a schedule's weight is not finite.
        """
        # What each term is worth in this step; without a weight it does not run, nor a teacher that no other needs.
        weights = {name: schedule(self.progress) for name, schedule in self.schedules.items()}
        task_weight = self.task_schedule(self.progress)
        require_finite_weights(weights, task_weight, self.progress)
        active = [name for name, weight in weights.items() if weight != 0]
        observation = self.observe(inputs, data_samples, active)
        gradients = self._measure_gradients(observation)
        # A balanced weight is a ratio of gradients, and known now that they are.
        weights = {name: weight * self.monitor.scale(name) for name, weight in weights.items()}

        losses = scale_losses(observation.losses, task_weight)
        for name, term in self.terms.items():
            if name in observation.values:
                value = observation.values[name]
                losses[f'loss_{name}'] = weights[name] * sum_parts(value)
                for part, each in value.items() if isinstance(value, dict) else ():
                    losses[f'distill/{name}_{part}'] = weights[name] * each.detach()
            else:  # 0, with a gradient of 0 for every parameter: data-parallel training waits for each in every step
                losses[f'loss_{name}'] = sum((each.sum() * 0 for each in term.parameters()),
                                             torch.zeros((), device=inputs.device))

        # Of what is named without 'loss' mmengine keeps a log, and adds nothing to the sum.
        for name, schedule in self.schedules.items():
            if not schedule.is_constant:
                losses[f'distill/{name}_weight'] = torch.as_tensor(weights[name])
        for name, gradient in gradients.items():
            losses[f'distill/{name}_gradient'] = torch.as_tensor(weights[name] * gradient)
        if not self.task_schedule.is_constant:
            losses['distill/task_weight'] = torch.as_tensor(task_weight)
        return losses

    def observe(self, inputs: Tensor, data_samples: list, names: Iterable[str]) -> Observation:
        """The forward of a step: the student's own loss, and the terms of these names with what they read.

        Args:
            inputs: (N, 3, H, W), preprocessed.
            data_samples: mmdet's data samples with ``gt_instances``.
            names: Of the terms; without any the teachers do not run.
        """
        names, supervision = tuple(names), self._find_supervision(inputs, data_samples)
        image_shapes = [tuple(sample.img_shape[:2]) for sample in data_samples]

        # The student, as it learns without a teacher; its taps and heads are read on the way.
        with self.connections.capture() as (student, student_outputs), \
                record_calls(self.student, 'extract_feat') as extractions:
            losses = dict(self.student.loss(inputs, supervision.samples))
        if not all(supervision.labelled):
            losses = compute_labelled_losses(self.student, inputs, extractions[0].returned, supervision, losses)
        losses.update(supervision.log)

        with self.cost.measure(inputs.device):
            # The teachers, as far as the terms read them.
            teachers, teacher_outputs = zip(*self.observe_teachers(names, inputs, image_shapes, student_outputs))
            self.cost.count_features(teachers)
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
            self.reads.note(self.progress.iteration, list_reads(context))
            # The terms, in float32; each sees the classes that its teacher shares with the student.
            views = [self.class_sets.restrict_context(context, index) for index in range(len(teachers))]
            with torch.autocast(inputs.device.type, enabled=False):
                values = {name: self.terms[name](views[self.terms[name].teacher_index]) for name in names}
        return Observation(losses, context, values)

    def observe_teachers(self, names: Iterable[str], images: Tensor, image_shapes: Sequence[tuple[int, int]],
                         student: StudentOutputs) -> Iterator[tuple[dict[str, Features], TeacherOutputs]]:
        """Runs what the terms of these names read of each teacher, and nothing of a teacher that none of them reads."""
        for index, teacher in enumerate(self.build_teachers()):
            terms = [self.terms[name] for name in names if self.terms[name].teacher_index == index]
            heads = tuple(dict.fromkeys(head for term in terms for head in term.teacher_heads))
            taps = tuple(dict.fromkeys(path for term in terms for path in term.teacher_taps))
            levels = find_read_levels(terms, self.connections.teacher_levels[index])
            yield teacher.observe(images, image_shapes, heads, student, taps, levels) if heads or taps else ({}, {})

    def _find_supervision(self, inputs: Tensor, data_samples: list) -> Supervision:
        """What is known of the objects in a batch, from its data and from the teacher of the pseudo-labels."""
        supervision, pseudo_labels = read_supervision(data_samples), self.pseudo_labels
        if pseudo_labels is None or not pseudo_labels.is_due(supervision, self.progress):
            return supervision
        index = pseudo_labels.teacher_index
        teacher = self.build_teachers()[index]
        detections = self.class_sets.translate(teacher.detect(inputs, data_samples), index, teacher)
        owner = f'teacher[{index}]' if len(self.teacher_configs) > 1 else 'teacher'
        self.reads.note(self.progress.iteration, ((Read(owner, 'feature for pseudo-labels', level), each)
                                                  for level, each in enumerate(teacher.feature_sums)))
        return pseudo_labels(supervision, detections, self.progress)

    def _measure_gradients(self, observation: Observation) -> dict[str, Tensor]:
        """Compares the gradients of terms with the task's, where that is due; see :meth:`GradientMonitor.measure`."""
        if not torch.is_grad_enabled():
            return {}
        self.idle_check.check(self, observation)
        losses, context, values = observation
        due = self.monitor.find_due(self.progress, values)
        if not due:
            return {}
        features = {name: self.gradient_features(name, context) for name in due}
        labels = {name: self.class_sets.convert_labels(context.labels, self.terms[name].teacher_index) for name in due}
        task = self.parse_losses(losses)[0]
        return self.monitor.measure(task, {name: sum_parts(values[name]) for name in due}, features, labels)

    def gradient_features(self, name: str, context: DistillContext) -> list[Tensor]:
        """The student's features where the gradient of a term is measured."""
        return [level for path in self.connections.gradient_taps[name] for level in context.student[path]]

    # ------------------------------------------------------------------------------------ before the first step

    @property
    def teacher(self) -> Teacher | None:
        """The first teacher, once training has begun."""
        return self.teachers[0] if self.teachers else None

    def init_weights(self) -> None:
        """Initialises the student as it would itself, builds the teachers, and lets the student inherit."""
        self.student.init_weights()
        self._is_init = True
        self.origins.mark(find_pretrained_parameters(self.student), 'pretrained')
        teachers = self.build_teachers()
        if self.inherited_parts == ('auto', ):
            self.inherited_parts = find_common_parts(self.student, teachers[0].model)
        inherited, self.not_inherited = inherit(self.student, teachers[0], self.inherited_parts)
        self.origins.mark(inherited, 'inherited')

    def build_teachers(self) -> list[Teacher]:
        """Builds and loads the teachers unless that is done.

        Raises:
            TeacherError: A teacher has no checkpoint.
            CheckpointError: A checkpoint does not fit; the message names the keys.
        """
        if self.teachers is None:
            anchor, teachers = next(self.student.parameters()), []
            with preserved_randomness():
                for config, taps, heads in zip(self.teacher_configs, self.connections.teacher_taps,
                                               self.connections.teacher_heads):
                    teacher = Teacher(**config, taps=taps, heads=heads, student_preprocessor=self.data_preprocessor)
                    teachers.append(teacher.to_like(anchor))
                    # A teacher leaves the generator as it was: from there a second one would be drawn as its copy.
                    torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, ())))
            self.teachers = teachers
        return self.teachers

    def match_classes(self, classes: Sequence[str] | None) -> list[str]:
        """Matches the teachers' classes with the student's, see :meth:`~kd_det.distillers.class_sets.ClassSets.match`.

        Args:
            classes: Names of the student's classes, by label; None where the training data does not tell them.

        Returns:
            What was found of each teacher, for the log.
        """
        read = {term.teacher_index for term in self.terms.values() if any(map(has_classes, term.teacher_heads))}
        read |= {self.pseudo_labels.teacher_index} if self.pseudo_labels else set()
        return self.class_sets.match(classes, self.build_teachers(), read, self.inherited_parts)

    def load_terms(self, state: dict[str, Tensor]) -> None:
        """Restores the terms' parameters from a checkpoint.

        Raises:
            RuntimeError: They are another term's, or of another shape; the message names the keys.
        """
        self.terms.load_state_dict(state)
        self.terms_origin = 'checkpoint'

    def _apply(self, function, *args, **kwargs) -> DetectionDistiller:
        super()._apply(function, *args, **kwargs)
        for teacher in self.teachers or ():
            teacher._apply(function)
        return self


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
    def measure(self, device: torch.device) -> Iterator[None]:
        """Measures the block; :meth:`count_features` within it tells what the teachers put out."""
        if device.type == 'cuda':
            before = torch.cuda.memory_allocated(device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._running.append((start, end))
            self.megabytes = (torch.cuda.memory_allocated(device) - before) / MEBIBYTE
        else:
            begin = perf_counter()
            yield
            self._seconds = perf_counter() - begin

    def count_features(self, features: Sequence[dict[str, Features]]) -> None:
        """Counts the features of the teachers."""
        levels = {id(level): level for each in features for group in each.values() for level in group}
        self.megabytes = sum(level.nbytes for level in levels.values()) / MEBIBYTE
