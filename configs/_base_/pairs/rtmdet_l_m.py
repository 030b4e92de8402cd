"""RTMDet-L teaches RTMDet-M, on COCO. Add the terms of one or more methods."""
_base_ = '../students/rtmdet_m.py'

model = dict(
    _delete_=True,
    type='mmdet.DetectionDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v3.0/rtmdet/rtmdet_l_8xb32-300e_coco/rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4.pth'),
    distill=dict())
default_hooks = dict(distill=dict(type='mmdet.DistillHook', preflight=dict(images=64, min_map=0.01)))
