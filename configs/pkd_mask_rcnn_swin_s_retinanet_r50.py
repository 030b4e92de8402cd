"""Mask R-CNN Swin-S teaches RetinaNet R50 with PKD, on COCO."""
_base_ = ['./_base_/pairs/mask_rcnn_swin_s_retinanet_r50.py', './_base_/methods/pkd_two_stage.py']
model = dict(distill=_base_.pkd)
