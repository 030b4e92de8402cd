"""Deformable DETR R50 teaches Deformable DETR R18 by queries made of ground-truth boxes, on COCO."""
_base_ = ['./_base_/pairs/deformable_detr_r50_r18.py', './_base_/methods/targetquery_detr.py']
model = dict(distill=_base_.targetquery)
