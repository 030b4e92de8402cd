"""Faster R-CNN R101 teaches Faster R-CNN R18 with FKD, on COCO."""
_base_ = ['./_base_/pairs/faster_rcnn_r101_r18.py', './_base_/methods/fkd_two_stage.py']
model = dict(distill=_base_.fkd)
