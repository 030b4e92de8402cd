"""RTMDet-L teaches RTMDet-M with CWD by MMYOLO's recipe, on COCO."""
_base_ = ['./_base_/pairs/rtmdet_l_m.py', './_base_/recipes/cwd_rtmdet.py']
model = dict(distill=_base_.cwd_rtmdet)
