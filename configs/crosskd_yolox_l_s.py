"""YOLOX-L teaches YOLOX-S with CrossKD, on COCO."""
_base_ = ['./_base_/pairs/yolox_l_s.py', './_base_/methods/crosskd_anchor_free.py']
model = dict(distill=_base_.crosskd)
