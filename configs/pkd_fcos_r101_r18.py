"""FCOS R101 teaches FCOS R18 with PKD, on COCO."""
_base_ = ['./_base_/pairs/fcos_r101_r18.py', './_base_/methods/pkd.py']
model = dict(distill=_base_.pkd)
