"""Two-stage Deformable DETR R18 without distillation: same schedule, seed and start as the student of R50."""
_base_ = './_base_/students/deformable_detr_r18.py'
