"""RTMDet-L teaches RTMDet-S with CrossKD, on COCO."""
_base_ = ['./_base_/pairs/rtmdet_l_s.py', './_base_/methods/crosskd_one_stage.py']
model = dict(distill=_base_.crosskd)
