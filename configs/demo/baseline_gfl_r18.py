"""A slim GFL R18 on the demo's data: a student for ``kd-det benchmark``."""
_base_ = ['./_base_/gfl_slim.py', './_base_/shapes_detection.py', './_base_/schedule.py']
model = dict(backbone=dict(depth=18, base_channels=16, stem_channels=16), neck=dict(in_channels=[16, 32, 64, 128]))
