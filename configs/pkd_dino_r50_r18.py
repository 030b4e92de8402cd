"""DINO R50 teaches DINO R18 with PKD, on COCO."""
_base_ = ['./_base_/pairs/dino_r50_r18.py', './_base_/methods/pkd.py']
model = dict(distill=_base_.pkd)
