"""RetinaNet R101 teaches RetinaNet R18 with CrossKD, on COCO."""
_base_ = ['./_base_/pairs/retinanet_r101_r18.py', './_base_/methods/crosskd_one_stage.py']
model = dict(distill=_base_.crosskd)
