"""The twin of fgd_yolox_l_s.py without distillation: the same student, schedule, seed and initialisation."""
_base_ = './_base_/students/yolox_s.py'
