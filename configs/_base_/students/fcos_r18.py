"""FCOS R18 on COCO with MMDetection's 1x schedule: the student, and the baseline without distillation."""
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
custom_imports = dict(imports=['kd_det'], allow_failed_imports=False)
randomness = dict(seed=0)

# The R50 of MMDetection starts from Caffe's weights, which saw BGR; this from torchvision's, which saw normalised RGB.
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        depth=18, style='pytorch', norm_cfg=dict(requires_grad=True),
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet18')),
    neck=dict(in_channels=[64, 128, 256, 512]))
