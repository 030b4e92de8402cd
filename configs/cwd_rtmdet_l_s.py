"""RTMDet-L teaches RTMDet-S with CWD, on COCO."""
_base_ = ['./_base_/pairs/rtmdet_l_s.py', './_base_/methods/cwd.py']
model = dict(distill=_base_.cwd)
