"""What several heads say together: their maps, regions and outputs joined in a weighted mean, where they agree."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any

from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmengine.structures import InstanceData
from torch import Tensor

from kd_det.config.arguments import ArgumentError
from kd_det.heads import ROI_HEAD, DenseOutputs, HeadError, QueryOutputs, RoIOutputs
from kd_det.heads.queries import join_queries, predicts_queries
from kd_det.heads.roi import find_stages
from kd_det.taps import Features


def select_images(maps: Any, rows: Sequence[int]) -> Any:
    """Selects images of a batch from what a dense head put out, or of an RPN's proposals."""
    if isinstance(maps[0], InstanceData):
        return [maps[row] for row in rows]
    return tuple([level[rows] for level in kind] for kind in maps)


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

    def forward(*arguments: Any, **named: Any) -> dict[str, Tensor]:
        given = signature(forwards[0]).bind(*arguments, **named).arguments
        answers = [forward(**{**given, 'x': neck}) for forward, neck in zip(forwards, necks)]
        weights = shares[given['rois'][:, 0].long()].unbind(1)
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
        HeadError: They are of other priors, classes or stages.
    """
    if isinstance(outputs[0], DenseOutputs):
        return join_dense(outputs, shares)
    if isinstance(outputs[0], QueryOutputs):
        return join_queries(outputs, shares)
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


def check_alike(models: Sequence[Any], learn: bool = False) -> None:
    """Checks that the heads of detectors say the same of the same places, or predict queries, which can be paired.

    Args:
        models: The detectors.
        learn: Whether they learn from a loss of their joint prediction too, which queries have not.

    Raises:
        ArgumentError: Some are of another kind, or have other priors or classes.
    """
    forms = [_describe_heads(model) for model in models]
    for index, form in enumerate(forms):
        if form != forms[0]:
            differ = next(name for name in {**form, **forms[0]} if form.get(name) != forms[0].get(name))
            raise ArgumentError('of', f'the members can not be joined: {differ} of the first is '
                                      f'{forms[0].get(differ)}, of member {index} {form.get(differ)}.')
    parameters = [tuple(signature(model.roi_head._bbox_forward).parameters) for model in models
                  if hasattr(model, ROI_HEAD)]
    if any(each not in (('x', 'rois'), ('stage', 'x', 'rois')) for each in parameters):
        raise ArgumentError('of', f"the regions of a {forms[0]['the RoI head']} can not be joined, which are read with "
                                  'more than features. Take a guide for each member.')
    if learn and any(predicts_queries(type(getattr(model, 'bbox_head', None))) for model in models):
        raise ArgumentError('of', 'the members predict queries, of which a joint prediction has neither a loss nor '
                                  "a gate: weights='mean' or numbers, without loss_weight.")


def _describe_heads(model: Any) -> dict[str, Any]:
    """What has to be the same in two detectors whose outputs are joined."""
    if hasattr(model, ROI_HEAD):
        stages = find_stages(model.roi_head)
        return {'the RoI head': type(model.roi_head).__name__, 'the number of stages': len(stages),
                'the number of classes': stages[0].num_classes, 'the box coder': list(map(_describe_coder, stages)),
                'reg_class_agnostic': [stage.reg_class_agnostic for stage in stages]}
    head = getattr(model, 'bbox_head', None)
    if predicts_queries(type(head)):
        return {'the head': 'of queries', 'the number of classes': head.num_classes,
                'the activation': 'sigmoid' if head.loss_cls.use_sigmoid else 'softmax'}
    if not isinstance(head, BaseDenseHead):
        return {}
    form = {'the head': type(head).__name__, 'the number of classes': getattr(head, 'cls_out_channels', None),
            'the box coder': _describe_coder(head),
            **{name: getattr(head, name) for name in ('reg_max', 'norm_on_bbox') if hasattr(head, name)}}
    if hasattr(head, 'prior_generator'):
        priors = head.prior_generator
        form['the priors'] = (type(priors).__name__, tuple(priors.strides), tuple(priors.num_base_priors),
                              *(str(getattr(priors, name, None)) for name in ('base_anchors', 'offset')))
    return form


def _describe_coder(head: Any) -> str:
    """The units of a head's regressions."""
    coder = getattr(head, 'bbox_coder', None)
    settings = {name: value for name, value in vars(coder).items() if name in ('means', 'stds')} if coder else ''
    return f'{type(coder).__name__} {settings}'.strip()


@contextmanager
def without_masks(roi_head: Any) -> Iterator[None]:
    """Within, a RoI head learns no masks: those of the regions that members say together are nobody's."""
    own = roi_head._modules.get('mask_head')
    if own is not None:
        roi_head._modules['mask_head'] = None
    try:
        yield
    finally:
        if own is not None:
            roi_head._modules['mask_head'] = own


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
