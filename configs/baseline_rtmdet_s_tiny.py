"""RTMDet-tiny without distillation: same schedule, seed and start as the student of RTMDet-S."""
_base_ = './_base_/students/rtmdet_tiny.py'
