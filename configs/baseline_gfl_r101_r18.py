"""GFL R18 without distillation: same schedule, seed and start as the student of GFL R101."""
_base_ = './_base_/students/gfl_r18.py'
