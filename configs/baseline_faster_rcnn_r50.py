"""Faster R-CNN R50 without distillation: same schedule, seed and start as the student of Cascade Mask R-CNN X101."""
_base_ = './_base_/students/faster_rcnn_r50.py'
