"""RetinaNet R18 without distillation: same schedule, seed and start as the student of RetinaNet R101."""
_base_ = './_base_/students/retinanet_r18.py'
