"""FCOS R50 without distillation: same schedule, seed and start as the student of Faster R-CNN X101."""
_base_ = './_base_/students/fcos_r50.py'
