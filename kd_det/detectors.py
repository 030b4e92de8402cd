"""What kind a detector is, told by its heads, and the kinds that the methods are tried on."""
from __future__ import annotations

from typing import Dict, Type

from mmdet.models.dense_heads import (ATSSHead, ConditionalDETRHead, DABDETRHead, DeformableDETRHead, DETRHead,
                                      DINOHead, FCOSHead, GFLHead, RetinaHead, RPNHead, RTMDetSepBNHead, SSDHead,
                                      YOLOV3Head, YOLOXHead)
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.registry import MODELS
from torch import nn

from kd_det.configuration import ConfigurationError
from kd_det.heads.requirements import HEADS

HeadClasses = Dict[str, Type[nn.Module]]  # by their name in the detector

# Published weights differ between these families of heads.
FAMILIES = ('two_stage', 'one_stage', 'anchor_free', 'detr')
ANCHOR_FREE_HEADS = ('AnchorFreeHead', 'YOLOXHead', 'CenterNetHead')

# Each is in tests/matrix, with every method that serves it.
DETECTORS: Dict[str, HeadClasses] = {
    'RetinaNet': dict(bbox_head=RetinaHead),
    'ATSS': dict(bbox_head=ATSSHead),
    'GFL': dict(bbox_head=GFLHead),
    'FCOS': dict(bbox_head=FCOSHead),
    'RTMDet': dict(bbox_head=RTMDetSepBNHead),
    'YOLOX': dict(bbox_head=YOLOXHead),
    'SSD': dict(bbox_head=SSDHead),
    'YOLOv3': dict(bbox_head=YOLOV3Head),
    'Faster R-CNN': dict(rpn_head=RPNHead, roi_head=StandardRoIHead),
    'Cascade R-CNN': dict(rpn_head=RPNHead, roi_head=CascadeRoIHead),
    'Mask R-CNN': dict(rpn_head=RPNHead, roi_head=StandardRoIHead),
    'DETR': dict(bbox_head=DETRHead),
    'Conditional DETR': dict(bbox_head=ConditionalDETRHead),
    'DAB-DETR': dict(bbox_head=DABDETRHead),
    'Deformable DETR': dict(bbox_head=DeformableDETRHead),
    'DINO': dict(bbox_head=DINOHead)}


def head_classes(model: dict) -> HeadClasses:
    """The classes of a detector's heads, from its model dict.

    Raises:
        ConfigurationError: One is in no registry.
    """
    classes = {}
    for name in HEADS:
        head = model.get(name)
        if head:
            with MODELS.switch_scope_and_registry(head.get('_scope_')) as registry:
                classes[name] = registry.get(head['type']) if isinstance(head['type'], str) else head['type']
            if classes[name] is None:
                raise ConfigurationError(f"model.{name}: there is no '{head['type']}' among MMDetection's models. "
                                         'If it is your own, import it with custom_imports.')
    return classes


def has_one_level(heads: HeadClasses) -> bool:
    """Whether a detector has features of one level alone, as the DETRs without deformable attention."""
    head = heads.get('bbox_head', nn.Module)
    return issubclass(head, (DETRHead, ConditionalDETRHead, DABDETRHead)) and not issubclass(head, DeformableDETRHead)


def family_of(detector: str, heads: HeadClasses) -> str:
    """Tells to which of :data:`FAMILIES` a detector belongs.

    Args:
        detector: Its type, for the message.
        heads: See :func:`head_classes`.

    Raises:
        ConfigurationError: It has neither a RoI head nor a dense head.
    """
    if 'roi_head' in heads:
        return 'two_stage'
    if 'bbox_head' not in heads:
        raise ConfigurationError(f'A {detector} has neither roi_head nor bbox_head: its family is not known. '
                                 f"Choose the weights yourself with --family {{{','.join(FAMILIES)}}}.")
    if issubclass(heads['bbox_head'], DETRHead):
        return 'detr'
    ancestors = {ancestor.__name__ for ancestor in heads['bbox_head'].__mro__}
    return 'anchor_free' if ancestors.intersection(ANCHOR_FREE_HEADS) else 'one_stage'
