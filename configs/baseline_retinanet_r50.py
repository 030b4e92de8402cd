"""RetinaNet R50 without distillation: same schedule, seed and start as the student of Mask R-CNN Swin-S."""
_base_ = './_base_/students/retinanet_r50.py'
