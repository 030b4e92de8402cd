"""Small detectors, batches and runners that all tests share."""
import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import kd_det  # noqa: F401  isort:skip  first: it serves the operators that mmdet imports
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed

from kd_det.context import DistillContext

torch.set_num_threads(1)
TRAIN_EACH = Path(__file__).with_name('train_each.py')
LOOPBACK = next(name for _, name in socket.if_nameindex() if name.startswith('lo'))

# Few examples, the same in every run, and none made simpler, which takes minutes. For many, others in every run:
# pytest --hypothesis-profile=long tests/contracts
settings.register_profile('suite', max_examples=5, derandomize=True, deadline=None, database=None,
                          phases=[Phase.explicit, Phase.generate],
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.register_profile('long', settings.get_profile('suite'), max_examples=200, derandomize=False,
                          phases=list(Phase))
settings.load_profile('suite')

GOLDENS = Path(__file__).parent / 'goldens'


@pytest.fixture(autouse=True)
def mmdet_scope():
    """As the Runner does for a config: type names are MMDetection's, whatever scope an earlier test left behind."""
    register_all_modules(init_default_scope=False)
    init_default_scope('mmdet')


@pytest.fixture(autouse=True)
def seeded():
    """The same weights and inputs at every run, whatever tests ran before; ``KD_DET_TEST_SEED=1`` draws others."""
    set_random_seed(int(os.environ.get('KD_DET_TEST_SEED', 0)))


PREPROCESSOR = dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
                    bgr_to_rgb=True, pad_size_divisor=32)


def _backbone(depth: int, width: int) -> dict:
    return dict(type='ResNet', depth=depth, base_channels=width, stem_channels=width, num_stages=4,
                out_indices=(0, 1, 2, 3), norm_cfg=dict(type='BN'), norm_eval=False, style='pytorch')


def _stage_channels(depth: int, width: int) -> list:
    return [width * 2**stage * (4 if depth >= 50 else 1) for stage in range(4)]


DENSE = {'RetinaNet': 'retina', 'ATSS': 'atss', 'GFL': 'gfl', 'FCOS': 'fcos_normalized', 'RTMDet': 'rtmdet_separate',
         'YOLOX': 'yolox', 'SSD': 'ssd', 'YOLOv3': 'yolov3'}
DETRS = {'DETR': 'DETR', 'Conditional DETR': 'ConditionalDETR', 'DAB-DETR': 'DABDETR',
         'Deformable DETR': 'DeformableDETR', 'DINO': 'DINO'}


@pytest.fixture
def golden():
    """Loads ``tests/goldens/<name>.npz``: its tensors, its ``meta``, and its module parameters as ``params``."""

    def load(name: str) -> SimpleNamespace:
        with np.load(GOLDENS / f'{name}.npz') as file:
            tensors = {key: torch.from_numpy(file[key]) for key in file.files if key != 'meta'}
            meta = json.loads(str(file['meta']))
        params = {key[len('param:'):]: tensors.pop(key) for key in list(tensors) if key.startswith('param:')}
        return SimpleNamespace(meta=meta, params=params, **tensors)

    return load


@pytest.fixture(scope='session')
def retinanet():
    """Makes the model dict of a RetinaNet of a few thousand weights."""

    def make(depth: int = 18, width: int = 4, neck: int = 8, classes: int = 3, levels: int = 5, **changes) -> dict:
        return ConfigDict(
            type='RetinaNet', data_preprocessor=PREPROCESSOR, backbone=_backbone(depth, width),
            neck=dict(type='FPN', in_channels=_stage_channels(depth, width), out_channels=neck, start_level=1,
                      add_extra_convs='on_input', num_outs=levels),
            bbox_head=dict(
                type='RetinaHead', num_classes=classes, in_channels=neck, stacked_convs=1, feat_channels=neck,
                anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0],
                                      strides=[8 * 2**level for level in range(levels)]),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2])),
            train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0,
                                         ignore_iof_thr=-1),
                           sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1, debug=False),
            test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.001, nms=dict(type='nms', iou_threshold=0.5),
                          max_per_img=20),
            **changes)

    return make


@pytest.fixture
def faster_rcnn():
    """Makes the model dict of a Faster R-CNN of a few thousand weights."""

    def make(depth: int = 18, width: int = 4, neck: int = 8, classes: int = 3, **changes) -> dict:
        sampler = dict(type='RandomSampler', num=16, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True)
        assigner = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3,
                        match_low_quality=True, ignore_iof_thr=-1)
        proposals = dict(nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7), min_bbox_size=0)
        return ConfigDict(
            type='FasterRCNN', data_preprocessor=PREPROCESSOR, backbone=_backbone(depth, width),
            neck=dict(type='FPN', in_channels=_stage_channels(depth, width), out_channels=neck, num_outs=5),
            rpn_head=dict(
                type='RPNHead', in_channels=neck, feat_channels=neck,
                anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0],
                                      strides=[4, 8, 16, 32, 64]),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True), loss_bbox=dict(type='L1Loss')),
            roi_head=dict(
                type='StandardRoIHead',
                bbox_roi_extractor=dict(type='SingleRoIExtractor',
                                        roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=0),
                                        out_channels=neck, featmap_strides=[4, 8, 16, 32]),
                bbox_head=dict(type='Shared2FCBBoxHead', in_channels=neck, fc_out_channels=16, roi_feat_size=3,
                               num_classes=classes,
                               bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
                               reg_class_agnostic=False, loss_cls=dict(type='CrossEntropyLoss'),
                               loss_bbox=dict(type='L1Loss'))),
            train_cfg=dict(
                rpn=dict(assigner=assigner, sampler=dict(sampler, add_gt_as_proposals=False), allowed_border=-1,
                         pos_weight=-1, debug=False),
                rpn_proposal=proposals,
                rcnn=dict(assigner=assigner, sampler=sampler, pos_weight=-1, debug=False)),
            test_cfg=dict(rpn=proposals,
                          rcnn=dict(score_thr=0.001, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20)),
            **changes)

    return make


@pytest.fixture
def dense_head_config():
    """Makes the dict of one small head of a family, for features of strides 8, 16 and 32."""

    strides = [8, 16, 32]
    sigmoid, groups = dict(type='CrossEntropyLoss', use_sigmoid=True), dict(type='GN', num_groups=2, requires_grad=True)
    deltas, distances = (dict(type='DeltaXYWHBBoxCoder', target_stds=[0.1, 0.1, 0.2, 0.2]),
                         dict(type='DistancePointBBoxCoder'))
    points = dict(type='MlvlPointGenerator', offset=0, strides=strides)
    anchors = dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=2, ratios=[0.5, 1.0], strides=strides)
    one_anchor = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=strides)
    quality = dict(loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True), loss_bbox=dict(type='GIoULoss'))
    max_iou = dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0,
                                 ignore_iof_thr=-1),
                   sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1, debug=False)
    atss, soft = (dict(max_iou, assigner=dict(type=kind, topk=9))
                  for kind in ('ATSSAssigner', 'DynamicSoftLabelAssigner'))
    ranges = ((-1, 64), (64, 128), (128, 1e8))

    def make(family: str, channels: int = 8, classes: int = 3, **changes) -> dict:
        common = dict(num_classes=classes, in_channels=channels, feat_channels=channels, stacked_convs=1)
        configs = dict(
            retina=dict(common, type='RetinaHead', anchor_generator=anchors, bbox_coder=deltas, train_cfg=max_iou),
            retina_softmax=dict(common, type='RetinaHead', anchor_generator=anchors, bbox_coder=deltas,
                                train_cfg=max_iou, loss_cls=dict(type='CrossEntropyLoss')),
            atss=dict(common, type='ATSSHead', anchor_generator=one_anchor, bbox_coder=deltas, train_cfg=atss,
                      norm_cfg=groups, loss_centerness=sigmoid, loss_bbox=dict(type='GIoULoss')),
            gfl=dict(common, type='GFLHead', anchor_generator=one_anchor, train_cfg=atss, norm_cfg=groups, reg_max=4,
                     **quality),
            fcos=dict(common, type='FCOSHead', strides=strides, norm_cfg=groups, regress_ranges=ranges),
            fcos_normalized=dict(common, type='FCOSHead', strides=strides, norm_cfg=groups, norm_on_bbox=True,
                                 regress_ranges=ranges),
            rtmdet=dict(common, type='RTMDetHead', anchor_generator=points, bbox_coder=distances, with_objectness=False,
                        norm_cfg=dict(type='BN'), train_cfg=soft, **quality),
            rtmdet_separate=dict(common, type='RTMDetSepBNHead', anchor_generator=points, bbox_coder=distances,
                                 with_objectness=True, exp_on_reg=True, norm_cfg=dict(type='BN'),
                                 act_cfg=dict(type='SiLU'), train_cfg=soft, **quality),
            yolox=dict(common, type='YOLOXHead', strides=strides, train_cfg=dict(assigner=dict(type='SimOTAAssigner'))),
            rpn=dict(type='RPNHead', in_channels=channels, feat_channels=channels, num_classes=1, loss_cls=sigmoid,
                     anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0], strides=strides),
                     bbox_coder=deltas, train_cfg=max_iou),
            ssd=dict(type='SSDHead', num_classes=classes, in_channels=(channels, ) * 3, bbox_coder=deltas,
                     anchor_generator=dict(type='SSDAnchorGenerator', input_size=64, min_sizes=[12, 24, 40],
                                           max_sizes=[24, 40, 60], strides=strides, ratios=[[2], [2, 3], [2]]),
                     train_cfg=dict(max_iou, smoothl1_beta=1.0, neg_pos_ratio=3)),
            yolov3=dict(type='YOLOV3Head', num_classes=classes, in_channels=[channels] * 3, out_channels=[channels] * 3,
                        anchor_generator=dict(type='YOLOAnchorGenerator', strides=strides,
                                              base_sizes=[[(10, 13), (16, 30)]] * 3),
                        bbox_coder=dict(type='YOLOBBoxCoder'), featmap_strides=strides,
                        loss_cls=sigmoid, loss_conf=sigmoid, loss_xy=sigmoid, loss_wh=dict(type='MSELoss'),
                        train_cfg=dict(assigner=dict(type='GridAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5,
                                                     min_pos_iou=0))))
        test_cfg = dict(nms_pre=10**6, score_thr=0.0, conf_thr=-1.0, min_bbox_size=-1)
        return ConfigDict({**configs[family], 'test_cfg': test_cfg, **changes})

    return make


@pytest.fixture
def one_stage(retinanet, dense_head_config):
    """Makes the model dict of a small one-stage detector with a head of the given family."""

    def make(family: str, depth: int = 18, width: int = 4, neck: int = 8, classes: int = 3, **changes) -> dict:
        model = retinanet(depth=depth, width=width, neck=neck, levels=3)
        head = dense_head_config(family, neck, classes, **changes)
        model['type'], model['bbox_head'] = 'SingleStageDetector', head  # item by item: a ConfigDict updates by merging
        model['train_cfg'], model['test_cfg'] = head.pop('train_cfg', None), head.pop('test_cfg')
        return model

    return make


@pytest.fixture
def cascade_rcnn(faster_rcnn):
    """Makes the model dict of a Cascade R-CNN of two stages, class-agnostic, with coders of their own."""

    def make(**kwargs) -> dict:
        model = faster_rcnn(**kwargs)
        head, extractor, train_cfg = model.roi_head.bbox_head, model.roi_head.bbox_roi_extractor, model.train_cfg.rcnn
        model.type = 'CascadeRCNN'
        model.roi_head = ConfigDict(
            type='CascadeRoIHead', num_stages=2, stage_loss_weights=[1, 0.5], bbox_roi_extractor=extractor,
            bbox_head=[dict(head, reg_class_agnostic=True, bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=stds))
                       for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1])])
        model.train_cfg.rcnn = [train_cfg, train_cfg]
        return model

    return make


@pytest.fixture
def detr(monkeypatch):
    """Makes the model dict of a DETR of a kind: 'DETR', 'ConditionalDETR', 'DABDETR', 'DeformableDETR' or 'DINO'."""
    from mmdet.models import DINO, DeformableDETR

    def drawn(init_layers):
        return lambda self: (init_layers(self), torch.nn.init.normal_(self.level_embed))

    for detector in (DINO, DeformableDETR):  # they leave this weight as the memory was, until init_weights
        monkeypatch.setattr(detector, '_init_layers', drawn(detector._init_layers))

    def make(kind: str = 'DeformableDETR', depth: int = 18, width: int = 4, embed: int = 0, queries: int = 10,
             layers: int = 2, classes: int = 3, num_outs: int = 4, **changes) -> dict:
        embed = embed or (256 if kind in ('ConditionalDETR', 'DINO') else 32)  # mmdet's code of these knows 256 alone
        deformable = kind in ('DeformableDETR', 'DINO')
        sigmoid, stages = kind != 'DETR', slice(1, 4) if deformable else slice(3, 4)
        attention = dict(embed_dims=embed, num_heads=4, dropout=0.0, batch_first=True)
        sampling = dict(attention, num_levels=num_outs, num_points=2) if deformable else attention
        conditional = dict(embed_dims=embed, num_heads=4, attn_drop=0.0)
        activation = dict(type='PReLU') if kind == 'DABDETR' else dict(type='ReLU')
        ffn = dict(embed_dims=embed, feedforward_channels=2 * embed, num_fcs=2, ffn_drop=0.0, act_cfg=activation)
        attentions = dict(self_attn_cfg=attention, cross_attn_cfg=sampling)
        if kind in ('ConditionalDETR', 'DABDETR'):
            attentions = dict(self_attn_cfg=dict(conditional, cross_attn=False),
                              cross_attn_cfg=dict(conditional, cross_attn=True))
        decoder = dict(num_layers=layers, return_intermediate=True, layer_cfg=dict(ffn_cfg=ffn, **attentions))
        if kind == 'DABDETR':
            decoder.update(query_dim=4, query_scale_type='cond_elewise', with_modulated_hw_attn=True)
        if deformable:
            decoder['post_norm_cfg'] = None
        loss_cls = (dict(type='FocalLoss', use_sigmoid=True) if sigmoid else
                    dict(type='CrossEntropyLoss', bg_cls_weight=0.1, use_sigmoid=False, class_weight=1.0))
        options = dict(DABDETR=dict(with_random_refpoints=False, num_patterns=0),
                       DeformableDETR=dict(num_feature_levels=num_outs, with_box_refine=True),
                       DINO=dict(num_feature_levels=num_outs, with_box_refine=True, as_two_stage=True,
                                 dn_cfg=dict(label_noise_scale=0.5, box_noise_scale=1.0,
                                             group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=4))))
        costs = [dict(type='FocalLossCost' if sigmoid else 'ClassificationCost', weight=2.0),
                 dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                 dict(type='IoUCost', iou_mode='giou', weight=2.0)]
        return ConfigDict(
            type=kind, num_queries=queries, data_preprocessor=dict(PREPROCESSOR, pad_size_divisor=1),
            backbone=dict(_backbone(depth, width), out_indices=tuple(range(4))[stages]),
            neck=dict(type='ChannelMapper', in_channels=_stage_channels(depth, width)[stages], kernel_size=1,
                      out_channels=embed, act_cfg=None, norm_cfg=dict(type='GN', num_groups=4),
                      num_outs=num_outs if deformable else 1),
            encoder=dict(num_layers=layers, layer_cfg=dict(self_attn_cfg=sampling, ffn_cfg=ffn)), decoder=decoder,
            positional_encoding=dict(num_feats=embed // 2, normalize=True),
            bbox_head=dict(type=f'{kind}Head', num_classes=classes, embed_dims=embed, loss_cls=loss_cls,
                           loss_bbox=dict(type='L1Loss', loss_weight=5.0),
                           loss_iou=dict(type='GIoULoss', loss_weight=2.0)),
            train_cfg=dict(assigner=dict(type='HungarianAssigner', match_costs=costs)), test_cfg=dict(max_per_img=5),
            **{**options.get(kind, {}), **changes})

    return make


@pytest.fixture
def batch():
    """Makes a batch as a data loader gives it: images of the given (height, width), each with its boxes."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    def make(shapes=((64, 64), (64, 64)), boxes=(((8, 8, 40, 40), ), ((20, 4, 60, 30), (2, 30, 30, 62))),
             seed: int = 0) -> dict:
        random = torch.Generator().manual_seed(seed)
        samples = []
        for index, (shape, image_boxes) in enumerate(zip(shapes, boxes)):
            image_boxes = torch.tensor(image_boxes, dtype=torch.float32).reshape(-1, 4)
            sample = DetDataSample(metainfo=dict(img_id=index, img_shape=shape, ori_shape=shape,
                                                 scale_factor=(1.0, 1.0)))
            sample.gt_instances = InstanceData(bboxes=image_boxes, labels=torch.arange(len(image_boxes)) % 3)
            sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
            samples.append(sample)
        images = [torch.randint(0, 256, (3, *shape), generator=random, dtype=torch.uint8) for shape in shapes]
        return dict(inputs=images, data_samples=samples)

    return make


@pytest.fixture
def detector_config(one_stage, faster_rcnn, cascade_rcnn, detr):
    """Makes the model dict of a detector of a kind; a teacher's features are wider, what its head predicts is not.

    ``widths`` gives those of the backbone's first stage and of the neck.
    """

    def ssd(model: dict, width: int) -> None:
        channels = (2 * width, 4 * width, 8 * width)
        model.backbone.out_indices = (1, 2)
        model.neck = ConfigDict(type='SSDNeck', in_channels=channels[:2], out_channels=channels, level_strides=(2, ),
                                level_paddings=(1, ), l2_norm_scale=20)
        model.bbox_head.in_channels = channels

    def yolov3(model: dict, width: int) -> None:
        channels, strides = (8 * width, 4 * width, 2 * width), (32, 16, 8)  # the coarsest level first
        model.backbone.out_indices = (1, 2, 3)
        model.neck = ConfigDict(type='YOLOV3Neck', num_scales=3, in_channels=channels, out_channels=channels)
        model.bbox_head.update(in_channels=channels, out_channels=channels, featmap_strides=strides)
        model.bbox_head.anchor_generator.strides = strides

    def mask_rcnn(**kwargs) -> dict:
        model = faster_rcnn(**kwargs)
        model.type, model.train_cfg.rcnn.mask_size, model.test_cfg.rcnn.mask_thr_binary = 'MaskRCNN', 6, 0.5
        model.roi_head.mask_roi_extractor = model.roi_head.bbox_roi_extractor
        model.roi_head.mask_head = dict(type='FCNMaskHead', num_convs=1, in_channels=kwargs['neck'],
                                        conv_out_channels=8, num_classes=kwargs['classes'])
        return model

    def make(kind: str, teacher: bool = False, widths: tuple[int, int] | None = None, classes: int = 3) -> dict:
        width, neck = widths or ((8, 24) if teacher else (4, 16))
        if kind in DETRS:
            fixed = kind in ('Conditional DETR', 'DINO')  # mmdet's code for these two knows one width alone
            return detr(DETRS[kind], width=width, embed=0 if fixed else 2 * neck, classes=classes)
        if kind not in DENSE:
            makers = {'Faster R-CNN': faster_rcnn, 'Cascade R-CNN': cascade_rcnn, 'Mask R-CNN': mask_rcnn}
            return makers[kind](width=width, neck=neck, classes=classes)
        towers = dict(stacked_convs=2, feat_channels=8) if kind not in ('SSD', 'YOLOv3') else {}
        model = one_stage(DENSE[kind], width=width, neck=neck, classes=classes, **towers)
        if kind in ('SSD', 'YOLOv3'):
            dict(SSD=ssd, YOLOv3=yolov3)[kind](model, width)
        return model

    return make


@pytest.fixture
def batch_for(batch):
    """Makes a batch for a kind of detectors: with masks for those that learn them."""

    def make(kind: str, shapes, boxes) -> dict:
        data = batch(shapes, boxes)
        for shape, sample in zip(shapes, data['data_samples']) if kind == 'Mask R-CNN' else ():
            count = len(sample.gt_instances)
            sample.gt_instances.masks = BitmapMasks(torch.ones(count, *shape, dtype=torch.uint8).numpy(), *shape)
        return data

    return make


@pytest.fixture
def distiller():
    """Makes a distiller of a student and a random teacher."""
    from mmdet.registry import MODELS

    def make(student: dict, taught_by: dict, seed: int = 0, **changes):
        torch.manual_seed(seed)
        config = dict(type='DetectionDistiller', student=student, teacher=dict(config=taught_by, random_teacher=True),
                      distill=dict(fgd=dict(type='FGD')))
        return MODELS.build({**config, **changes})

    return make


@pytest.fixture(scope='session')
def coco_folder(tmp_path_factory) -> Path:
    """Eight images of 64×64 with coloured rectangles of three classes, in COCO format."""
    import mmcv
    folder = tmp_path_factory.mktemp('coco')
    random = np.random.RandomState(0)
    images, annotations = [], []
    for index in range(8):
        image = random.randint(0, 60, (64, 64, 3)).astype(np.uint8)
        for _ in range(2):
            x, y = random.randint(0, 40, 2)
            width, height = random.randint(12, 24, 2)
            category = int(random.randint(3))
            image[y:y + height, x:x + width, category] = 220
            annotations.append(dict(id=len(annotations) + 1, image_id=index, category_id=category + 1, iscrowd=0,
                                    bbox=[int(x), int(y), int(width), int(height)], area=int(width * height)))
        mmcv.imwrite(image, str(folder / f'{index}.png'))
        images.append(dict(id=index, file_name=f'{index}.png', width=64, height=64))
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(('blue', 'green', 'red'))]
    (folder / 'all.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return folder


@pytest.fixture
def run_config(coco_folder, tmp_path):
    """Makes the config of a run over :func:`coco_folder` for a model dict; like mmdet's own configs otherwise."""
    from mmengine.config import Config

    def make(model: dict, epochs: int = 2, name: str = 'run', val: bool = False, seed: int = 0, preflight=None,
             optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4), **changes) -> Config:
        dataset = dict(type='CocoDataset', data_root=str(coco_folder), ann_file='all.json', data_prefix=dict(img=''),
                       metainfo=dict(classes=('blue', 'green', 'red')),
                       pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
                                 dict(type='RandomFlip', prob=0.5), dict(type='PackDetInputs')])
        val_dataset = dict(dataset, test_mode=True, pipeline=[
            dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(64, 64)),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))])
        config = dict(
            default_scope='mmdet', work_dir=str(tmp_path / name), model=model,
            train_dataloader=dict(batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
                                  dataset=dataset),
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1),
            optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer),
            param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=6)],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1),
                               distill=dict(type='DistillHook', preflight=preflight)),
            randomness=dict(seed=seed), log_level='WARNING',
            visualizer=dict(type='Visualizer', name=str(tmp_path / name)), experiment_name=f'{tmp_path.name}_{name}')
        if val:
            config.update(val_dataloader=dict(batch_size=4, num_workers=0,
                                              sampler=dict(type='DefaultSampler', shuffle=False), dataset=val_dataset),
                          val_cfg=dict(type='ValLoop'),
                          val_evaluator=dict(type='CocoMetric', ann_file=str(coco_folder / 'all.json'), metric='bbox'))
        config = Config(config)
        config.merge_from_dict(changes)
        return config

    return make


@pytest.fixture
def make_runner(run_config):
    """Makes mmengine's Runner of :func:`run_config`."""
    from mmengine.runner import Runner
    return lambda *args, **kwargs: Runner.from_cfg(run_config(*args, **kwargs))


@pytest.fixture
def make_context():
    """Makes the context of a step from features of one stride, boxes and shapes."""

    def make(student, teacher, boxes, batch_shape=(64, 96), image_shapes=None, stride=8) -> DistillContext:
        return DistillContext.of_features(student, teacher, stride, boxes, image_shapes=image_shapes,
                                          batch_shape=batch_shape)

    return make


@pytest.fixture
def connected():
    """Connects a term to a context as the distiller does."""

    def connect(term, context):
        term.connect(context.student_levels, context.teacher_levels[0])
        return term

    return connect


@pytest.fixture
def stop_after():
    """Makes a hook that ends a run before the epoch after so many, as a user's Ctrl-C would."""
    spec = importlib.util.spec_from_file_location('train_each', TRAIN_EACH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.StopAfter


@pytest.fixture
def train_apart(tmp_path):
    """Trains configs one after the other in a process of its own, each with the epochs after which it is interrupted.

    Loader workers are forked, and a process with the threads of pytest-xdist and of all tests may not be: three times
    it died there without a word.
    """

    def train(*jobs) -> None:
        arguments = []
        for index, (config, epochs) in enumerate(jobs):
            config.dump(tmp_path / f'job{index}.py')
            arguments += [str(tmp_path / f'job{index}.py'), str(epochs or 0)]
        ended = subprocess.run([sys.executable, str(TRAIN_EACH), *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, timeout=280)
        assert ended.returncode == 0, ended.stdout[-8000:]

    return train


@pytest.fixture
def run_ranks():
    """Runs a script on two ranks, by the local interface whatever the machine's name resolves to; returns its log."""

    def run(script: Path, *arguments) -> str:
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--rdzv_backend=c10d',
                   '--rdzv_endpoint=localhost:0', '--local_addr=localhost', str(script), *map(str, arguments)]
        ended = subprocess.run(command, env={**os.environ, 'OMP_NUM_THREADS': '1', 'GLOO_SOCKET_IFNAME': LOOPBACK},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280)
        assert ended.returncode == 0, ended.stdout[-8000:]
        return ended.stdout

    return run


def pytest_testnodedown(node, error) -> None:
    """Tells how a process of the tests ended that died: by which signal, or with which status."""
    process = getattr(getattr(node.gateway, '_io', None), 'popen', None)
    if error and process is not None:
        print(f'\n[{node.gateway.id}] its exit status is {process.wait(10)}')
