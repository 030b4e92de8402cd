"""One small head of each family, on features of three levels."""
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

CHANNELS, CLASSES = 8, 3
STRIDES = [8, 16, 32]
ANCHORS = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=2, ratios=[0.5, 1.0], strides=STRIDES)
ONE_ANCHOR = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=STRIDES)
DELTAS = dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2])
COMMON = dict(num_classes=CLASSES, in_channels=CHANNELS, feat_channels=CHANNELS, stacked_convs=1)
SIGMOID = dict(type='CrossEntropyLoss', use_sigmoid=True)
GROUPS = dict(type='GN', num_groups=2, requires_grad=True)
MAX_IOU = dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
               sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1, debug=False)
ATSS = dict(MAX_IOU, assigner=dict(type='ATSSAssigner', topk=9))

HEADS = dict(
    retina=dict(COMMON, type='RetinaHead', anchor_generator=ANCHORS, bbox_coder=DELTAS, train_cfg=MAX_IOU),
    retina_softmax=dict(COMMON, type='RetinaHead', anchor_generator=ANCHORS, bbox_coder=DELTAS, train_cfg=MAX_IOU,
                        loss_cls=dict(type='CrossEntropyLoss')),
    atss=dict(COMMON, type='ATSSHead', anchor_generator=ONE_ANCHOR, bbox_coder=DELTAS, train_cfg=ATSS, norm_cfg=GROUPS,
              loss_centerness=SIGMOID, loss_bbox=dict(type='GIoULoss')),
    gfl=dict(COMMON, type='GFLHead', anchor_generator=ONE_ANCHOR, train_cfg=ATSS, norm_cfg=GROUPS, reg_max=4,
             loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True), loss_bbox=dict(type='GIoULoss')),
    fcos=dict(COMMON, type='FCOSHead', strides=STRIDES, norm_cfg=GROUPS, regress_ranges=((-1, 64), (64, 128), (128, 1e8))),
    fcos_normalized=dict(COMMON, type='FCOSHead', strides=STRIDES, norm_cfg=GROUPS, norm_on_bbox=True,
                         regress_ranges=((-1, 64), (64, 128), (128, 1e8))),
    rtmdet=dict(COMMON, type='RTMDetHead', anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=STRIDES),
                bbox_coder=dict(type='DistancePointBBoxCoder'), with_objectness=False, norm_cfg=dict(type='BN'),
                loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True), loss_bbox=dict(type='GIoULoss'),
                train_cfg=dict(MAX_IOU, assigner=dict(type='DynamicSoftLabelAssigner', topk=13))),
    rtmdet_separate=dict(COMMON, type='RTMDetSepBNHead', anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=STRIDES),
                         bbox_coder=dict(type='DistancePointBBoxCoder'), with_objectness=True, exp_on_reg=True,
                         norm_cfg=dict(type='BN'), act_cfg=dict(type='SiLU'),
                         loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True), loss_bbox=dict(type='GIoULoss'),
                         train_cfg=dict(MAX_IOU, assigner=dict(type='DynamicSoftLabelAssigner', topk=13))),
    yolox=dict(COMMON, type='YOLOXHead', strides=STRIDES, train_cfg=dict(assigner=dict(type='SimOTAAssigner'))),
    rpn=dict(type='RPNHead', in_channels=CHANNELS, feat_channels=CHANNELS, num_classes=1, loss_cls=SIGMOID, train_cfg=MAX_IOU,
             anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0], strides=STRIDES), bbox_coder=DELTAS),
    ssd=dict(type='SSDHead', num_classes=CLASSES, in_channels=(CHANNELS, ) * 3, bbox_coder=DELTAS,
             anchor_generator=dict(type='SSDAnchorGenerator', input_size=64, min_sizes=[12, 24, 40], max_sizes=[24, 40, 60],
                                   strides=STRIDES, ratios=[[2], [2, 3], [2]]),
             train_cfg=dict(MAX_IOU, smoothl1_beta=1.0, neg_pos_ratio=3)),
    yolov3=dict(type='YOLOV3Head', num_classes=CLASSES, in_channels=[CHANNELS] * 3, out_channels=[CHANNELS] * 3,
                anchor_generator=dict(type='YOLOAnchorGenerator', strides=STRIDES, base_sizes=[[(10, 13), (16, 30)]] * 3),
                bbox_coder=dict(type='YOLOBBoxCoder'), featmap_strides=STRIDES,
                loss_cls=SIGMOID, loss_conf=SIGMOID, loss_xy=SIGMOID, loss_wh=dict(type='MSELoss'),
                train_cfg=dict(assigner=dict(type='GridAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0))),
)
HEADS = {name: ConfigDict({**config, 'test_cfg': dict(nms_pre=10**6, score_thr=0.0, conf_thr=-1.0, min_bbox_size=-1)})
         for name, config in HEADS.items()}


@pytest.fixture
def dense_head():
    """Makes a head by the name of its family, with weights drawn so that its outputs are not all alike."""

    def make(name: str, seed: int = 0, **changes) -> torch.nn.Module:
        torch.manual_seed(seed)
        head = MODELS.build({**HEADS[name], **changes})
        for parameter in head.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        return head

    return make


@pytest.fixture
def features():
    """Features of a batch of two images of 64 × 96 pixels."""

    def make(seed: int = 0) -> list:
        random = torch.Generator().manual_seed(seed)
        return [torch.randn(2, CHANNELS, 64 // stride, 96 // stride, generator=random).requires_grad_() for stride in STRIDES]

    return make
