"""The slim Faster R-CNN R101 teaches the R18 with FGD on the demo's data: the twin of baseline_faster_rcnn_r18.py."""
_base_ = './baseline_faster_rcnn_r18.py'
custom_imports = dict(imports=['kd_det'])

model = dict(
    _delete_=True,
    type='DetectionDistiller',
    student=_base_.model,
    teacher=dict(config='kd_det::demo/teacher_faster_rcnn_r101.py', checkpoint='demo/runs/teacher/epoch_20.pth'),
    distill=dict(
        fgd=dict(type='FGD', tap='neck', temperature=0.5, alpha=1e-3, beta=5e-4, gamma=1e-3, lambda_=5e-6, weight=1.0)))
default_hooks = dict(distill=dict(type='DistillHook'))
