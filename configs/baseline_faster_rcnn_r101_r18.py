"""Faster R-CNN R18 without distillation: same schedule, seed and start as the student of Faster R-CNN R101."""
_base_ = './_base_/students/faster_rcnn_r18.py'
