"""RetinaNet R50 on COCO with MMDetection's 1x schedule: the student, and the baseline without distillation."""
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['kd_det'], allow_failed_imports=False)
randomness = dict(seed=0)
