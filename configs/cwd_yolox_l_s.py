"""YOLOX-L teaches YOLOX-S with CWD, on COCO."""
_base_ = ['./_base_/pairs/yolox_l_s.py', './_base_/methods/cwd.py']
model = dict(distill=_base_.cwd)
