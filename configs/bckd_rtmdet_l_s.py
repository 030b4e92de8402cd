"""RTMDet-L teaches RTMDet-S with BCKD, on COCO."""
_base_ = ['./_base_/pairs/rtmdet_l_s.py', './_base_/methods/bckd_one_stage.py']
model = dict(distill=_base_.bckd)
