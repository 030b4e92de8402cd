"""FCOS R50 on COCO with MMDetection's 1x schedule: the student, and the baseline without distillation."""
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
custom_imports = dict(imports=['kd_det'], allow_failed_imports=False)
randomness = dict(seed=0)
