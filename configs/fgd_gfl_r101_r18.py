"""GFL R101 teaches GFL R18 with FGD, on COCO."""
_base_ = ['./_base_/pairs/gfl_r101_r18.py', './_base_/methods/fgd_one_stage.py']
model = dict(distill=_base_.fgd)
