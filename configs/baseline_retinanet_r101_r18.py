"""The twin of fgd_retinanet_r101_r18.py without distillation: the same student, schedule, seed and initialisation."""
_base_ = './_base_/students/retinanet_r18.py'
