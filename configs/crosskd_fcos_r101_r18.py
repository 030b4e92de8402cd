"""FCOS R101 teaches FCOS R18 with CrossKD, on COCO."""
_base_ = ['./_base_/pairs/fcos_r101_r18.py', './_base_/methods/crosskd_anchor_free.py']
model = dict(distill=_base_.crosskd)
