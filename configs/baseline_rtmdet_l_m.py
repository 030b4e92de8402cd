"""RTMDet-M without distillation: same schedule, seed and start as the student of RTMDet-L."""
_base_ = './_base_/students/rtmdet_m.py'
