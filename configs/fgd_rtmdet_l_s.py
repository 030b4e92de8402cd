"""RTMDet-L teaches RTMDet-S with FGD, on COCO."""
_base_ = ['./_base_/pairs/rtmdet_l_s.py', './_base_/methods/fgd_one_stage.py']
model = dict(distill=_base_.fgd)
