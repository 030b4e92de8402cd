"""One tiny detector of each kind that the catalogue knows."""
import pytest
import torch
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict

DENSE = {'RetinaNet': 'retina', 'ATSS': 'atss', 'GFL': 'gfl', 'FCOS': 'fcos_normalized', 'RTMDet': 'rtmdet_separate',
         'YOLOX': 'yolox', 'SSD': 'ssd', 'YOLOv3': 'yolov3'}
DETRS = {'DETR': 'DETR', 'Conditional DETR': 'ConditionalDETR', 'DAB-DETR': 'DABDETR',
         'Deformable DETR': 'DeformableDETR', 'DINO': 'DINO'}


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
        model.type, model.train_cfg.rcnn.mask_size = 'MaskRCNN', 6
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
