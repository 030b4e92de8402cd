"""YOLOX-L teaches YOLOX-S with BCKD, on COCO."""
_base_ = ['./_base_/pairs/yolox_l_s.py', './_base_/methods/bckd_anchor_free.py']
model = dict(distill=_base_.bckd)
