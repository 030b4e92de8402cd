"""ATSS R101 teaches ATSS R18 with MGD, on COCO."""
_base_ = ['./_base_/pairs/atss_r101_r18.py', './_base_/methods/mgd.py']
model = dict(distill=_base_.mgd)
