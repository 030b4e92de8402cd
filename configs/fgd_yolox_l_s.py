"""YOLOX-L teaches YOLOX-S with FGD, on COCO."""
_base_ = ['./_base_/pairs/yolox_l_s.py', './_base_/methods/fgd_anchor_free.py']
model = dict(distill=_base_.fgd)
