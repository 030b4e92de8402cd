"""The method's core: one training step of a student under the guidance of its teachers, from top to bottom.

:meth:`DetectionDistiller.loss` is the step, and :meth:`DetectionDistiller.observe_learners`, which it calls first, its
forward: learners, guides, terms. Below them stand what comes before the first step (guides, inheritance, classes), and
what a step costs.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from kd_det.compat.process import preserved_randomness, reseed
from kd_det.config.arguments import ArgumentError, Index, Name, Names, at, declared, refuse
from kd_det.config.choices import InheritanceRule
from kd_det.config.detectors import extract_plain_detector
from kd_det.context import DistillContext, Progress
from kd_det.distillers.building import (
    Connections,
    GuideConnections,
    at_guide,
    build_guides,
    build_student,
    build_task_schedule,
    build_terms,
    check_terms_are_given,
    list_guide_configs,
)
from kd_det.distillers.class_sets import ClassSets, has_classes
from kd_det.distillers.costs import StepCost
from kd_det.distillers.gradients import SharedPass, list_features
from kd_det.distillers.inheritance import WeightOrigins, build_inheritance, find_pretrained_parameters, start_student
from kd_det.distillers.learners import Learner, ask_guide, build_peers, connect_fused, init_peers, run_learners
from kd_det.distillers.monitor import (
    GradientMonitor,
    IdleTermCheck,
    Read,
    ReadRecord,
    list_reads,
    require_finite_weights,
)
from kd_det.distillers.policies import Lesson, Policy, PolicyStep, build_policy
from kd_det.distillers.quantization import build_quantizer
from kd_det.distillers.schedules import ScheduleConfig
from kd_det.distillers.student_wrapper import GUIDES, PEERS, QUANTIZER, StudentWrapper
from kd_det.distillers.supervision import (
    Losses,
    Supervision,
    build_pseudo_labels,
    read_supervision,
    scale_losses,
)
from kd_det.heads import TeacherOutputs
from kd_det.losses.base import Parts, sum_parts
from kd_det.taps import Features
from kd_det.teachers import InputBridge
from kd_det.teachers.guide import Guide, LearnerStep
from kd_det.teachers.teacher import FrozenDetector


class Observation(NamedTuple):
    """One step of a learner before anything is weighted: its own losses, what its terms may read, and their values."""
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
        teacher: ``dict(config=…, checkpoint=…)`` of a frozen detector, see :class:`~kd_det.teachers.Teacher`; with a
            ``type`` another kind of :class:`~kd_det.teachers.guide.Guide`; or a list of those. What they need is loaded
            when training starts, never for a test run.
        distill: Name -> term. Beside the term's own arguments each takes ``weight``: a number or a schedule, see
            :mod:`kd_det.distillers.schedules`; a term whose weight is 0 throughout is left out. Each is logged as
            ``loss_<name>``, its parts as ``distill/<name>_<part>``, a weight that changes as ``distill/<name>_weight``.
            ``learner`` tells who learns by it, where there are peers: 0, the student, by default.
        inherit: Parts of the student (``('neck', 'rpn_head', 'roi_head')``) that start from the first teacher's weights
            where shapes agree; ``'auto'`` for all but the backbone that are of the same type in both.
        inherit_by: ``'selection'`` for a student smaller than the teacher, ``'growth'`` for a larger one, or a dict,
            see :class:`~kd_det.distillers.inheritance.Inheritance`; then ``'auto'`` takes the backbone, too.
        task_weight: Of the student's own losses: a number or a schedule, such as
            ``dict(type='Start', value=1.0, epochs=2)`` for a student that at first learns from its teacher alone
            (FitNets, arXiv 1412.6550).
        pseudo_labels: ``dict(score=0.5, …)`` for confident boxes of a teacher as ground truth, see
            :class:`~kd_det.distillers.supervision.PseudoLabels`.
        quantize: ``dict(bits=8, …)`` for a student that is trained as it computes in integers, see
            :class:`~kd_det.distillers.rounding.Quantization`; without terms, too. It starts from a trained one:
            ``load_from``.
        peers: Further detectors that learn in the same steps: how many of the student's own kind, or model dicts, or
            ``dict(config=…, checkpoint=…)`` of those that start from weights.
        share: Parts that the peers have in common with the student, from the image on: ``('backbone', 'neck')``.
        policy: Who teaches, and when: ``dict(type='Random')``, see :mod:`kd_det.distillers.policies`; all by default.

    Attributes:
        terms: The terms by name; those whose weight is not 0 throughout.
        schedules: The schedule of each term's weight, by the same names.
        task_schedule: That of the student's own losses.
        learners: The student and its peers, each with its terms.
        guides: What the terms learn from, in the config's order, before anything is loaded.
        teachers: The same at work; None before training.
        origins: Where the student's weights came from.

    Raises:
        ConfigurationError: A term's name or argument is wrong; the message says where in the config.
        TeacherError: A teacher lacks its config or checkpoint.
    """

    @declared
    def __init__(self,
                 student: dict[str, Any],
                 teacher: dict[str, Any] | Sequence[dict[str, Any]] = (),
                 distill: dict[str, Any] | None = None,
                 inherit: Name | Names = (),
                 inherit_by: InheritanceRule | dict[str, Any] = 'shape',
                 task_weight: ScheduleConfig = 1.0,
                 pseudo_labels: dict[str, Any] | None = None,
                 quantize: dict[str, Any] | None = None,
                 peers: Index | Sequence[dict[str, Any]] = 0,
                 share: Names = (),
                 policy: dict[str, Any] | None = None) -> None:
        check_terms_are_given(distill, peers)
        detector = build_student(student)
        super().__init__(detector)
        self.origins = WeightOrigins(detector)
        self.inherited_parts = (inherit, ) if isinstance(inherit, str) else tuple(inherit)
        self.inheritance, self.not_inherited = build_inheritance(inherit_by), list[str]()
        self.terms_origin = 'random'
        self.progress, self.cost, self.reads = Progress(), StepCost(), ReadRecord()
        self.shares_trunk = bool(share)
        with preserved_randomness():  # the student is drawn as if there were no distillation
            models = [detector, *build_peers(peers, share, detector, student)]
        self.teacher_configs, self.guides = list_guide_configs(teacher), build_guides(teacher, len(models))
        with preserved_randomness():
            for index, guide in enumerate(self.guides):
                if guide.stands_for_learner:
                    with at_guide(teacher, index):
                        models.append(guide.make_learner(models, extract_plain_detector(student)))
        if len(models) > 1:
            self._modules[PEERS] = nn.ModuleList(models[1:])
        self.teachers: list[Guide] | None = None
        self.class_sets = ClassSets(detector)
        self.pseudo_labels = build_pseudo_labels(pseudo_labels, detector, self.guides)
        self.task_schedule = build_task_schedule(task_weight)

        with preserved_randomness():
            self.schedules, terms = build_terms(distill or {}, len(self.guides), len(models))
            self.guide_connections = GuideConnections(self.guides, terms, models)
        self.terms.update(terms)
        self.policy = build_policy(policy, self.guides, terms)
        learning = {str(index): guide.module for index, guide in enumerate(self.guides) if guide.module is not None}
        if learning:
            self._modules[GUIDES] = nn.ModuleDict(learning)
        self.learners = [self._make_learner(index, model) for index, model in enumerate(models)]
        connect_fused(self.learners)
        if quantize is not None:
            if len(models) > 1:
                refuse('model.quantize', quantize, 'None beside model.peers', 'One student is trained in integers.')
            self._modules[QUANTIZER] = build_quantizer(quantize, detector, self.connections.student_taps.paths)

    def _make_learner(self, index: int, model: nn.Module) -> Learner:
        terms = {name: term for name, term in self.terms.items() if term.learner_index == index}
        bridge = InputBridge(self.data_preprocessor, model.data_preprocessor) if index else None
        return Learner(index, model, terms, self.schedules, self.guide_connections.of_learners[index], bridge,
                       self.pseudo_labels, any(guide.learns and index in guide.reads_learners for guide in self.guides))

    @property
    def connections(self) -> Connections:
        """What is read of the student."""
        return self.learners[0].connections

    @property
    def monitor(self) -> GradientMonitor:
        """What measures the gradients of the student's terms."""
        return self.learners[0].monitor

    @property
    def idle_check(self) -> IdleTermCheck:
        """What warns of those of the student's terms that teach nothing."""
        return self.learners[0].idle_check

    # ------------------------------------------------------------------------------------ the training step

    def set_progress(self, iteration: int, epoch: float) -> None:
        """Tells the schedules where the training stands."""
        self.progress = Progress(iteration, epoch)

    def loss(self, inputs: Tensor, data_samples: list) -> Losses:
        """One training step: each learner's own losses and the terms'.

        Args:
            inputs: (N, 3, H, W), preprocessed.
            data_samples: mmdet's data samples with ``gt_instances``.

        Returns:
            The student's losses, and those of peers and of guides that learn, with ``peer1/`` or ``guide0/`` before
            their names; ``loss_<name>`` of each term; for the log only its parts, its weight where that changes, and,
            in steps that measure it, its gradient in units of the task's; and the weights of a policy.

        Raises:
            ConfigurationError: No term can teach a learner anything; or a schedule's weight is not finite.
        """
        # What each term is worth in this step; without a weight it does not run, nor a guide that no other needs.
        weights = {name: schedule(self.progress) for name, schedule in self.schedules.items()}
        task_weight = self.task_schedule(self.progress)
        require_finite_weights(weights, task_weight, self.progress)
        active = [name for name, weight in weights.items() if weight != 0]
        observations, losses, lesson = self.observe_learners(inputs, data_samples, active, self.policy, keep=False)
        weights.update({name: weights[name] * lesson.weights.get(name, 1.0) for name in active})
        values: dict[str, Tensor | Parts] = {}
        gradients: dict[str, Tensor] = {}
        for learner, observation in zip(self.learners, observations):
            gradients.update(self._measure_gradients(learner, observation))
            # A balanced weight is a ratio of gradients, and known now that they are.
            weights.update({name: weights[name] * learner.monitor.scale(name) for name in learner.terms})
            values.update(observation.values)
            own = scale_losses(observation.losses, task_weight)
            losses.update({f'{learner.prefix}{name}': value for name, value in own.items()})
        for name, term in self.terms.items():
            if f'loss_{name}' in losses:
                raise ArgumentError(f'model.distill.{name}', f"the student has a loss of its own, 'loss_{name}', which "
                                    'that of this term would replace. Rename the term.')
            if name in values:
                value = values[name]
                losses[f'loss_{name}'] = weights[name] * sum_parts(value)
                for part, each in value.items() if isinstance(value, dict) else ():
                    # MMEngine adds up whatever has 'loss' in its name.
                    losses[f"distill/{name}_{part.replace('loss', 'part')}"] = weights[name] * each.detach()
            else:  # 0, with a gradient of 0 for every parameter: data-parallel training waits for each in every step
                losses[f'loss_{name}'] = sum((each.sum() * 0 for each in term.parameters()),
                                             torch.zeros((), device=inputs.device))

        # Of what is named without 'loss' mmengine keeps a log, and adds nothing to the sum.
        for name, schedule in self.schedules.items():
            if not schedule.is_constant:
                losses[f'distill/{name}_weight'] = torch.as_tensor(weights[name])
        losses.update({f'policy/{arm}': torch.as_tensor(weight) for arm, weight in lesson.log.items()})
        for name, gradient in gradients.items():
            losses[f'distill/{name}_gradient'] = torch.as_tensor(weights[name] * gradient)
        if not self.task_schedule.is_constant:
            losses['distill/task_weight'] = torch.as_tensor(task_weight)
        return losses

    def observe(self, inputs: Tensor, data_samples: list, names: Iterable[str]) -> Observation:
        """The student's part of :meth:`observe_learners`."""
        return self.observe_learners(inputs, data_samples, names)[0][0]

    def observe_learners(self, inputs: Tensor, data_samples: list,
                         names: Iterable[str], policy: Policy | None = None,
                         keep: bool = True) -> tuple[list[Observation], Losses, Lesson]:
        """The forward of a step: each learner's own loss, and the terms of these names with what they read.

        Args:
            inputs: (N, 3, H, W), preprocessed.
            data_samples: mmdet's data samples with ``gt_instances``.
            names: Of the terms; without any no guide runs.
            policy: Says which of them teach, and of which images; all by default.
            keep: Whether the contexts still hold afterwards what terms have read of the guides.

        Returns:
            What was observed of each learner; the losses of guides that learn; and what the policy has decided.
        """
        names, supervision = tuple(names), self._find_supervision(inputs, data_samples)
        image_shapes = [tuple(sample.img_shape[:2]) for sample in data_samples]

        # The learners, as they learn without a guide; their taps and heads are read on the way.
        losses, steps = run_learners(self.learners, inputs, supervision)
        losses[0].update(supervision.log)
        with self.cost.measure(inputs.device):
            lesson = Lesson()
            if policy is not None and names:
                lesson = policy.teach(PolicyStep(self.progress, inputs, supervision, self.build_teachers(),
                                                 self.class_sets, steps[0]))
                names = lesson.choose(names)
            # The guides, as far as the terms read them.
            guides = [guide for guide in self.build_teachers() if guide.learns]
            learnt = {f'guide{self.teachers.index(guide)}/{name}': loss for guide in guides
                      for name, loss in guide.learn(steps).items()}
            observed = self.observe_teachers(names, inputs, image_shapes, steps)
            self.cost.count_features([features for of_learner in observed for features, _ in of_learner])
            contexts = [DistillContext(
                student=step.features,
                teachers=[dict(features) for features, _ in of_learner],
                student_levels=learner.connections.student_levels,
                teacher_levels=self.guide_connections.levels,
                boxes=supervision.boxes,
                labels=supervision.labels,
                labelled=supervision.labelled,
                batch_shape=tuple(inputs.shape[-2:]),
                image_shapes=image_shapes,
                progress=self.progress,
                student_outputs=step.outputs,
                teacher_outputs=[dict(outputs) for _, outputs in of_learner])
                for learner, step, of_learner in zip(self.learners, steps, observed)]
            del observed
            self.reads.note(self.progress.iteration, list_reads(contexts[0]))
            # The terms, in float32; each sees the classes that its guide shares with the student.
            with torch.autocast(inputs.device.type, enabled=False):
                values = [learner.compare(names, context, self.class_sets.restrict_context, lesson.show, keep)
                          for learner, context in zip(self.learners, contexts)]
            if policy is not None and names:
                policy.notice(self.progress, {name: sum_parts(value).detach() for each in values
                                              for name, value in each.items()})
        return list(map(Observation, losses, contexts, values)), learnt, lesson

    def observe_teachers(self, names: Iterable[str], images: Tensor, image_shapes: Sequence[tuple[int, int]],
                         steps: Sequence[LearnerStep]) -> list[list[tuple[dict[str, Features], TeacherOutputs]]]:
        """Runs what the terms of these names read of each guide, and nothing of a guide that none of them reads.

        Returns:
            For each learner and each guide its features and outputs.
        """
        observed = [[({}, {})] * len(self.guides) for _ in self.learners]
        for index, guide in enumerate(self.build_teachers()):
            read = [self.terms[name] for name in names if self.terms[name].teacher_index == index]
            levels = self.guide_connections.levels[index]
            for learner, answer in ask_guide(guide, read, levels, images, image_shapes, steps).items():
                observed[learner][index] = answer
        return observed

    def _find_supervision(self, inputs: Tensor, data_samples: list) -> Supervision:
        """What is known of the objects in a batch, from its data and from the guide of the pseudo-labels."""
        supervision, pseudo_labels = read_supervision(data_samples), self.pseudo_labels
        if pseudo_labels is None or not pseudo_labels.is_due(supervision, self.progress):
            return supervision
        index = pseudo_labels.teacher_index
        teacher = self.build_teachers()[index]
        detections = self.class_sets.translate(teacher.detect(inputs, data_samples), index, teacher)
        owner = f'teacher[{index}]' if len(self.guides) > 1 else 'teacher'
        self.reads.note(self.progress.iteration, ((Read(owner, 'feature for pseudo-labels', level), each)
                                                  for level, each in enumerate(teacher.feature_sums)))
        return pseudo_labels(supervision, detections, self.progress)

    def _measure_gradients(self, learner: Learner, observation: Observation) -> dict[str, Tensor]:
        """Compares the gradients of terms with the task's, where that is due; see :meth:`GradientMonitor.measure`.

        The task's losses then have the gradient that was found so, where the step need not find it once more.
        """
        if not torch.is_grad_enabled():
            return {}
        learner.idle_check.check(learner, observation)
        losses, context, values = observation
        due = learner.monitor.find_due(self.progress, values)
        if not due:
            return {}
        features = {name: learner.gradient_features(name, context) for name in due}
        labels = {name: self.class_sets.convert_labels(context.labels, self.terms[name].teacher_index) for name in due}
        task, sums = self.parse_losses(losses)[0], {name: sum_parts(value) for name, value in values.items()}
        shared = SharedPass.find(task, list_features(features.values()), sums.values())
        measured = learner.monitor.measure(task, {name: sums[name] for name in due}, features, labels, shared)
        losses.update({} if shared is None else shared.replace(losses))
        return measured

    # ------------------------------------------------------------------------------------ before the first step

    @property
    def teacher(self) -> Guide | None:
        """The first guide, once training has begun."""
        return self.teachers[0] if self.teachers else None

    def init_weights(self) -> None:
        """Initialises the learners as they would themselves, starts the guides, and lets the student inherit."""
        self.student.init_weights()
        self._is_init = True
        self.origins.mark(find_pretrained_parameters(self.student), 'pretrained')
        init_peers(self.peers)
        self.inherit()

    def inherit(self) -> None:
        """Lets the student start from the first teacher, as far as ``inherit`` and ``inherit_by`` say."""
        teachers = self.build_teachers()
        first: Any = teachers[0] if teachers and isinstance(self.guides[0], FrozenDetector) else None
        self.inherited_parts, self.not_inherited = start_student(self.student, first, self.inherited_parts,
                                                                 self.inheritance, self.origins)

    def build_teachers(self) -> list[Guide]:
        """Starts the guides unless that is done.

        Raises:
            TeacherError: A teacher has no checkpoint.
            CheckpointError: A checkpoint does not fit; the message names the keys.
        """
        if self.teachers is None:
            models, teachers = [learner.student for learner in self.learners], []
            with preserved_randomness():
                for index, (guide, reading) in enumerate(zip(self.guides, self.guide_connections.readings)):
                    with at('model.teacher' if len(self.guides) == 1 else f'model.teacher[{index}]'):
                        teachers.append(guide.start(reading, models))
                    # A teacher leaves the generator as it was: from there a second one would be drawn as its copy.
                    reseed()
            self.teachers = teachers
        return self.teachers

    def match_classes(self, classes: Sequence[str] | None) -> list[str]:
        """Matches the teachers' classes with the student's, see :meth:`~kd_det.distillers.class_sets.ClassSets.match`.

        Args:
            classes: Names of the student's classes, by label; None where the training data does not tell them.

        Returns:
            What was found of each teacher, for the log.
        """
        read = {term.teacher_index for term in self.terms.values()
                if term.learns_beforehand or any(map(has_classes, term.teacher_heads))}
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
        for learner in self.learners:
            if learner.bridge is not None:
                learner.bridge._apply(function)
        return self
