"""A DINO R50 whose backbone has twice the student's width on the demo's data: its teacher, trained three times as long."""
_base_ = ['./_base_/dino_slim.py', './_base_/detr_schedule.py']
model = dict(backbone=dict(depth=50, base_channels=32, stem_channels=32), neck=dict(in_channels=[256, 512, 1024]))
train_cfg = dict(max_epochs=15, val_interval=15)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', eta_min=0, by_epoch=True, T_max=15, convert_to_iter_based=True),
]
