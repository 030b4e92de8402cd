"""RTMDet-M on COCO with MMDetection's schedule of 300 epochs: the student, and the baseline without distillation."""
_base_ = 'mmdet::rtmdet/rtmdet_m_8xb32-300e_coco.py'
custom_imports = dict(imports=['kd_det'], allow_failed_imports=False)
randomness = dict(seed=0)
