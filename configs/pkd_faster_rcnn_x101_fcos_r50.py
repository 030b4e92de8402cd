"""Faster R-CNN X101 teaches FCOS R50 with PKD, on COCO."""
_base_ = ['./_base_/pairs/faster_rcnn_x101_fcos_r50.py', './_base_/methods/pkd_two_stage.py']
model = dict(distill=_base_.pkd)
