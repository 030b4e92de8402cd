"""DINO R18 on COCO with MMDetection's schedule of 12 epochs: the student, and the baseline without distillation."""
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['kd_det'], allow_failed_imports=False)
randomness = dict(seed=0)

model = dict(
    backbone=dict(depth=18, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[128, 256, 512]))
