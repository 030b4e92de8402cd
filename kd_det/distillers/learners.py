"""The learners of a step: the student, and further detectors that train beside it, apart or as branches of it.

Each has its task's loss, its terms, and what watches them. The student is the first, and does not notice the others:
they are drawn from generators of their own, and see in each step the random numbers that it saw.
"""
from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from mmdet.models.detectors import BaseDetector
from torch import Tensor, nn

from kd_det.compat.process import preserved_randomness, reseed, save_randomness
from kd_det.config.arguments import ArgumentError, at, check_arguments, declared, refuse
from kd_det.config.classes import count_classes
from kd_det.config.detectors import ModelConfig, check_student, extract_plain_detector, read_model_config
from kd_det.context import DistillContext, LevelSpec
from kd_det.distillers.building import Connections
from kd_det.distillers.monitor import GradientMonitor, IdleTermCheck
from kd_det.distillers.schedules import Schedule
from kd_det.distillers.supervision import Losses, Supervision, compute_labelled_losses, is_so_on_any_rank
from kd_det.heads import ROI_HEAD, TeacherOutputs
from kd_det.heads.request import join_requests
from kd_det.heads.roi import join_regions, split_stages
from kd_det.losses import DistillTerm
from kd_det.losses.base import Parts, find_read_levels
from kd_det.registry import build_detector
from kd_det.taps import Features, record_calls
from kd_det.teachers import InputBridge, TeacherError
from kd_det.teachers.engine import take_from_first_rank
from kd_det.teachers.ensemble import FusionTrunk
from kd_det.teachers.guide import Guide, LearnerStep
from kd_det.teachers.joining import copy_proposals
from kd_det.teachers.loading import load_strictly

Predictor = Callable[..., Any]  # of inputs, data samples and mode, as a detector's forward
SHAREABLE = ('backbone', 'neck', 'rpn_head')  # from the image on, as far as every learner computes the same


class Learner:
    """One detector that learns, and what belongs to it.

    Args:
        index: 0 is the student.
        student: The plain detector.
        terms: Its terms by name.
        schedules: Of the weights of all terms, by name.
        connections: What is read of it.
        bridge: Turns the student's batch into its own; None for the student.
        pseudo_labels: The distiller's, if there are any.
        keeps_maps: Whether a guide reads what its head puts out as it is, see ``maps`` of a
            :class:`~kd_det.teachers.guide.LearnerStep`.

    Attributes:
        monitor: Measures the gradients of its terms.
        idle_check: Warns of its terms that teach nothing.
    """

    def __init__(self, index: int, student: nn.Module, terms: dict[str, DistillTerm], schedules: dict[str, Schedule],
                 connections: Connections, bridge: InputBridge | None = None, pseudo_labels: Any = None,
                 keeps_maps: bool = False) -> None:
        self.index, self.student, self.terms, self.connections = index, student, terms, connections
        self.monitor = GradientMonitor({name: schedules[name] for name in terms})
        self.idle_check = IdleTermCheck(terms)
        self.bridge, self.pseudo_labels, self.keeps_maps = bridge, pseudo_labels, keeps_maps

    @property
    def prefix(self) -> str:
        """Of the names of its losses and metrics, ``'peer1/'``: none for the student."""
        return f'peer{self.index}/' if self.index else ''

    def run(self, inputs: Tensor, supervision: Supervision) -> tuple[Losses, LearnerStep]:
        """Its own losses on a batch, as it learns without a guide, and what is read on the way.

        Args:
            inputs: (N, C, H, W), preprocessed for the student.
            supervision: What is known of the batch.

        Raises:
            TeacherError: It would pad the batch further than the student does.
        """
        samples = supervision.samples
        if self.bridge is not None:
            shapes = [tuple(sample.img_shape[:2]) for sample in samples]
            own, inputs = inputs, self.bridge(inputs, shapes)
            if own.shape[-2:] != inputs.shape[-2:]:
                raise TeacherError(f'Learner {self.index} pads batches of {tuple(own.shape[-2:])} pixels to '
                                   f'{tuple(inputs.shape[-2:])}: all learners see the same batch. Set '
                                   f"data_preprocessor.pad_size_divisor={self.bridge.divisor} in the student's config.")
        two_stage = hasattr(self.student, 'roi_head')
        with self.connections.capture() as (features, outputs), \
                nullcontext(()) if not self.keeps_maps else \
                record_calls(self.student.rpn_head, 'loss_and_predict') if two_stage else \
                record_calls(self.student.bbox_head, 'forward') as heads, \
                record_calls(self.student, 'extract_feat') as calls:
            losses = dict(self.student.loss(inputs, samples))
        neck, maps = calls[0].returned, heads[0].returned if heads else None
        if two_stage and maps is not None:
            maps = maps[1]
        # On no rank, or on all: heads average the divisors of their losses, and some their statistics, over the ranks.
        if is_so_on_any_rank(not all(supervision.labelled), inputs.device):
            losses = compute_labelled_losses(self.student, inputs, neck, supervision, losses)
        return losses, LearnerStep(self.student, neck, features, outputs, samples, maps, supervision.labelled)

    def extract_feat(self, inputs: Tensor, data_samples: Sequence[Any] = ()) -> Features:
        """What its heads are given of a batch that was preprocessed for the student."""
        if self.bridge is not None:
            shapes = [tuple(sample.img_shape[:2]) for sample in data_samples]
            inputs = self.bridge(inputs, shapes or [tuple(inputs.shape[-2:])] * len(inputs))
        return self.student.extract_feat(inputs)

    def predict(self, inputs: Tensor, data_samples: list, mode: str = 'predict') -> Any:
        """Its own prediction on a batch that was preprocessed for the student."""
        if self.bridge is not None:
            inputs = self.bridge(inputs, [tuple(sample.img_shape[:2]) for sample in data_samples])
            for sample in data_samples:
                sample.set_metainfo(dict(batch_input_shape=tuple(inputs.shape[-2:])))
        return self.student(inputs, data_samples, mode=mode)

    def compare(self, names: Iterable[str], context: DistillContext,
                restrict: Callable[[DistillContext, int], DistillContext],
                show: Callable[[str, DistillContext], DistillContext], keep: bool) -> dict[str, Tensor | Parts]:
        """The values of its terms.

        Args:
            names: Of the terms that are asked for, whosoever's they are.
            context: The step.
            restrict: Makes of it the step as the terms of one guide see it.
            show: Makes of that the step as one term is to see it.
            keep: Whether the context still holds afterwards what was read of the guides; else each path and each head
                is let go of as soon as the last term that reads it has.
        """
        values, views = {}, dict[int, DistillContext]()
        terms = {name: self.terms[name] for name in names if name in self.terms}
        last = {(term.teacher_index, read): name for name, term in terms.items()
                for read in (*term.teacher_taps, *term.teacher_heads)}
        for name, term in terms.items():
            index = term.teacher_index
            view = views.get(index)
            if view is None:
                view = views[index] = restrict(context, index)
            values[name] = term(show(name, view))
            for (guide, read), reader in last.items() if not keep else ():
                if reader == name:
                    for held in (context.teachers, context.teacher_outputs, view.teacher_outputs):
                        held[guide].pop(read, None)
        return values

    def gradient_features(self, name: str, context: DistillContext) -> list[Tensor]:
        """Its features where the gradient of a term is measured."""
        return [level for path in self.connections.gradient_taps[name] for level in context.student[path]]


class SharedPart(nn.Module):
    """Stands in a branch for a part that the student has: it puts out what that did, and holds no weights.

    In training it repeats what the student's part has put out in this step, so that the trunk runs once; else it runs
    the student's.

    Args:
        part: The student's.
    """

    stands_for_students = True

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.__dict__['part'] = part  # past nn.Module.__setattr__: its weights are the student's
        self.__dict__['recorded'] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__['part'], name)

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within, the student runs; what it puts out, call by call, is kept until :meth:`forget`."""
        methods = ('forward', 'loss_and_predict') if hasattr(self.part, 'loss_and_predict') else ('forward', )
        with ExitStack() as stack:
            calls = {method: stack.enter_context(record_calls(self.part, method)) for method in methods}
            yield
        # A loss on the labelled images alone runs an RPN once more.
        self.recorded.update({method: deque(call.returned for call in made) for method, made in calls.items()})

    def forget(self) -> None:
        self.recorded.clear()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        calls = self.recorded.get('forward')
        return calls.popleft() if calls else self.part(*inputs, **named)

    def loss_and_predict(self, *inputs: Any, **named: Any) -> Any:
        """Of an RPN: the student's proposals, and no losses, which count once."""
        calls = self.recorded.get('loss_and_predict')
        if calls:
            return {}, [copy_proposals(each) for each in calls.popleft()[1]]
        return self.part.loss_and_predict(*inputs, **named)

    def init_weights(self) -> None:
        """The student's own does it."""


def build_peers(peers: int | Sequence[dict], share: Sequence[str], student: nn.Module,
                config: dict) -> list[nn.Module]:
    """Builds the learners beside the student.

    Args:
        peers: Model dicts of detectors, or ``dict(config=…, checkpoint=…)`` of those that start from weights; a number
            for so many of the student's own kind.
        share: Parts that they have in common with the student.
        student: The student.
        config: Its model dict.

    Raises:
        ConfigurationError: One is no detector; or a part can not be shared, for one lacks it or has another.
    """
    unknown = [part for part in share if part not in SHAREABLE]
    if unknown:
        refuse('model.share', unknown[0], f"parts among {', '.join(SHAREABLE)}")
    wanted = [part for part in SHAREABLE if part in share]
    if wanted and wanted != [part for part in SHAREABLE if getattr(student, part, None) is not None][:len(wanted)]:
        refuse('model.share', tuple(share), 'all parts from the image on, as far as the learners compute the same',
               f'What {wanted[-1]} is given has to be the same, too.')
    built = []
    for index, each in enumerate(list_peers(peers, config)):
        with at(f'model.peers[{index}]'):
            own = read_peer(each)
            check_student(own, f'model.peers[{index}]')
            peer = build_detector(extract_plain_detector(own))
            if not isinstance(peer, BaseDetector):
                refuse('type', own['type'], 'the type of a detector')
            _check_peer(peer, student, bool(wanted))
            for part in wanted:
                if _describe(own, part) != _describe(extract_plain_detector(config), part):
                    raise ArgumentError(part, "is shared, but is not that of the student's config: give both the same, "
                                              'or share less.')
                peer._modules[part] = SharedPart(getattr(student, part))
            if 'type' not in each and each.get('checkpoint'):
                peer.start_from = each['checkpoint']
        built.append(peer)
    return built


def list_peers(peers: int | Sequence[dict], student: dict) -> list[dict]:
    """Lists ``model.peers``: of a number so many of the student's own kind."""
    return [copy.deepcopy(student) for _ in range(peers)] if isinstance(peers, int) else list(peers)


def read_peer(peer: dict) -> dict:
    """The model dict of one of them.

    Raises:
        ArgumentError: It is none, and names no config.
    """
    if 'type' in peer:
        return peer
    check_arguments(_read_config, peer)
    return _read_config(**peer)


def _check_peer(peer: BaseDetector, student: nn.Module, shares: bool) -> None:
    """Checks that a peer can learn from the student's batches, and from the images themselves where it shares parts."""
    counts = count_classes(peer), count_classes(student)
    if None not in counts and counts[0] != counts[1]:
        raise ArgumentError('', f'it tells {counts[0]} classes apart, and the student {counts[1]}: all learners learn '
                                'from the same ground truth. Set its num_classes.')
    if getattr(peer, 'with_mask', False) and not getattr(student, 'with_mask', False):
        raise ArgumentError('', f"it learns masks, a {type(peer).__name__}, which the student's data, that of a "
                                f'{type(student).__name__}, does not bring. Let the student be of its kind.')
    bridge, own = (InputBridge(student.data_preprocessor, each.data_preprocessor) for each in (peer, student))
    if shares and not (bridge.is_identity and bridge.divisor == own.divisor):
        raise ArgumentError('data_preprocessor', "it shares parts, but its images are not those of the student's "
                                                 'config: give both the same, or share nothing.')


@declared
def _read_config(config: ModelConfig, checkpoint: str | None = None) -> dict:
    """The model dict of a peer that starts from weights."""
    return read_model_config(config)


def _describe(config: dict, part: str) -> Any:
    """What a model dict says of a part, without where its weights start from."""
    return {key: value for key, value in (config.get(part) or {}).items() if key not in ('init_cfg', 'pretrained')}


def init_peers(peers: Sequence[nn.Module]) -> None:
    """Gives each its start: weights of its own checkpoint, or drawn as its config says. The generators stay.

    On all ranks they are those of the first, as MMEngine sees to it of the student, by a state dict that has no peers.
    """
    with preserved_randomness():
        for peer in peers:
            # No two learners of a kind begin alike, nor as the student, which was drawn before.
            reseed()
            peer.init_weights()
            if hasattr(peer, 'start_from'):
                shared = [f'{name}.*' for name, part in peer.named_children() if isinstance(part, SharedPart)]
                load_strictly(peer, peer.start_from, allow_unexpected=shared, role='peer')
            take_from_first_rank(peer.state_dict().values())


def run_learners(learners: Sequence[Learner], inputs: Tensor,
                 supervision: Supervision) -> tuple[list[Losses], list[LearnerStep]]:
    """The forward of each learner on the same batch, the student's first.

    Each peer sees the random numbers that the student saw, and the generators are afterwards where the student left
    them: what a learner samples does not depend on who else learns.

    Args:
        learners: All of them.
        inputs: (N, C, H, W), preprocessed for the student.
        supervision: What is known of the batch.
    """
    shared = [part for learner in learners[1:] for part in learner.student.children() if isinstance(part, SharedPart)]
    restore = save_randomness() if len(learners) > 1 else None
    with ExitStack() as recording:
        for part in shared:
            recording.enter_context(part.record())
        ran = [learners[0].run(inputs, supervision)]
    try:
        for learner in learners[1:]:
            trunk, steps = getattr(learner.student, 'backbone', None), [step for _, step in ran]
            with preserved_randomness(), trunk.receiving(steps) if isinstance(trunk, FusionTrunk) else nullcontext():
                restore()
                ran.append(learner.run(inputs, supervision))
    finally:
        for part in shared:
            part.forget()
    return [losses for losses, _ in ran], [step for _, step in ran]


def ask_guide(guide: Guide, terms: Sequence[DistillTerm], levels: dict[str, Sequence[LevelSpec]], images: Tensor,
              image_shapes: Sequence[tuple[int, int]],
              steps: Sequence[LearnerStep]) -> dict[int, tuple[dict[str, Features], TeacherOutputs]]:
    """Has a guide answer what terms read of it, for each of their learners.

    It runs once for all, and its RoI head once over the regions of all that sample some.

    Args:
        guide: The guide.
        terms: Those that learn of it in this step; without any it does not run.
        levels: Of each of its taps.
        images: (N, 3, H, W), preprocessed for the student.
        image_shapes: Height and width of each image within the batch.
        steps: Of each learner.

    Returns:
        By the learner's index features and outputs.
    """
    learners = sorted({term.learner_index for term in terms})
    heads = join_requests(head for term in terms for head in term.teacher_heads)
    taps = tuple(dict.fromkeys(path for term in terms for path in term.teacher_taps))
    if not heads and not taps:
        return {}
    sampling = sorted({term.learner_index for term in terms if ROI_HEAD in term.teacher_heads})
    sampled = [steps[index].outputs[ROI_HEAD] for index in sampling]
    student = dict(steps[learners[0]].outputs, **{ROI_HEAD: join_regions(sampled)} if sampled else {})
    read = find_read_levels(terms, levels)
    features, outputs = guide.observe(images, image_shapes, heads, student, taps, read, steps)
    if len(sampled) < 2:
        return dict.fromkeys(learners, (features, outputs))
    own = dict(zip(sampling, split_stages(outputs[ROI_HEAD], sampled)))
    return {index: (features, dict(outputs, **{ROI_HEAD: own[index]} if index in own else {})) for index in learners}


def connect_fused(learners: Sequence[Learner]) -> None:
    """Tells learners of fused features whose they are."""
    for learner in learners:
        trunk = getattr(learner.student, 'backbone', None)
        if isinstance(trunk, FusionTrunk):
            trunk.sources = tuple(learners[index] for index in trunk.of)


def group_parameters(learners: Sequence[Learner], shares_trunk: bool) -> list[list[nn.Parameter]]:
    """The parameters that make one network each: those of a learner, with its terms; of all that share a trunk."""
    groups: list[list[nn.Parameter]] = [[] for _ in learners]
    for learner in learners:
        own = groups[0 if shares_trunk else learner.index]
        own.extend(learner.student.parameters())
        own.extend(parameter for term in learner.terms.values() for parameter in term.parameters())
    return groups


def list_predictors(learners: Sequence[Learner], guides: Sequence[Guide]) -> dict[str, Predictor]:
    """What predicts beside the student, by the prefix of its metrics: the peers, and the guides that can."""
    found = {learner.prefix: learner.predict for learner in learners[1:]}
    for index, guide in enumerate(guides):
        predict, prefix = guide.make_predictor(learners), f'{guide.metrics_prefix}/'
        if predict is not None:
            found[f'{guide.metrics_prefix}{index}/' if prefix in found else prefix] = predict
    return found
