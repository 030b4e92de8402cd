"""Deformable DETR R50 teaches Deformable DETR R18 query by query, on COCO."""
_base_ = ['./_base_/pairs/deformable_detr_r50_r18.py', './_base_/methods/querykd_detr.py']
model = dict(distill=_base_.querykd)
