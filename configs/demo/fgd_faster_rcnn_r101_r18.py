"""The slim Faster R-CNN R101 teaches the R18 with FGD on the demo's data: the twin of baseline_faster_rcnn_r18.py.

Published weights are made for COCO at 256 channels. These were chosen on this data with a seed (10) that the demo does
not use: foreground and background ten times the paper's one-stage weights, attention and relation little.
"""
_base_ = './baseline_faster_rcnn_r18.py'
custom_imports = dict(imports=['kd_det'])

model = dict(
    _delete_=True,
    type='DetectionDistiller',
    student=_base_.model,
    teacher=dict(config='kd_det::demo/teacher_faster_rcnn_r101.py', checkpoint='demo/runs/teacher/epoch_24.pth'),
    distill=dict(fgd=dict(type='FGD', tap='neck', temperature=0.5, alpha=1e-2, beta=5e-3, gamma=2e-3, lambda_=1e-5)))
default_hooks = dict(distill=dict(type='DistillHook'))
