"""A RetinaNet on BCCD_Dataset whose backbone starts from ImageNet: MobileNetV2, with a neck and towers of 64 channels.

Its weights are given as model.backbone.init_cfg.checkpoint; BatchNorm keeps ImageNet's statistics.
"""
_base_ = './retinanet_r18.py'
model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        _delete_=True, type='MobileNetV2', out_indices=(1, 2, 4, 6), norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='mobilenet_v2_imagenet.pth')),
    neck=dict(in_channels=[24, 32, 96, 320]))
