"""Guides made of several others: their mean or gated prediction, and a learner of their fused features."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from mmcv.cnn import DepthwiseSeparableConvModule
from mmdet.registry import MODELS
from mmengine.dist import all_reduce, get_world_size
from torch import Tensor, nn

from kd_det.compat.process import reseed
from kd_det.config.arguments import ArgumentError, Index, at, declared, refuse
from kd_det.heads import ROI_HEAD, HeadError, HeadRequest, StudentOutputs, TeacherOutputs
from kd_det.heads.decoders import evaluating
from kd_det.heads.queries import predicts_queries
from kd_det.registry import build_detector
from kd_det.taps import Features, Taps
from kd_det.teachers.guide import Guide, GuideForm, LearnerStep, Reading, ReadLevels, Shape, build_guide
from kd_det.teachers.joining import (
    check_alike,
    copy_proposals,
    join_maps,
    join_outputs,
    joined_regions,
    replaced,
    select_images,
    without_masks,
)
from kd_det.teachers.peers import Peer
from kd_det.teachers.probe import probe_levels
from kd_det.teachers.teacher import FrozenDetector, Teacher

NECK = 'neck'
Weights = Literal['mean', 'gate'] | Annotated[Sequence[float], MinLen(2)]


@MODELS.register_module()
class Ensemble(Guide):
    """What several guides say together: the weighted mean of their logits and regressions, prior by prior.

    Their heads have to be of one kind with the same priors; of RoI heads each says what it makes of the regions that
    the learner sampled who learns from it; the queries of DETRs are paired with the first's, see
    :func:`~kd_det.teachers.joining.join_queries`. Boxes are the mean of the members' boxes.

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
                if not self.members[-1].offers_heads or isinstance(self.members[-1], (Ensemble, Fusion)):
                    refuse('type', config['type'], 'a guide that predicts, and is made of no others',
                           "A Fusion's learner is dict(type='Peer', learner=…) with the index after model.peers.")
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
        own_labels = {each.has_student_labels for each in self.members}
        self.has_student_labels, self.mixes_labels = own_labels == {True}, len(own_labels) > 1
        self._shares: Tensor | None = None  # of the present step, (N, members)

    def check(self, reading: Reading) -> None:
        super().check(reading)
        for member in self.members:
            member.check(reading)
        asked = [request for request in map(HeadRequest.parse, reading.heads) if request.part in ('towers', 'decoder')]
        if asked:
            raise HeadError(f"it reads '{asked[0]}', of which there is no mean: only what is predicted of priors, "
                            'regions and queries can be joined. Take a term for each member.')

    def probe(self, reading: Reading, learners: Sequence[nn.Module], levels: Sequence[Mapping[str, Any]]) -> GuideForm:
        models = [learners[member.learner] for member in self.members if isinstance(member, Peer)]
        check_alike(models, self.learns)
        forms = [member.probe(reading, learners, levels) for member in self.members]
        if self.gated:
            trunk = getattr(learners[0], NECK, None)
            shared = all(getattr(model.neck, 'part', None) is trunk for model in models[1:] if trunk is not None)
            if models[0] is not learners[0] or trunk is None or not shared:
                raise ArgumentError('weights', "a gate is given what all members share: set "
                                    "model.share=('backbone', 'neck'), and let the first member be the student.")
            self.module = Gate(levels[0][NECK][0].channels, len(models))
        return GuideForm({}, forms[0].heads)

    def start(self, reading: Reading, learners: Sequence[nn.Module]) -> Guide:
        for index, member in enumerate(self.members):
            with at(f'of[{index}]'):
                self.members[index] = member.start(reading, learners)
            reseed()  # a random one leaves the generator as it was
        check_alike([learners[member.learner] if isinstance(member, Peer) else member.model for member in self.members
                     if isinstance(member, (Peer, Teacher))])
        self.weights = self.weights.to(next(learners[0].parameters()).device)
        told = [each for each in self.members if not each.has_student_labels]
        named = list(dict.fromkeys(tuple(each.classes) for each in told if each.classes is not None))
        if len(named) > 1:
            raise ArgumentError('of', f'the members can not be joined: their classes are {", ".join(named[0])}, and '
                                      f'{", ".join(named[1])}, label by label. Take a guide for each member.')
        self.classes, self.num_classes = named[0] if named else None, told[0].num_classes if told else None
        self.num_parameters = 0 if self.module is None else sum(each.numel() for each in self.module.parameters())
        return self

    def find_shares(self, features: dict[str, Features], images: int) -> Tensor:
        """(N, members): how much each counts in each image."""
        if self.module is None:
            return self.weights.expand(images, -1)
        return self.module(features[NECK])

    def learn(self, learners: Sequence[LearnerStep]) -> dict[str, Any]:
        steps = [learners[member.learner] for member in self.members if isinstance(member, Peer)]
        first, maps, samples = steps[0].model, [step.maps for step in steps], steps[0].samples
        shares = self.find_shares(steps[0].features, len(samples))
        self._shares = shares.detach()
        neck, rows = steps[0].neck, [row for row, labelled in enumerate(steps[0].labelled) if labelled]
        idle = not rows  # every weight has a gradient, if of 0
        if rows and len(rows) < len(samples):  # what unlabelled images show is not known
            samples, shares, neck = [samples[row] for row in rows], shares[rows], tuple(level[rows] for level in neck)
            maps = [select_images(each, rows) for each in maps]
        if hasattr(first, ROI_HEAD):
            necks = [tuple(level[rows] for level in step.neck) if samples is not step.samples else step.neck
                     for step in steps]
            with joined_regions([step.model for step in steps], necks, shares), without_masks(first.roi_head):
                losses = first.roi_head.loss(neck, [copy_proposals(each) for each in maps[0]], samples)
        else:
            with replaced(first.bbox_head, 'forward', lambda *_: join_maps(maps, shares)):
                losses = first.bbox_head.loss(neck, samples)
        weight = 0.0 if idle else self.loss_weight
        return {name: value if 'loss' not in name else
                [weight * each for each in value] if isinstance(value, list) else weight * value
                for name, value in losses.items()}

    def observe(self, images: Tensor, image_shapes: Sequence[Shape], heads: Sequence[str] = (),
                student: StudentOutputs | None = None, taps: Sequence[str] | None = None,
                levels: ReadLevels | None = None,
                learners: Sequence[LearnerStep] = ()) -> tuple[dict[str, Features], TeacherOutputs]:
        heads = tuple(map(str, heads))  # all kinds of outputs, which are joined together
        answers = [member.observe(images, image_shapes, heads, student, (), None, learners)[1]
                   for member in self.members]
        shares = self.weights.expand(len(images), -1) if self._shares is None else self._shares
        return {}, {request: join_outputs([each[request] for each in answers], shares) for request in answers[0]}

    def after_step(self) -> None:
        for member in self.members:
            member.after_step()

    def fingerprint(self) -> str:
        return ' '.join(member.fingerprint() for member in self.members)

    def state_dict(self) -> dict[str, Any]:
        own = {} if self.module is None else {f'gate.{name}': value for name, value in self.module.state_dict().items()}
        return OrderedDict(own, **{f'of.{index}.{name}': value for index, member in enumerate(self.members)
                                   if not isinstance(member, Teacher) or member.has_student_labels
                                   for name, value in member.state_dict().items()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.module is not None:
            self.module.load_state_dict(_select(state, 'gate.'))
        for index, member in enumerate(self.members):
            own = _select(state, f'of.{index}.')
            if own:
                member.load_state_dict(own)

    def _apply(self, function: Callable[[Tensor], Tensor]) -> Ensemble:
        self.weights = function(self.weights)
        for member in self.members:
            member._apply(function)
        return self

    def make_predictor(self, learners: Sequence[Any]) -> Callable[..., Any] | None:
        """Predicts as the first member would whose head says what all say together."""
        members = [learners[member.learner] for member in self.members] if self.of_learners else []
        if not members or any(predicts_queries(type(getattr(each.student, 'bbox_head', None))) for each in members):
            return None

        def predict(inputs: Tensor, data_samples: list, mode: str = 'predict', **options: Any) -> Any:
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
                return (first.predict(inputs, data_samples, **options) if mode == 'predict'
                        else first(inputs, data_samples, mode=mode))

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
        """(N, members) from levels of (N, C, H, W), without autocast."""
        with torch.autocast(levels[0].device.type, enabled=False):
            pooled = torch.stack([level.to(self.linear.weight).mean((2, 3)) for level in levels]).mean(0)
            scores, norm = self.linear(pooled), self.norm
            if self.training and get_world_size() > 1:
                scores = normalize_over_ranks(scores, norm)
            elif self.training and len(scores) == 1:  # an image by itself has no spread
                scores = F.batch_norm(scores, norm.running_mean, norm.running_var, norm.weight, norm.bias,
                                      eps=norm.eps)
            else:
                scores = norm(scores)
            return scores.relu().softmax(1)


class SumOverRanks(torch.autograd.Function):
    """The sum of the values of all ranks, with its gradient to each of them."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        total = values.clone()
        all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return SumOverRanks.apply(gradient)


def normalize_over_ranks(scores: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Batch normalisation by the images of all ranks, which are few on each: of two, scores would be −1 and 1.

    PyTorch's ``SyncBatchNorm`` runs on GPUs alone.

    Args:
        scores: (N, members), those of this rank.
        norm: Whose weights, and running statistics, which follow.
    """
    images = scores.new_full((1, ), len(scores))
    all_reduce(images)
    mean = SumOverRanks.apply(scores.sum(0)) / images
    variance = SumOverRanks.apply((scores - mean).square().sum(0)) / images
    with torch.no_grad():
        norm.running_mean.lerp_(mean.detach(), norm.momentum)
        norm.running_var.lerp_(variance.detach() * images / (images - 1), norm.momentum)
        norm.num_batches_tracked += 1
    return (scores - mean) * (variance + norm.eps).rsqrt() * norm.weight + norm.bias


def _select(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


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

    @contextmanager
    def receiving(self, steps: Sequence[LearnerStep]) -> Iterator[None]:
        """Within, it puts out what the learners' necks have put out in these steps."""
        self.received = [steps[index].neck for index in self.of]
        try:
            yield
        finally:
            self.received = None

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
        joined = [torch.cat(same, 1) for same in zip(*necks)]
        return tuple(self._fuse(fuse, level) for fuse, level in zip(self.levels, joined))

    def _fuse(self, fuse: nn.Module, level: Tensor) -> Tensor:
        if not self.training or level.numel() > level.shape[1]:
            return fuse(level)
        with evaluating(fuse):  # a cell by itself has no spread
            return fuse(level)
