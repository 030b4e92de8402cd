"""DINO R50 teaches DINO R18 by the features of its encoder, on COCO."""
_base_ = ['./_base_/pairs/dino_r50_r18.py', './_base_/methods/encoder_detr.py']
model = dict(distill=_base_.encoder)
