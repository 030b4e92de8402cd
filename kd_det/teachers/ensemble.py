"""Guides made of several others: their mean or gated prediction, and a learner of their fused features."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from mmcv.cnn import DepthwiseSeparableConvModule
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kd_det.config.arguments import ArgumentError, Index, at, declared, refuse
from kd_det.heads import ROI_HEAD, DenseOutputs, HeadError, HeadRequest, RoIOutputs, StudentOutputs, TeacherOutputs
from kd_det.heads.queries import predicts_queries
from kd_det.heads.roi import find_stages
from kd_det.registry import build_detector
from kd_det.taps import Features, Taps
from kd_det.teachers.guide import Guide, GuideForm, LearnerStep, Reading, ReadLevels, Shape, build_guide
from kd_det.teachers.peers import Peer, evaluating
from kd_det.teachers.probe import probe_levels
from kd_det.teachers.teacher import FrozenDetector

NECK = 'neck'
Weights = Literal['mean', 'gate'] | Annotated[Sequence[float], MinLen(2)]


@MODELS.register_module()
class Ensemble(Guide):
    """What several guides say together: the weighted mean of their logits and regressions, prior by prior.

    Their heads have to be of one kind with the same priors; of RoI heads each says what it makes of the regions that
    the learner sampled who learns from it. Boxes are the mean of the members' boxes.

    - ``weights='mean'``, or numbers: of frozen teachers, or of learners (EnsembleNet, Li et al., arXiv 1905.09979).
    - ``weights='gate'``: softmax(ReLU(BN(FC(trunk)))) of each image, learnt (ONE, Lan et al., NeurIPS 2018): of
      branches of one trunk, ``model.share=('backbone', 'neck')``, whose pooled features the gate is given.

    Where it has a ``loss_weight`` the ensemble learns from the ground truth too: the student's own loss of the weighted
    mean of the members' maps reaches all of them, and the gate. Of learners it is evaluated in validation, as
    ``ensemble/…``.

    Args:
        of: The members: ``dict(type='Peer', learner=0)``, or any other guides whose heads agree.
        weights: See above; numbers are divided by their sum.
        loss_weight: Of its own loss; 1 for a gate, which would else learn nothing, and 0 for others by default.

    Raises:
        ArgumentError: An argument does not fit, or members can not be joined.
    """
    offers_heads = True

    @declared
    def __init__(self, of: Annotated[Sequence[dict[str, Any]], MinLen(2)], weights: Weights = 'mean',
                 loss_weight: float | None = None) -> None:
        self.members: list[Any] = []
        for index, config in enumerate(of):
            with at(f'of[{index}]'):
                self.members.append(build_guide(config) if 'type' in config else FrozenDetector(config))
                if not self.members[-1].offers_heads:
                    refuse('type', config['type'], 'a guide that predicts')
        self.gated = weights == 'gate'
        numbers = [1.0] * len(of) if isinstance(weights, str) else list(weights)
        if len(numbers) != len(of) or min(numbers) < 0 or not sum(numbers) > 0:
            refuse('weights', weights, f'{len(of)} numbers of 0 or more, one for each member')
        self.weights = torch.tensor(numbers) / sum(numbers)
        self.loss_weight = float(self.gated) if loss_weight is None else loss_weight
        self.learns = self.loss_weight != 0
        peers = [isinstance(member, Peer) for member in self.members]
        if (self.gated or self.learns) and not all(peers):
            refuse('of', of, "members of type 'Peer'", 'A gate, and the loss of an ensemble, reach learners alone.')
        if self.gated and not self.learns:
            refuse('loss_weight', loss_weight, 'another number than 0', 'A gate learns from nothing else.')
        self.reads_learners = tuple(dict.fromkeys(index for each in self.members for index in each.reads_learners))
        self.of_learners = all(peers)
        self.learner_taps = (NECK, ) if self.gated else ()
        self.has_student_labels = all(each.has_student_labels for each in self.members)
        self._shares: Tensor | None = None  # of the present step, (N, members)

    def check(self, reading: Reading) -> None:
        super().check(reading)
        for member in self.members:
            member.check(reading)
        asked = [request for request in map(HeadRequest.parse, reading.heads) if request.part in ('towers', 'queries')]
        if asked:
            raise HeadError(f"it reads '{asked[0]}', of which there is no mean: only priors and regions are the same "
                            'in all members. Take a term for each member.')

    def probe(self, reading: Reading, learners: Sequence[nn.Module], levels: Sequence[Mapping[str, Any]]) -> GuideForm:
        models = [learners[member.learner] for member in self.members if isinstance(member, Peer)]
        check_alike(models)
        for member in self.members:
            member.probe(reading, learners, levels)
        if self.gated:
            trunk = getattr(learners[0], NECK, None)
            shared = all(getattr(model.neck, 'part', None) is trunk for model in models[1:] if trunk is not None)
            if models[0] is not learners[0] or trunk is None or not shared:
                raise ArgumentError('weights', "a gate is given what all members share: set "
                                    "model.share=('backbone', 'neck'), and let the first member be the student.")
            self.module = Gate(levels[0][NECK][0].channels, len(models))
        return GuideForm({})

    def start(self, reading: Reading, learners: Sequence[nn.Module]) -> Guide:
        self.members = [member.start(reading, learners) for member in self.members]
        check_alike([learners[member.learner] if isinstance(member, Peer) else member.model for member in self.members
                     if isinstance(member, Peer) or hasattr(member, 'model')])
        self.weights = self.weights.to(next(learners[0].parameters()).device)
        counts = {member.num_classes for member in self.members}
        self.classes, self.num_classes = self.members[0].classes, counts.pop() if len(counts) == 1 else None
        return self

    def find_shares(self, features: dict[str, Features], images: int) -> Tensor:
        """(N, members): how much each counts in each image."""
        if self.module is None:
            return self.weights.expand(images, -1)
        return self.module(features[NECK])

    def learn(self, learners: Sequence[LearnerStep]) -> dict[str, Any]:
        steps = [learners[member.learner] for member in self.members]
        shares = self.find_shares(steps[0].features, len(steps[0].samples))
        self._shares = shares.detach()
        first, maps = steps[0].model, [step.maps for step in steps]
        if hasattr(first, ROI_HEAD):
            proposals = [copy_proposals(each) for each in maps[0]]
            with joined_regions([step.model for step in steps], [step.neck for step in steps], shares):
                losses = first.roi_head.loss(steps[0].neck, proposals, steps[0].samples)
        else:
            with replaced(first.bbox_head, 'forward', lambda *_: join_maps(maps, shares)):
                losses = first.bbox_head.loss(steps[0].neck, steps[0].samples)
        return {name: [self.loss_weight * each for each in value] if isinstance(value, list) else
                self.loss_weight * value if 'loss' in name else value for name, value in losses.items()}

    def observe(self, images: Tensor, image_shapes: Sequence[Shape], heads: Sequence[str] = (),
                student: StudentOutputs | None = None, taps: Sequence[str] | None = None,
                levels: ReadLevels | None = None,
                learners: Sequence[LearnerStep] = ()) -> tuple[dict[str, Features], TeacherOutputs]:
        answers = [member.observe(images, image_shapes, heads, student, (), None, learners)[1]
                   for member in self.members]
        shares = self.weights.expand(len(images), -1) if self._shares is None else self._shares
        return {}, {request: join_outputs([each[request] for each in answers], shares) for request in answers[0]}

    def make_predictor(self, learners: Sequence[Any]) -> Callable[..., Any] | None:
        """Predicts as the first member would whose head says what all say together."""
        if not self.of_learners:
            return None
        members = [learners[member.learner] for member in self.members]

        def predict(inputs: Tensor, data_samples: list, mode: str = 'predict') -> Any:
            necks = [member.extract_feat(inputs, data_samples) for member in members]
            models, first = [member.student for member in members], members[0].student
            shares = self.find_shares({NECK: necks[0]}, len(inputs))
            if hasattr(first, ROI_HEAD):
                join = joined_regions(models, necks, shares)
            else:
                heads = [model.bbox_head.forward for model in models]
                join = replaced(first.bbox_head, 'forward', lambda *_: join_maps(
                    [head(neck) for head, neck in zip(heads, necks)], shares))
            with replaced(first, 'extract_feat', lambda *_: necks[0]), join:
                return first(inputs, data_samples, mode=mode)

        return predict


class Gate(nn.Module):
    """softmax(ReLU(BN(FC(pooled feature)))) of each image.

    Args:
        channels: Of the features.
        members: How many shares it makes.
    """

    def __init__(self, channels: int, members: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(channels, members), nn.BatchNorm1d(members)

    def forward(self, levels: Features) -> Tensor:
        """(N, members) from levels of (N, C, H, W)."""
        pooled = torch.stack([level.mean((2, 3)) for level in levels]).mean(0)
        scores = self.linear(pooled)
        if self.training and len(scores) == 1:  # an image by itself has no spread
            norm = self.norm
            scores = F.batch_norm(scores, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            scores = self.norm(scores)
        return scores.relu().softmax(1)


def join_maps(maps: Sequence[Sequence[Any]], shares: Tensor) -> Any:
    """The weighted mean of what dense heads put out.

    Args:
        maps: Of each member what its head's forward returned: kinds of maps of (N, C, H, W), level by level.
        shares: (N, members).
    """
    return tuple([sum(share.view(-1, 1, 1, 1) * level for share, level in zip(shares.unbind(1), same))
                  for same in zip(*kinds)] for kinds in zip(*maps))


@contextmanager
def joined_regions(models: Sequence[Any], necks: Sequence[Features], shares: Tensor) -> Iterator[None]:
    """Within, the first detector's RoI head says of each region what those of all say together.

    Args:
        models: The detectors.
        necks: What their heads are given.
        shares: (N, members).
    """
    forwards = [model.roi_head._bbox_forward for model in models]

    def forward(*arguments: Any) -> dict[str, Tensor]:
        *stage, _, regions = arguments
        answers = [forward(*stage, neck, regions) for forward, neck in zip(forwards, necks)]
        weights = shares[regions[:, 0].long()].unbind(1)
        return {**answers[0], **{name: sum(weight[:, None] * answer[name] for weight, answer in zip(weights, answers))
                                 for name in ('cls_score', 'bbox_pred')}}

    with replaced(models[0].roi_head, '_bbox_forward', forward):
        yield


def join_outputs(outputs: Sequence[Any], shares: Tensor) -> Any:
    """The weighted mean of what several guides' heads say, in the one form of outputs.

    Args:
        outputs: Of each member; those of RoI heads as tuples of stages.
        shares: (N, members).

    Raises:
        HeadError: They are of other priors, or stages.
    """
    if isinstance(outputs[0], DenseOutputs):
        return join_dense(outputs, shares)
    if len({len(each) for each in outputs}) > 1:
        raise HeadError(f'RoI heads of {" and ".join(str(len(each)) for each in outputs)} stages have no mean.')
    return tuple(join_stage(stages, shares) for stages in zip(*outputs))


def join_dense(outputs: Sequence[DenseOutputs], shares: Tensor) -> DenseOutputs:
    """See :func:`join_outputs`."""
    first = outputs[0]
    forms = {(each.activation, each.shapes, each.strides, tuple(level.shape for level in each.logits))
             for each in outputs}
    if len(forms) > 1:
        raise HeadError('The members of an Ensemble have other priors or classes: their outputs have no mean.')

    def join(levels: Sequence[Features]) -> Features:
        return tuple(sum(share.view(-1, *[1] * (level.dim() - 1)) * level
                         for share, level in zip(shares.unbind(1), same)) for same in zip(*levels))

    tensors = {name: join([getattr(each, name) for each in outputs])
               for name in ('logits', 'regressions', 'objectness', 'centerness', 'distributions')
               if all(getattr(each, name) is not None for each in outputs)}
    return replace(first, **tensors, decode=lambda *chosen: join([each.decode(*chosen) for each in outputs]))


def join_stage(outputs: Sequence[RoIOutputs], shares: Tensor) -> RoIOutputs:
    """See :func:`join_outputs`; of one stage."""
    weights = shares[outputs[0].regions.rois[:, 0].long()].unbind(1)
    return outputs[0]._replace(
        logits=sum(weight[:, None] * each.logits for weight, each in zip(weights, outputs)),
        deltas=sum(weight[:, None, None] * each.deltas for weight, each in zip(weights, outputs)))


def check_alike(models: Sequence[Any]) -> None:
    """Checks that the heads of detectors say the same of the same places.

    Raises:
        ArgumentError: Some are of another kind, or have other priors or classes; or they predict queries.
    """
    forms = [_describe_heads(model) for model in models]
    for index, form in enumerate(forms):
        if form != forms[0]:
            differ = next(name for name in {**form, **forms[0]} if form.get(name) != forms[0].get(name))
            raise ArgumentError('of', f'the members can not be joined: {differ} of the first is '
                                      f'{forms[0].get(differ)}, of member {index} {form.get(differ)}.')
    if any(predicts_queries(type(getattr(model, 'bbox_head', None))) for model in models):
        raise ArgumentError('of', 'the members predict queries, which stand for other objects in each of them. Take a '
                                  'guide for each member, whose queries a term matches.')


def _describe_heads(model: Any) -> dict[str, Any]:
    """What has to be the same in two detectors whose outputs are joined."""
    form: dict[str, Any] = {}
    if hasattr(model, ROI_HEAD):
        stages = find_stages(model.roi_head)
        return {'the RoI head': type(model.roi_head).__name__, 'the number of stages': len(stages),
                'the number of classes': stages[0].num_classes}
    head = getattr(model, 'bbox_head', None)
    if isinstance(head, BaseDenseHead):
        form = {'the head': type(head).__name__, 'the number of classes': getattr(head, 'cls_out_channels', None)}
        if hasattr(head, 'prior_generator'):
            priors = head.prior_generator
            form['the priors'] = (type(priors).__name__, tuple(priors.strides), tuple(priors.num_base_priors),
                                  *(str(getattr(priors, name, None)) for name in ('base_anchors', 'offset')))
    return form


@contextmanager
def replaced(owner: Any, method: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within, an object has another method."""
    own = vars(owner).get(method)
    setattr(owner, method, function)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, method)
        else:
            setattr(owner, method, own)


def copy_proposals(proposals: InstanceData) -> InstanceData:
    """An image's proposals as an RPN gives them: a RoI head renames their boxes."""
    fields = dict(proposals.items())
    return InstanceData(**{'bboxes' if name == 'priors' else name: value for name, value in fields.items()})


# ------------------------------------------------------------------------------------------------------------ fusion


@MODELS.register_module()
class Fusion(Peer):
    """A further learner of the fused features of others, who learn from it (Feature Fusion Learning, Kim et al., 2019).

    Level by level their necks' features are concatenated, pass a depthwise 3 × 3 and a pointwise convolution, each with
    batch normalisation, and become what heads of its own are given, of the student's kind. They learn from the ground
    truth beside them; the gradient reaches the features that are fused. It is a learner after ``model.peers``, with the
    index after theirs, and terms may name it as ``learner``: in the paper it learns from the mean of the others,
    ``Ensemble(of=…)``.

    Args:
        of: Indices of the learners.

    Raises:
        ArgumentError: An argument does not fit, or their levels differ.
    """

    stands_for_learner = True

    @declared
    def __init__(self, of: Annotated[Sequence[Index], MinLen(2)] = (0, 1)) -> None:
        self.of, self.learner = tuple(of), -1
        self.reads_learners = self.of

    def make_learner(self, learners: Sequence[nn.Module], student: Mapping[str, Any]) -> nn.Module:
        """Builds the learner.

        Args:
            learners: Those so far.
            student: The student's model dict.
        """
        models = [learners[index] for index in self.of]
        lacking = [index for index, model in zip(self.of, models) if getattr(model, NECK, None) is None]
        if lacking:
            refuse('of', self.of, 'learners with a neck', f'Learner {lacking[0]} has none.')
        levels = [probe_levels(model, Taps(model, [NECK]))[NECK] for model in models]
        if len({tuple(level.stride for level in each) for each in levels}) > 1:
            refuse('of', self.of, 'learners whose necks put out levels of the same strides')
        detector = build_detector(student)
        detector.backbone = FusionTrunk(self.of, models)
        detector.neck = FusionNeck([sum(level.channels for level in same) for same in zip(*levels)],
                                   [level.channels for level in levels[0]])
        self.learner, self.reads_learners = len(learners), (*self.of, len(learners))
        return detector


class FusionTrunk(nn.Module):
    """Stands for the backbone of a fused learner: it puts out what the necks of its sources do.

    Args:
        of: Indices of the sources among the learners.
        sources: The sources, which are no modules of it.

    Attributes:
        received: What their necks have put out in this step of the training.
    """

    def __init__(self, of: Sequence[int], sources: Sequence[Any]) -> None:
        super().__init__()
        self.of, self.sources, self.received = of, tuple(sources), None

    def forward(self, images: Tensor) -> list[Features]:
        if self.received is not None:
            return self.received
        with ExitStack() as stack:
            for source in self.sources:
                stack.enter_context(evaluating(getattr(source, 'student', source)))
            return [source.extract_feat(images) for source in self.sources]

    def init_weights(self) -> None:
        """It has none."""


class FusionNeck(nn.Module):
    """Fuses levels.

    Args:
        channels: Of all sources together, level by level.
        out_channels: Level by level.
    """

    def __init__(self, channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            DepthwiseSeparableConvModule(before, after, 3, padding=1, norm_cfg=dict(type='BN'), pw_act_cfg=None)
            for before, after in zip(channels, out_channels))

    def forward(self, necks: Sequence[Features]) -> Features:
        return tuple(fuse(torch.cat(same, 1)) for fuse, same in zip(self.levels, zip(*necks)))
