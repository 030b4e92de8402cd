"""The demo's teacher: a slim Faster R-CNN R101."""
_base_ = ['./_base_/faster_rcnn_slim.py', './_base_/shapes_detection.py', './_base_/schedule.py']
model = dict(backbone=dict(depth=101, base_channels=16, stem_channels=16), neck=dict(in_channels=[64, 128, 256, 512]))
