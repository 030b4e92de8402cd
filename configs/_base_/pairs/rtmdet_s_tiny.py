"""RTMDet-S teaches RTMDet-tiny, on COCO. Add the terms of one or more methods."""
_base_ = '../students/rtmdet_tiny.py'

model = dict(
    _delete_=True,
    type='mmdet.DetectionDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_s_8xb32-300e_coco/rtmdet_s_8xb32-300e_coco_20220905_161602-387a891e.pth'),
    distill=dict())
default_hooks = dict(distill=dict(type='mmdet.DistillHook', preflight=dict(images=64, min_map=0.01)))
