"""FCOS R101 teaches FCOS R18 with CWD, on COCO."""
_base_ = ['./_base_/pairs/fcos_r101_r18.py', './_base_/methods/cwd.py']
model = dict(distill=_base_.cwd)
