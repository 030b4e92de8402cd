"""Cascade Mask R-CNN X101 teaches Faster R-CNN R50 with PKD, on COCO."""
_base_ = ['./_base_/pairs/cascade_mask_rcnn_x101_faster_rcnn_r50.py', './_base_/methods/pkd_two_stage.py']
model = dict(distill=_base_.pkd)
