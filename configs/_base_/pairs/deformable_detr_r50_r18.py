"""Two-stage Deformable DETR R50 teaches the same with R18, on COCO. Add the terms of one or more methods."""
_base_ = '../students/deformable_detr_r18.py'

model = dict(
    _delete_=True,
    type='mmdet.DetectionDistiller',
    student=_base_.model,
    teacher=dict(
        config='mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v3.0/deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco/deformable-detr-refine-twostage_r50_16xb2-50e_coco_20221021_184714-acc8a5ff.pth'),
    distill=dict())
default_hooks = dict(distill=dict(type='mmdet.DistillHook', preflight=dict(images=64, min_map=0.01)))
