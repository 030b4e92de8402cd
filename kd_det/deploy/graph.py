"""A detector as one graph of tensors, from an image to boxes, which exporters can trace.

MMDetection decodes image by image, with boolean indexing and Python's conditions, none of which survives tracing. Here
are the same steps on tensors of fixed length; what the heads put out is read by the readers that the terms use.
"""
from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.dense_heads import GFLHead, RPNHead, YOLOV3Head, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.dense_heads.detr_head import DETRHead
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from kd_det.config import ConfigurationError
from kd_det.heads.dense import DenseOutputs
from kd_det.heads.queries import predicts_queries, read_queries
from kd_det.heads.readers import find_reader, read_dense
from kd_det.heads.request import HeadError
from kd_det.heads.roi import find_stages
from kd_det.taps import Features
from kd_det.teachers.probe import find_input_channels

CHANNELS = ('rgb', 'bgr')
LOWEST = -1e4  # a logit whose sigmoid is 0
MOST_BOXES = 300  # to an image, where the config has no limit, as YOLOX'; COCO counts 100


class Candidates(NamedTuple):
    """What a head proposes for N images, before or after suppression, K to an image.

    Attributes:
        boxes: (N, K, 4) x1, y1, x2, y2 in pixels of the graph's input.
        scores: (N, K); 0 where there is no object.
        labels: (N, K) long.
    """
    boxes: Tensor
    scores: Tensor
    labels: Tensor


class DetectorGraph(nn.Module):
    """A detector from the image to its boxes, normalisation inside.

    Args:
        detector: A plain detector of MMDetection in eval mode; a copy is made.
        channels: The order of the image's channels, ``'rgb'`` or ``'bgr'``.
        suppress: End with non-maximum suppression; without it with the candidates for it. DETRs have none.
        fixed: Height and width are constants of the graph; more of it can then be computed in advance.

    Attributes:
        image_channels: How many the detector reads.

    Shape:
        - image: (N, image_channels, H, W), 0 to 255, of any numeric type.
        - boxes: (N, D, 4) x1, y1, x2, y2 in pixels of the image; scores: (N, D), falling, 0 where there is no object;
          labels: (N, D) long.

    Raises:
        ConfigurationError: Its outputs can not be decoded in a graph; the message names what can not.
    """

    def __init__(self, detector: nn.Module, channels: str = 'rgb', suppress: bool = True,
                 fixed: bool = True) -> None:
        super().__init__()
        self.detector: Any = copy.deepcopy(detector).eval()
        self.channels, self.suppress, self.fills = channels, suppress, not fixed
        preprocessor = self.detector.data_preprocessor
        check_graph(self.detector)
        self.image_channels = find_input_channels(self.detector)  # one mean may be of gray images, or of all colours
        self.flips = self.image_channels == 3 and (channels == 'rgb') == (not preprocessor._channel_conversion)
        self.divisor, self.padding = preprocessor.pad_size_divisor, preprocessor.pad_value
        for module in self.detector.modules():
            if isinstance(module, SingleRoIExtractor):
                module.forward = MethodType(extract_regions, module)
        self.eval()  # as exporters leave it

    def forward(self, image: Tensor) -> Candidates:
        height, width = image.shape[-2:] if self.fills else map(int, image.shape[-2:])
        features = self.detector.extract_feat(self.normalize(image))
        if hasattr(self.detector, 'roi_head'):
            found, config = self.detect_regions(features, height, width), self.detector.roi_head.test_cfg
        elif predicts_queries(type(self.detector.bbox_head)):
            return self.detect_queries(features, int(height), int(width))
        else:
            head = self.detector.bbox_head
            found, config = self.propose(head, features, height, width), head.test_cfg
        return suppress(found, config, self.fills) if self.suppress else found

    def propose(self, head: Any, features: Features, height: int, width: int) -> Candidates:
        """The (N, K) candidates of a dense head."""
        found = propose(head, read_dense(head, head(features)), self.fills)
        boxes = clip_boxes(getattr(head, 'bbox_coder', None), found.boxes, height, width)
        return drop_small(found._replace(boxes=boxes), head.test_cfg)

    def normalize(self, image: Tensor) -> Tensor:
        """Makes what the detector's own preprocessor would make of it, padded on the right and below."""
        preprocessor, image = self.detector.data_preprocessor, image.float()
        if self.flips:
            image = image.flip(1)
        if preprocessor._enable_normalize:
            image = (image - preprocessor.mean) / preprocessor.std
        height, width = image.shape[-2:] if self.fills else map(int, image.shape[-2:])
        if self.fills or height % self.divisor or width % self.divisor:
            image = F.pad(image, (0, -width % self.divisor, 0, -height % self.divisor), value=self.padding)
        return image

    def detect_regions(self, features: Features, height: int, width: int) -> Candidates:
        """What a two-stage detector finds: (N, P·K) candidates, K to each of P regions."""
        rpn, head = self.detector.rpn_head, self.detector.roi_head
        proposed = suppress(self.propose(rpn, features, height, width), rpn.test_cfg, self.fills)
        images, regions = proposed.scores.shape
        index = torch.arange(images, device=proposed.boxes.device, dtype=proposed.boxes.dtype)
        rois = torch.cat([index.view(-1, 1, 1).expand(-1, regions, 1), proposed.boxes], 2).flatten(0, 1)
        logits, stages = [], find_stages(head)
        for stage, box_head in enumerate(stages):
            which = (stage, ) if isinstance(head, CascadeRoIHead) else ()
            results = head._bbox_forward(*which, features, rois)
            logits.append(results['cls_score'].float())
            by_class = results['bbox_pred'].float().view(rois.shape[0], -1, 4)
            if stage < len(stages) - 1:
                label = logits[-1][:, :-1].argmax(1).clamp(max=by_class.shape[1] - 1)
                deltas = by_class.gather(1, label.view(-1, 1, 1).expand(-1, 1, 4)).squeeze(1)
                refined = box_head.bbox_coder.decode(rois[:, 1:], deltas)
                rois = torch.cat([rois[:, :1], clip_boxes(box_head.bbox_coder, refined, height, width)], 1)
        scores = (sum(logits) / len(logits)).softmax(1)[:, :-1]
        scores = torch.where(scores > head.test_cfg.score_thr, scores, scores.new_zeros(()))
        scores = scores.view(images, regions, -1) * (proposed.scores > 0).unsqueeze(2)
        classes, kinds = int(scores.shape[2]), int(by_class.shape[1])  # a class-agnostic head has one kind of boxes
        priors = rois[:, 1:].unsqueeze(1).repeat(1, kinds, 1).view(-1, 4)
        boxes = stages[-1].bbox_coder.decode(priors, by_class.reshape(-1, 4))
        boxes = clip_boxes(stages[-1].bbox_coder, boxes, height, width)
        boxes = boxes.view(-1, kinds, 4).expand(-1, classes, 4).reshape(images, -1, 4)
        labels = torch.arange(classes, device=scores.device).expand(images, regions, classes)
        return Candidates(boxes, scores.flatten(1), labels.flatten(1))

    def detect_queries(self, features: Features, height: int, width: int) -> Candidates:
        """What the last decoder layer of a DETR says, its strongest queries."""
        head, images = self.detector.bbox_head, features[0].shape[0]
        sample = DetDataSample(metainfo=dict(img_shape=(height, width), batch_input_shape=(height, width)))
        outputs = read_queries(head, *head(**self.detector.forward_transformer(features, [sample] * int(images))))
        logits, boxes = outputs.logits[-1], bbox_cxcywh_to_xyxy(outputs.boxes[-1])
        size = boxes.new_tensor([width, height, width, height])
        boxes = torch.minimum((boxes * size).clamp(min=0), size)
        most, classes = head.test_cfg.get('max_per_img', logits.shape[1]), outputs.num_classes
        if outputs.activation == 'sigmoid':
            scores, chosen = topk(logits.sigmoid().flatten(1), most)
            return Candidates(take(boxes, chosen // classes), scores, chosen % classes)
        best, labels = logits.softmax(-1)[..., :-1].max(-1)
        scores, chosen = topk(best, most)
        return Candidates(take(boxes, chosen), scores, labels.gather(1, chosen))


def check_graph(detector: Any) -> None:
    """Checks that a detector's outputs can be decoded in a graph.

    Raises:
        ConfigurationError: They can not; the message names what can not.
    """
    name = type(detector).__name__
    if hasattr(detector, 'language_model') or not isinstance(detector.data_preprocessor, DetDataPreprocessor):
        raise ConfigurationError(f'A {name} can not be exported: it reads more than an image.')
    roi_head, head = getattr(detector, 'roi_head', None), getattr(detector, 'bbox_head', None)
    try:
        if getattr(detector, 'test_branch_idx', 0) == -1:
            raise HeadError('with test_branch_idx=-1 each of its branches answers. Export one: --cfg-options '
                            'model.backbone.test_branch_idx=1 model.roi_head.test_branch_idx=1')
        if roi_head is not None:
            if not isinstance(roi_head, (StandardRoIHead, CascadeRoIHead)):
                raise HeadError(f'how a {type(roi_head).__name__} decodes is not known')
            for stage in find_stages(roi_head):
                if type(stage)._predict_by_feat_single is not BBoxHead._predict_by_feat_single:
                    raise HeadError(f'how a {type(stage).__name__} decodes is not known')
            if not hasattr(detector, 'rpn_head'):
                raise HeadError('it has a roi_head without rpn_head')
            for branch in ('semantic_head', 'glbctx_head'):
                if getattr(roi_head, branch, None) is not None:
                    raise HeadError(f"its roi_head has a '{branch}'")
            head = detector.rpn_head
            _check_suppression(roi_head.test_cfg)
        if head is None:
            raise HeadError('it has neither roi_head nor bbox_head')
        if predicts_queries(type(head)):
            if type(head)._predict_by_feat_single is not DETRHead._predict_by_feat_single:
                raise HeadError(f'how a {type(head).__name__} decodes is not known')
        else:
            _check_dense(head)
            _check_suppression(head.test_cfg)
    except HeadError as error:
        raise ConfigurationError(f'A {name} can not be exported: {str(error).rstrip(".")}.') from error


DECODED = {(kind.predict_by_feat, getattr(kind, '_predict_by_feat_single', None))
           for kind in (BaseDenseHead, GFLHead, RPNHead, YOLOXHead, YOLOV3Head)}


def _check_dense(head: Any) -> None:
    find_reader(type(head))
    kind = type(head)
    if (kind.predict_by_feat, getattr(kind, '_predict_by_feat_single', None)) not in DECODED:
        raise HeadError(f'how a {kind.__name__} decodes is not known')
    if getattr(head.loss_cls, 'custom_cls_channels', False):
        raise HeadError(f'a {type(head.loss_cls).__name__} has an activation of its own')


def _check_suppression(config: Mapping[str, Any] | None) -> None:
    settings = (config or {}).get('nms')
    if not settings:
        raise HeadError("test_cfg.nms: expected dict(type='nms', iou_threshold=0.6) or the like, got "
                        f"{'no test_cfg' if config is None else settings}")
    kind = settings.get('type', 'nms')
    if kind != 'nms':
        raise HeadError(f"test_cfg.nms.type: expected 'nms', got '{kind}', for which there is no operator")


def propose(head: Any, dense: DenseOutputs, fill: bool = False) -> Candidates:
    """The candidates of a dense head, as its own ``predict_by_feat`` chooses them; an RPN's labels are levels.

    Args:
        head: The head, whose ``test_cfg`` has ``nms_pre``, ``score_thr``, and of YOLOv3 ``conf_thr``.
        dense: Its outputs.
        fill: The number of priors is no constant.

    Returns:
        (N, K) candidates, those below the threshold with a score of 0, not clipped.
    """
    config, levels = head.test_cfg, range(len(dense.logits))
    if isinstance(head, YOLOXHead):  # each prior has its likeliest class, and none is left out
        scores, labels = torch.cat([dense.probabilities(level) for level in levels], 1).max(-1)
        scores = torch.where(scores >= config.score_thr, scores, scores.new_zeros(()))
        return Candidates(torch.cat(dense.boxes, 1), scores, labels)
    most, quality = config.get('nms_pre', -1), dense.objectness or dense.centerness
    ranks = [_rank_classes(dense, level, config.get('conf_thr', -1)) for level in levels]
    if isinstance(head, YOLOV3Head):  # of all levels together
        index, values, labels = _choose(torch.cat(ranks, 1), most, fill)
        boxes = take(torch.cat(dense.boxes, 1), index)
        quality = (torch.cat(dense.objectness or (), 1).gather(1, index), )
    else:
        chosen, by_level, by_class = zip(*(_choose(each, most, fill) for each in ranks))
        if isinstance(head, RPNHead):
            by_class = tuple(torch.full_like(each, level) for level, each in enumerate(by_class))
        values, labels, boxes = torch.cat(by_level, 1), torch.cat(by_class, 1), torch.cat(dense.decode(chosen), 1)
        quality = quality and tuple(each.gather(1, index) for each, index in zip(quality, chosen))
    scores = values.sigmoid() if dense.activation == 'sigmoid' else values.clamp(min=0)
    if not isinstance(head, RPNHead):
        scores = torch.where(scores > config.get('score_thr', 0), scores, scores.new_zeros(()))
    return Candidates(boxes, scores * torch.cat(quality, 1).sigmoid() if quality else scores, labels)


def _rank_classes(dense: DenseOutputs, level: int, sure: float) -> Tensor:
    """(N, H·W·A, K) by which candidates are ranked: logits, which fall as their sigmoids do, or a softmax' shares."""
    logits = dense.logits[level]
    if dense.activation != 'sigmoid':
        return logits.softmax(-1)[..., :-1]
    if dense.objectness is not None and sure > 0:
        unsure = dense.objectness[level].sigmoid() < sure
        logits = logits.masked_fill(unsure.unsqueeze(-1), LOWEST)
    return logits


def _choose(ranks: Tensor, most: int, fill: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The highest of (N, P, K) ranks: (N, k) indices of the P priors, the ranks, and the classes.

    A class that is among the highest belongs to a prior that is among the best, so that two small sorts do for one.
    """
    classes = ranks.shape[-1]
    if most <= 0:
        index = torch.arange(ranks.shape[1] * classes, device=ranks.device).expand(ranks.shape[0], -1)
        return index // classes, ranks.flatten(1), index % classes
    best, priors = topk(ranks.amax(-1), most, fill)
    ranks = take(ranks, priors)
    if fill:
        ranks = ranks.masked_fill(best.unsqueeze(-1) <= LOWEST, LOWEST)
    values, index = topk(ranks.flatten(1), most)
    return priors.gather(1, index // classes), values, index % classes


def topk(values: Tensor, most: int, fill: bool = False) -> tuple[Tensor, Tensor]:
    """The highest of (N, n) values in falling order, and their indices: at most ``most``, or all if that is below 1.

    Args:
        values: (N, n).
        most: A constant of the graph.
        fill: Where n is no constant and may be less, :data:`LOWEST` fills up.
    """
    if fill and most > 0:
        found, index = F.pad(values, (0, most), value=LOWEST).topk(most)
        return found, index.clamp(max=values.shape[1] - 1)
    return values.topk(min(most, int(values.shape[1])) if most > 0 else int(values.shape[1]))


def take(rows: Tensor, index: Tensor) -> Tensor:
    """(N, k, …) of the (N, n, …) rows at (N, k) indices."""
    return rows.gather(1, index.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def clip_boxes(coder: Any, boxes: Tensor, height: Any, width: Any) -> Tensor:
    """(…, 4) boxes within the image, if their coder clips."""
    if not getattr(coder, 'clip_border', False):
        return boxes
    limit = torch.stack([torch.as_tensor(each, device=boxes.device) for each in (width, height)] * 2).to(boxes)
    return torch.minimum(boxes.clamp(min=0), limit)


def drop_small(found: Candidates, config: Mapping[str, Any]) -> Candidates:
    """Gives boxes that are not larger than ``min_bbox_size`` the score 0."""
    least = config.get('min_bbox_size', -1)
    if least < 0:
        return found
    large = (found.boxes[..., 2:] - found.boxes[..., :2] > least).all(-1)
    return found._replace(scores=found.scores * large)


def suppress(found: Candidates, config: Mapping[str, Any], fill: bool = False) -> Candidates:
    """Non-maximum suppression class by class, at once: boxes of different classes are moved apart.

    Args:
        found: (N, K) candidates.
        config: The head's ``test_cfg``: ``nms`` and ``max_per_img``.
        fill: K is no constant.

    Returns:
        (N, D) boxes, D of at most ``max_per_img``; what lacks has box 0, score 0 and label -1.
    """
    settings, most = config['nms'], config.get('max_per_img', -1)
    most = most if most > 0 else MOST_BOXES
    boxes = torch.where(found.scores.unsqueeze(-1) > 0, found.boxes, found.boxes.new_zeros(()))
    apart = boxes
    if not settings.get('class_agnostic', False):
        apart = boxes + (found.labels * (boxes.amax() + 1)).unsqueeze(-1)
    threshold = settings['iou_threshold'] if 'iou_threshold' in settings else settings['iou_thr']
    kept = Suppression.apply(apart, found.scores, float(threshold), most)
    scores, index = topk(kept, most, fill)
    lacks = scores <= 0
    return Candidates(take(boxes, index).masked_fill(lacks.unsqueeze(-1), 0), scores.clamp(min=0),
                      found.labels.gather(1, index).masked_fill(lacks, -1))


class Suppression(torch.autograd.Function):
    """(N, K) scores, 0 where greedy suppression among (N, K, 4) boxes removes one, or where there are enough.

    ONNX has an operator for the whole batch, which torchvision's, of one image, is not exported to.
    """

    @staticmethod
    def forward(context: Any, boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
        kept = torch.zeros_like(scores)
        for image, (of_image, scores_of_image) in enumerate(zip(boxes, scores)):
            real = (scores_of_image > 0).nonzero().squeeze(1)
            index = real[nms(of_image[real], scores_of_image[real], threshold)[:most]]
            kept[image, index] = scores_of_image[index]
        return kept

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, threshold: float, most: int) -> Any:
        def constant(value: Any, dtype: torch.dtype) -> Any:
            return g.op('Constant', value_t=torch.tensor(value, dtype=dtype))

        one = constant([1], torch.int64)
        found = g.op('NonMaxSuppression', boxes, g.op('Unsqueeze', scores, one),
                     constant([most], torch.int64), constant([threshold], torch.float32),
                     constant([0.], torch.float32))  # rows of image, 0, box
        index = g.op('Gather', found, constant([0, 2], torch.int64), axis_i=1)
        kept = g.op('GatherND', scores, index)
        return g.op('ScatterND', g.op('Mul', scores, constant(0., torch.float32)), index, kept).setType(scores.type())


def extract_regions(self: SingleRoIExtractor, feats: Features, rois: Tensor, roi_scale_factor: float | None = None
                    ) -> Tensor:
    """What a ``SingleRoIExtractor`` computes, without its condition on the number of regions of a level.

    Args:
        self: The extractor.
        feats: (N, C, H, W) per level.
        rois: (R, 5) index of the image and x1, y1, x2, y2.
        roi_scale_factor: See there.

    Returns:
        (R, C, height, width).
    """
    rois = rois.type_as(feats[0])
    levels = self.map_roi_levels(rois, len(feats))
    if roi_scale_factor is not None:
        rois = self.roi_rescale(rois, roi_scale_factor)
    rows = [(levels == level).nonzero().squeeze(1) for level in range(len(feats))]
    found = [roi_align(level, rois[index], layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned)
             for level, layer, index in zip(feats, self.roi_layers, rows)]
    order = torch.cat(rows)
    places = torch.zeros_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
    return torch.cat(found)[places]
