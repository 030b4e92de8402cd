"""RetinaNet R101 teaches RetinaNet R18, on COCO. Add the terms of one or more methods."""
_base_ = '../students/retinanet_r18.py'

model = dict(
    _delete_=True,
    type='mmdet.DetectionDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::retinanet/retinanet_r101_fpn_2x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/retinanet/retinanet_r101_fpn_2x_coco/retinanet_r101_fpn_2x_coco_20200131-5560aee8.pth'),
    distill=dict())
default_hooks = dict(distill=dict(type='mmdet.DistillHook', preflight=dict(images=64, min_map=0.01)))
