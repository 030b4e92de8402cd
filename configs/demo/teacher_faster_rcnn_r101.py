"""The demo's teacher: a slim Faster R-CNN R101, trained three times as long as the students."""
_base_ = ['./_base_/faster_rcnn_slim.py', './_base_/shapes_detection.py', './_base_/schedule.py']
model = dict(backbone=dict(depth=101, base_channels=16, stem_channels=16), neck=dict(in_channels=[64, 128, 256, 512]))
train_cfg = dict(max_epochs=24, val_interval=24)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, T_max=24, convert_to_iter_based=True),
]
