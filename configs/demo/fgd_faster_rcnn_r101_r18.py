"""The slim Faster R-CNN R101 teaches the R18 with FGD on the demo's data: the twin of baseline_faster_rcnn_r18.py.

What ``kd-det distill --method fgd`` makes of the two: neck and heads start from the teacher's, and FGD's gradient is as
strong as the task's.
"""
_base_ = ['./baseline_faster_rcnn_r18.py', '../_base_/methods/fgd_two_stage.py']
custom_imports = dict(imports=['kd_det'])

model = dict(
    _delete_=True,
    type='mmdet.DetectionDistiller',
    student=_base_.model,
    teacher=dict(config='kd_det::demo/teacher_faster_rcnn_r101.py', checkpoint='demo/runs/teacher/epoch_24.pth'),
    distill=dict(fgd=dict(weight=dict(type='mmdet.Balance', ratio=1.0), **_base_.fgd.fgd)),
    inherit='auto')
default_hooks = dict(distill=dict(type='mmdet.DistillHook'))
