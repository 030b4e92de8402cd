"""ATSS R101 teaches ATSS R18, on COCO. Add the terms of one or more methods."""
_base_ = '../students/atss_r18.py'

model = dict(
    _delete_=True,
    type='mmdet.DetectionDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::atss/atss_r101_fpn_1x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/atss/atss_r101_fpn_1x_coco/atss_r101_fpn_1x_20200825-dfcadd6f.pth'),
    distill=dict())
default_hooks = dict(distill=dict(type='mmdet.DistillHook', preflight=dict(images=64, min_map=0.01)))
