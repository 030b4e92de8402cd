"""YOLOX-L teaches YOLOX-S with PKD, on COCO."""
_base_ = ['./_base_/pairs/yolox_l_s.py', './_base_/methods/pkd.py']
model = dict(distill=_base_.pkd)
