"""Two-stage Deformable DETR R18 on COCO with MMDetection's schedule of 50 epochs: the student, and the baseline without
distillation."""
_base_ = 'mmdet::deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py'
custom_imports = dict(imports=['kd_det'], allow_failed_imports=False)
randomness = dict(seed=0)

model = dict(
    backbone=dict(depth=18, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[128, 256, 512]))
