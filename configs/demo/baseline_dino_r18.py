"""A slim DINO R18 on the demo's data: a student for ``kd-det benchmark``."""
_base_ = ['./_base_/dino_slim.py', './_base_/detr_schedule.py']
model = dict(backbone=dict(depth=18, base_channels=16, stem_channels=16), neck=dict(in_channels=[32, 64, 128]))
