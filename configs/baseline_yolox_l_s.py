"""YOLOX-S without distillation: same schedule, seed and start as the student of YOLOX-L."""
_base_ = './_base_/students/yolox_s.py'
