"""RTMDet-L teaches RTMDet-S with PKD, on COCO."""
_base_ = ['./_base_/pairs/rtmdet_l_s.py', './_base_/methods/pkd.py']
model = dict(distill=_base_.pkd)
