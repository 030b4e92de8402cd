"""FCOS R18 without distillation: same schedule, seed and start as the student of FCOS R101."""
_base_ = './_base_/students/fcos_r18.py'
