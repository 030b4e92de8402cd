"""An RTMDet of twice the student's width and depth on the demo's data: its teacher, trained three times as long."""
_base_ = ['./_base_/rtmdet_slim.py', './_base_/shapes_detection.py', './_base_/schedule.py']
model = dict(
    backbone=dict(deepen_factor=0.33, widen_factor=0.5),
    neck=dict(in_channels=[128, 256, 512], out_channels=128),
    bbox_head=dict(in_channels=128, feat_channels=128))
train_cfg = dict(max_epochs=24, val_interval=24)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, T_max=24, convert_to_iter_based=True),
]
